"""How every layer of a model attends, and which models the cache can hold, found out before anything runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from turboquant_hf._compat import (
    EMPTY_LAYERS,
    ENCODER_MODEL_TYPES,
    HYBRID_LAYERS,
    KNOWN_LAYERS,
    KV_HEADS_DOUBLED_IN_WINDOWS,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    PreTrainedConfig,
    StaticIndexedLayer,
    takes_dynamic_cache,
    transformers_layers,
)
from turboquant_hf.layers.cross import CrossAttentionLayer

LayerKind = Literal[
    "full attention",
    "sliding window",
    "chunked attention",
    "sparse attention",
    "linear attention",
    "linear and full attention",
    "linear attention and a window",
    "cross-attention",
    "shared KV",
    "no attention",
    "MLA",
    "other",
]
WITH_HEADS: tuple[LayerKind, ...] = (
    "full attention",
    "sliding window",
    "chunked attention",
    "sparse attention",
    "linear and full attention",
    "linear attention and a window",
)
"""Kinds that store keys and values of heads for the tokens of the text."""
REMEDY = "Use DynamicCache for it."


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends.

    With multi-head latent attention (MLA) what is stored is one latent, in the place of a key, and the part of the key
    that is rotated by positions, in the place of a value.

    Attributes:
        index: Layer index.
        kind: What its cache is like; "shared KV" layers read another layer's.
        head_dim: Dimension of a stored key.
        value_head_dim: Dimension of a stored value.
        num_heads: Query heads.
        num_kv_heads: Stored key and value heads.
        window: Tokens that a token sees, itself included; None for all.
    """

    index: int
    kind: LayerKind
    head_dim: int
    value_head_dim: int
    num_heads: int
    num_kv_heads: int
    window: int | None = None

    @property
    def is_compressed(self) -> bool:
        """Whether `TurboQuantCache` stores what the tokens of the text leave."""
        return self.has_heads or self.kind == "MLA"

    @property
    def has_one_head_dim(self) -> bool:
        """Whether stored keys and values are of one size."""
        return self.head_dim == self.value_head_dim

    @property
    def has_heads(self) -> bool:
        """Whether keys and values of heads are stored."""
        return self.kind in WITH_HEADS

    @property
    def has_state(self) -> bool:
        """Whether there is a state of fixed size, alone or beside keys and values."""
        return self.kind.startswith("linear attention") or self.kind == "linear and full attention"

    def describe(self) -> str:
        """The kind, with its window."""
        return self.kind if self.window is None else f"{self.kind} of {self.window:,}"


def layer_attention(config: PreTrainedConfig) -> tuple[LayerAttention, ...]:
    """How every layer of a model attends. Sizes may differ between layers, so they are asked of each.

    Raises:
        ValueError: If the model is no decoder with attention layers, or the configuration does not tell a layer's size.
    """
    check_decoder(config)
    return tuple(_layers(config))


def held_layers(config: PreTrainedConfig, max_length: int | None) -> list[object]:
    """The layers of transformers' own cache for this model, `StaticCache` with a max_length.

    Raises:
        TypeError: If `config` is no model configuration.
        ValueError: If the model is no decoder, or has a layer of unknown kind.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config is {type(config).__name__}; pass the model's configuration, model.config")
    check_decoder(config)
    layers = transformers_layers(config, max_length)
    attention = tuple(_layers(config))
    for index, layer in enumerate(layers):
        if type(layer) not in KNOWN_LAYERS:
            remedy = "Leave max_length out." if type(layer) is StaticIndexedLayer else REMEDY
            raise ValueError(
                f"layer {index} of this {config.model_type} model is a {type(layer).__name__}, which TurboQuantCache "
                f"does not know. {remedy}"
            )
    for held in attention:
        if held.kind == "cross-attention":
            layers[held.index] = CrossAttentionLayer()
    return layers


def check_decoder(config: PreTrainedConfig) -> None:
    """Raise ValueError for encoders, encoder-decoders, and models that keep no such cache as `DynamicCache`."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise ValueError(
            f"this {config.model_type} model is an encoder-decoder; TurboQuantCache holds decoder-only models. {REMEDY}"
        )
    if text.model_type in ENCODER_MODEL_TYPES and not getattr(text, "is_decoder", False):
        raise ValueError(
            f"this {config.model_type} model is an encoder, which keeps no KV cache; TurboQuantCache holds "
            "decoder-only language models. Run it without a cache."
        )
    if getattr(text, "num_hidden_layers", None) is None:
        raise ValueError(
            f"the configuration of this {config.model_type} model names no num_hidden_layers; TurboQuantCache holds "
            f"models whose layers are all of one decoder. {REMEDY}"
        )
    if not takes_dynamic_cache(text):
        raise ValueError(
            f"this {config.model_type} model takes no DynamicCache, and so no TurboQuantCache in its place; "
            "TurboQuantCache holds decoder-only language models with attention layers. Run it without a cache of yours."
        )


def _layers(config: PreTrainedConfig) -> Iterator[LayerAttention]:
    text = config.get_text_config(decoder=True)
    caches = transformers_layers(config, None)
    kinds = getattr(text, "layer_types", None)
    crossing = getattr(text, "cross_attention_layers", None) or ()
    for index, layer in enumerate(text.per_layer_config):
        # Layers that share another's cache come last, and before transformers 5.23 or so they are not in the list.
        cache = caches[index] if index < len(caches) else None
        named = kinds[index] if kinds else None
        is_chunked = named == "chunked_attention" or (not kinds and bool(getattr(layer, "attention_chunk_size", None)))
        latent_dim = getattr(layer, "kv_lora_rank", None) or None
        kind = "cross-attention" if index in crossing else _kind(cache, named, is_chunked)
        if latent_dim is not None and kind in ("full attention", "sliding window", "sparse attention"):
            kind = "MLA"
        if not getattr(layer, "num_attention_heads", None):
            raise ValueError(
                f"this {config.model_type} model names no num_attention_heads; TurboQuantCache needs a model with "
                f"attention layers. {REMEDY}"
            )
        num_heads = _of_window(layer, kind, "num_attention_heads") or _num_heads(layer)
        head_dim = (
            _of_window(layer, kind, "head_dim")
            or getattr(layer, "head_dim", None)
            or layer.hidden_size // _num_heads(layer)
        )
        value_head_dim, num_kv_heads = getattr(layer, "v_head_dim", None) or head_dim, _num_kv_heads(layer, kind)
        if kind == "MLA":
            head_dim, value_head_dim, num_kv_heads = latent_dim, layer.qk_rope_head_dim, 1
        yield LayerAttention(
            index=index,
            kind=kind,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            window=cache.sliding_window if isinstance(cache, DynamicSlidingWindowLayer) else None,
        )


def _of_window(layer: PreTrainedConfig, kind: LayerKind, size: str) -> int | None:
    """A size that layers with a window have for themselves, as Inkling's do."""
    has_window = kind in ("sliding window", "linear attention and a window")
    return getattr(layer, f"swa_{size}", None) if has_window else None


def _num_heads(layer: PreTrainedConfig) -> int:
    return _decoder_heads(layer) or layer.num_attention_heads


def _decoder_heads(layer: PreTrainedConfig) -> int | None:
    """Heads of a decoder that comes with an encoder, as Whisper's does: the usual names are the encoder's."""
    return getattr(layer, "decoder_attention_heads", None)


def _num_kv_heads(layer: PreTrainedConfig, kind: LayerKind) -> int:
    if named := _of_window(layer, kind, "num_key_value_heads") or _decoder_heads(layer):
        return named
    # Falcon and GPTBigCode say it in other words.
    if getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False):
        return 1
    names = (getattr(layer, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
    count = next((count for count in names if count), _num_heads(layer))
    return 2 * count if kind == "sliding window" and layer.model_type in KV_HEADS_DOUBLED_IN_WINDOWS else count


def _kind(cache: Any, named: str | None, is_chunked: bool) -> LayerKind:
    if named in ("moe", "mlp"):
        return "no attention"
    if cache is None or type(cache) in EMPTY_LAYERS:
        return "shared KV"
    if type(cache) is DynamicSlidingWindowLayer:
        return "chunked attention" if is_chunked else "sliding window"
    if type(cache) in HYBRID_LAYERS:
        return "linear attention and a window" if cache.is_sliding else "linear and full attention"
    if type(cache) is DynamicLayer:
        return "full attention"
    if type(cache) is DynamicIndexedLayer:
        return "sparse attention"
    return "linear attention" if type(cache) is LinearAttentionLayer else "other"
