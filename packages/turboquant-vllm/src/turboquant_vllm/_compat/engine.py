"""The engine that is built or run: its configuration, its environment and its layers."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from vllm import envs
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase


def current_config() -> Any:
    """The configuration of the engine that is being built or run in this context, or None."""
    return get_current_vllm_config_or_none()


def use_config(config: Any) -> AbstractContextManager[Any]:
    """Have what is built in this context find the configuration of its engine."""
    return set_current_vllm_config(config)


def is_batch_invariant() -> bool:
    """Whether this process was asked for results that do not vary with the batch."""
    return bool(envs.VLLM_BATCH_INVARIANT)


def all_layers(config: Any) -> dict[str, Any]:
    """All layers of this process by name; vLLM adds them while it builds the model."""
    layers: dict[str, Any] = config.compilation_config.static_forward_context
    return layers


def attention_layers(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some layers that vLLM counts as attention, whatever they compute."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, AttentionLayerBase)}
