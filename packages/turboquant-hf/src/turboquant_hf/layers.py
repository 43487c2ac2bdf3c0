"""Which layers a cache for a model has, and how each stores its tokens."""

from collections.abc import Iterable, Mapping
from typing import Any

from turboquant_core import TurboQuantConfig
from turboquant_hf._compat import DynamicLayer, DynamicSlidingWindowLayer, PreTrainedConfig, StaticLayer
from turboquant_hf.layer import TurboQuantLayer
from turboquant_hf.sliding import TurboQuantSlidingLayer
from turboquant_hf.static import TurboQuantStaticLayer
from turboquant_hf.support import held_layers, text_head_dim


def build_layers(
    config: PreTrainedConfig,
    preset: str,
    *,
    max_length: int | None,
    skip_layers: Iterable[int],
    layer_bits: Mapping[int, tuple[float, float]],
    overrides: dict[str, Any],
) -> list[object]:
    """A compressed layer for every attention layer, and transformers' own for the rest; see `TurboQuantCache`.

    Raises:
        TypeError: If `config` is no model configuration.
        ValueError: If options or model do not fit.
    """
    layers = held_layers(config, max_length)
    skipped = {_index(index, len(layers), "skip_layers") for index in skip_layers}
    bits = {_index(index, len(layers), "layer_bits"): pair for index, pair in layer_bits.items()}
    text_config, head_dim = config.get_text_config(decoder=True), text_head_dim(config)
    built: list[object] = []
    for index, layer in enumerate(layers):
        options = overrides
        if index in bits:
            key_bits, value_bits = bits[index]
            options = {**overrides, "key_bits": key_bits, "value_bits": value_bits}
        # A preset or bits that do not exist are found here, not at the first token.
        TurboQuantConfig.preset(preset, head_dim, **options)
        built.append(
            layer if index in skipped else compressed_layer(layer, preset, {"text_config": text_config, **options})
        )
    if not any(isinstance(layer, TurboQuantLayer) for layer in built):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        left = f" that is not in skip_layers {sorted(skipped)}" if skipped else ""
        raise ValueError(
            f"this {config.model_type} model has no attention layer to compress{left} (its layers: {kinds}). Use "
            "DynamicCache for it."
        )
    return built


def compressed_layer(layer: Any, preset: str, options: dict[str, Any]) -> Any:
    """The compressed layer that takes the place of a layer of transformers, or that layer."""
    if type(layer) is DynamicLayer:
        return TurboQuantLayer(preset, **options)
    if type(layer) is DynamicSlidingWindowLayer:
        return TurboQuantSlidingLayer(layer.sliding_window, preset, **options)
    if type(layer) is StaticLayer:
        return TurboQuantStaticLayer(layer.max_cache_len, preset, **options)
    return layer


def _index(index: int, num_layers: int, option: str) -> int:
    """A layer's index from zero; negative ones count from the last."""
    if not -num_layers <= index < num_layers:
        raise ValueError(f"{option} names layer {index}; this model has {num_layers} layers with a cache")
    return index % num_layers
