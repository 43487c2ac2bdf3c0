"""Which layers a cache for a model has, and how each stores its tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core._checks import check_int
from turboquant_core.calibration import read_calibration
from turboquant_core.key_transform import KeyTransform
from turboquant_core.layer_bits import read_layer_bits
from turboquant_core.model_identity import ModelIdentity, architecture_of
from turboquant_core.vector_format import OUTLIER_BITS
from turboquant_hf._compat import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    PreTrainedConfig,
    StaticLayer,
    StaticSlidingWindowLayer,
    masks_windows,
)
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.hybrid import TurboQuantHybridLayer, TurboQuantHybridSlidingLayer
from turboquant_hf.layers.indexed import TurboQuantIndexedLayer
from turboquant_hf.layers.single import layer_index, of_layers
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer
from turboquant_hf.layers.static import StaticWindowLayer, TurboQuantStaticLayer, TurboQuantStaticSlidingLayer
from turboquant_hf.support import LayerAttention, held_layers, layer_attention

# benchmarks/eval_cache_options.py --kept says what they and others give.
DEFAULT_SINK_TOKENS = 1
DEFAULT_RECENT_TOKENS = 8
# At 8 KV heads of 128 in 16 bits these take 4 GiB of every layer.
MAX_KEPT_TOKENS = 2**20

COMPRESSED_KINDS = (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    StaticLayer,
    StaticWindowLayer,
)
"""Layers of transformers in whose place a compressed one comes."""


def build_layers(
    config: PreTrainedConfig,
    preset: str,
    *,
    max_length: int | None,
    skip_layers: Iterable[int],
    layer_bits: Mapping[int, tuple[float, float]] | str | PathLike[str],
    key_transforms: Mapping[int, KeyTransform] | str | PathLike[str],
    sink_tokens: int | None,
    recent_tokens: int | None,
    codes: Mapping[str, Any],
) -> list[object]:
    """A compressed layer for every attention layer, and transformers' own for the rest; see `TurboQuantCache`.

    Raises:
        TypeError: If `config` is no model configuration.
        ValueError: If options or model do not fit, or a file is damaged or of another model.
        FileNotFoundError: If there is no such file.
    """
    if max_length is not None:
        max_length = check_int("max_length", max_length, 1, remedy="It is the most tokens of a sequence.")
    if not isinstance(skip_layers, Iterable):
        raise ValueError(f"skip_layers is {skip_layers!r}; write the indices of layers, such as [0, -1]")
    layers = held_layers(config, max_length)
    if max_length is not None and not any(type(layer) in COMPRESSED_KINDS for layer in layers):
        layers = _windows_of_whole_length(layers, config, max_length)
    skipped = {layer_index(index, len(layers), "skip_layers") for index in skip_layers}
    compressed = {index for index, layer in enumerate(layers) if type(layer) in COMPRESSED_KINDS}
    text_config, attention = config.get_text_config(decoder=True), layer_attention(config)
    architecture = architecture_of(config)

    def bits_of(path: str | PathLike[str]) -> Callable[[int], tuple[float, float]]:
        return read_layer_bits(path, ModelIdentity.of(text_config, architecture)).of_layer

    def transforms_of(path: str | PathLike[str]) -> Callable[[int], KeyTransform]:
        calibration = read_calibration(path, ModelIdentity.of(text_config, architecture))

        def of_layer(index: int) -> KeyTransform:
            held = attention[index]
            transform = calibration.of_layer(
                index, held.num_kv_heads, held.head_dim, codes_only=kept["sink_tokens"] == 0
            )
            # The prompt's own mean is nearer to its keys.
            return transform.without_mean()

        return of_layer

    kept = kept_tokens(sink_tokens, recent_tokens)
    given_to = partial(of_layers, layers=layers, compressed=compressed, skipped=skipped)
    bits = given_to("layer_bits", layer_bits, bits_of, example="(key_bits, value_bits)", command="tune")
    transforms = given_to(
        "key_transforms", key_transforms, transforms_of, example="KeyTransform(...)", command="calibrate"
    )
    built: list[object] = []
    for index, layer in enumerate(layers):
        options = {name: value for name, value in codes.items() if value is not None}
        if index in bits:
            options |= _bits_options(index, bits[index])
        # A preset or bits that do not exist are found here, not at the first token.
        held = attention[index]
        layer_config = TurboQuantConfig.preset(preset, held.head_dim, value_head_dim=held.value_head_dim, **options)
        if index in transforms:
            _check_transform(transforms[index], held, layer_config, codes["center_keys"])
            # The layer's own: neither a change of the caller's tensors nor a layer that shares them reaches it.
            options["key_transform"] = transforms[index].map(torch.clone)
        built.append(
            layer
            if index in skipped
            else compressed_layer(layer, preset, {"text_config": text_config, **kept, **options})
        )
    if not any(isinstance(layer, TurboQuantLayer) for layer in built):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        left = f" that is not in skip_layers {sorted(skipped)}" if skipped else ""
        raise ValueError(
            f"this {config.model_type} model has no attention layer to compress{left} (its layers: {kinds}). Use "
            "DynamicCache for it."
        )
    return built


def _windows_of_whole_length(layers: list[object], config: PreTrainedConfig, max_length: int) -> list[object]:
    """Layers in which windows have room for all tokens: one mask serves all of them, so they are all as long."""
    if any(isinstance(layer, StaticSlidingWindowLayer) for layer in layers) and not masks_windows(config):
        raise ValueError(
            f"max_length={max_length} needs masks that know of the windows of this {config.model_type} model, and its "
            "masks do not. Leave max_length out: a cache that grows forgets what has left a window."
        )
    return [
        StaticWindowLayer(max_length, layer.max_cache_len) if isinstance(layer, StaticSlidingWindowLayer) else layer
        for layer in layers
    ]


def kept_tokens(sink_tokens: int | None, recent_tokens: int | None) -> dict[str, int]:
    """How many tokens a layer keeps as they are; None is the default.

    Raises:
        ValueError: If a number is none of tokens.
    """
    kept = {}
    for name, given, default in (
        ("sink_tokens", sink_tokens, DEFAULT_SINK_TOKENS),
        ("recent_tokens", recent_tokens, DEFAULT_RECENT_TOKENS),
    ):
        remedy = "It is a number of tokens that there is room for from the first one on; 0 keeps none."
        kept[name] = default if given is None else check_int(name, given, 0, MAX_KEPT_TOKENS, remedy)
    return kept


def compressed_layer(layer: Any, preset: str, options: Mapping[str, Any]) -> Any:
    """The compressed layer that takes the place of a layer of transformers, or that layer.

    Args:
        layer: A layer of transformers.
        preset: As for `TurboQuantLayer`.
        options: Its other options.
    """
    if type(layer) is DynamicLayer:
        return TurboQuantLayer(preset, **options)
    if type(layer) is DynamicIndexedLayer:
        return TurboQuantIndexedLayer(preset, **options)
    if type(layer) is DynamicSlidingWindowLayer:
        return TurboQuantSlidingLayer(layer.sliding_window, preset, **options)
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return TurboQuantHybridLayer(preset, number_of_states=layer.number_of_states, **options)
    if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
        states = layer.number_of_states
        return TurboQuantHybridSlidingLayer(layer.sliding_window, preset, number_of_states=states, **options)
    if type(layer) is StaticWindowLayer:
        return TurboQuantStaticSlidingLayer(layer.max_cache_len, layer.sliding_window, preset, **options)
    if type(layer) is StaticLayer:
        return TurboQuantStaticLayer(layer.max_cache_len, preset, **options)
    return layer


def _bits_options(index: int, pair: object) -> dict[str, float]:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise ValueError(f"layer_bits of layer {index} are {pair!r}; write (key_bits, value_bits)")
    return {"key_bits": pair[0], "value_bits": pair[1]}


def _check_transform(
    transform: object, attention: LayerAttention, config: TurboQuantConfig, center_keys: bool | None
) -> None:
    """Refuse what cannot be the transform of a layer's keys; center_keys as the user gave it."""
    name = f"key_transforms of layer {attention.index}"
    if not isinstance(transform, KeyTransform):
        raise ValueError(f"{name} is a {type(transform).__name__}; write a turboquant_core.KeyTransform")
    try:
        transform.check(attention.num_kv_heads, attention.head_dim)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if config.key_bits in OUTLIER_BITS:
        raise ValueError(
            f"{name} is given, and key_bits are {config.key_bits}: fractional bits choose channels by the first keys "
            "instead. Give whole key_bits, or leave key_transforms out."
        )
    if transform.mean is not None and center_keys is False:
        raise ValueError(
            f"{name} has a mean, and center_keys is False. Leave center_keys out, or give transform.without_mean()."
        )
