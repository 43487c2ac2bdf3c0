"""What tests and benchmarks share: shapes of real models and inputs that are hard to quantise."""

from turboquant_core.testing.inputs import (
    INPUT_KINDS,
    equal_magnitude,
    gaussian,
    heavy_tailed,
    one_hot,
    two_hot,
)
from turboquant_core.testing.shapes import MODEL_SHAPES, ModelShape

__all__ = [
    "INPUT_KINDS",
    "MODEL_SHAPES",
    "ModelShape",
    "equal_magnitude",
    "gaussian",
    "heavy_tailed",
    "one_hot",
    "two_hot",
]
