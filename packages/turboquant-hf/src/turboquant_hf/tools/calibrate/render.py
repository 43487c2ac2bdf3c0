"""What `turboquant calibrate` says of the layers it measured."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from turboquant_hf.tools.calibrate.measure import CENTRED, MeasuredLayer
from turboquant_hf.tools.calibrate.probes import KEY_BITS


def to_dict(layers: Mapping[int, MeasuredLayer]) -> dict[str, Any]:
    """The layers as JSON, by index."""
    return {
        str(index): {
            "shape": list(next(iter(layer.transform.tensors().values())).shape),
            "kind": layer.kind,
            "errors": dict(layer.errors),
            "left": [{"head": head, "reason": reason} for head, reason in layer.left.items()],
        }
        for index, layer in layers.items()
    }


def summary(
    path: str, model: str, layers: Mapping[int, MeasuredLayer], *, num_tokens: int, num_held_out: int
) -> Iterator[str]:
    """Lines that say what was written, what it gains, and what was left."""
    yield f"{path}: calibration of {len(layers)} layers of {model}, over {num_tokens:,} tokens"
    scaled = [layer for layer in layers.values() if layer.kind != CENTRED]
    if scaled:
        before, after = (
            sum(layer.errors[name or layer.kind] for layer in scaled) / len(scaled) for name in (CENTRED, None)
        )
        yield (
            f"{len(scaled)} of them scaled: with keys of {KEY_BITS} bits the squared error of their attention is "
            f"{after:.2%} instead of {before:.2%}, on {num_held_out:,} tokens that were held out"
        )
    places: dict[str, list[str]] = defaultdict(list)
    for index, layer in layers.items():
        for head, reason in layer.left.items():
            places[reason].append(f"{index}" if head is None else f"{index} (head {head})")
    for reason, where in places.items():
        yield f"not scaled, layer {', '.join(where)}: {reason}"
