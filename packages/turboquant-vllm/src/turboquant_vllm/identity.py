"""Which model vLLM serves, as the files of `turboquant` name it."""

from typing import Any

from turboquant_core.model_identity import ModelIdentity


def model_identity(model_config: Any) -> ModelIdentity:
    """The identity of the model that vLLM's `model_config` describes; of its text model, where it has images."""
    architecture = (model_config.architectures or ["unknown"])[0]
    return ModelIdentity.of(model_config.hf_text_config, architecture)
