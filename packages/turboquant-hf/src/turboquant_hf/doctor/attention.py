"""How every layer of a model attends, from its configuration."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from turboquant_hf._compat import (
    EMPTY_LAYERS,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    PreTrainedConfig,
    transformers_layers,
)
from turboquant_hf.support import check_architecture, text_head_dim

LayerKind = Literal[
    "full attention",
    "sliding window",
    "chunked attention",
    "linear attention",
    "shared KV",
    "no attention",
    "MLA",
    "other",
]
GROWING_KINDS: tuple[LayerKind, ...] = ("full attention", "MLA")
"""Kinds whose cache grows with every token."""


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends.

    Attributes:
        index: Layer index.
        kind: What its cache is like; "shared KV" layers read another layer's.
        head_dim: Dimension of a key.
        value_dim: Dimension of a value.
        num_kv_heads: Key and value heads.
        window: Tokens that a token sees, itself included; None for all.
    """

    index: int
    kind: LayerKind
    head_dim: int
    value_dim: int
    num_kv_heads: int
    window: int | None = None

    @property
    def has_heads(self) -> bool:
        """Whether keys and values of heads are stored."""
        return self.kind in ("full attention", "sliding window", "chunked attention")

    def describe(self) -> str:
        """The kind, with its window."""
        return self.kind if self.window is None else f"{self.kind} of {self.window:,}"


@dataclass(frozen=True)
class ModelAttention:
    """How a model attends.

    Attributes:
        model_type: Model type of the text model.
        layers: Every layer.
        num_heads: Query heads of a layer.
        softcap: Logits become softcap * tanh(logits / softcap); None where they stay.
        has_sinks: Whether heads have a learned sink.
        has_alibi: Whether positions are biases on logits.
        kv_lora_rank: Width of MLA's latents; None without MLA.
        rope_dim: Width of the key that MLA stores beside a latent.
        max_length: Longest context; None where the configuration does not tell.
    """

    model_type: str
    layers: tuple[LayerAttention, ...]
    num_heads: int
    softcap: float | None
    has_sinks: bool
    has_alibi: bool
    kv_lora_rank: int | None
    rope_dim: int
    max_length: int | None

    def groups(self) -> list[tuple[LayerAttention, int]]:
        """One layer of each sort, and how many there are, in the order of the model."""
        firsts: dict[tuple[Any, ...], LayerAttention] = {}
        counts = Counter(_sort(layer) for layer in self.layers)
        for layer in self.layers:
            firsts.setdefault(_sort(layer), layer)
        return [(layer, counts[key]) for key, layer in firsts.items()]


def _sort(layer: LayerAttention) -> tuple[Any, ...]:
    return layer.kind, layer.head_dim, layer.value_dim, layer.num_kv_heads, layer.window


def model_attention(config: PreTrainedConfig, tensor_names: Iterable[str] = ()) -> ModelAttention:
    """Read a configuration; names of tensors tell what it does not, such as sinks.

    Raises:
        ValueError: If the model is no decoder with attention layers.
    """
    text = config.get_text_config(decoder=True)
    kv_lora_rank = getattr(text, "kv_lora_rank", None) or None
    if kv_lora_rank is None:
        check_architecture(config)
    text_head_dim(config)
    return ModelAttention(
        model_type=text.model_type,
        layers=tuple(_layers(config)),
        num_heads=text.num_attention_heads,
        softcap=getattr(text, "attn_logit_softcapping", None) or None,
        has_sinks=text.model_type == "gpt_oss" or any("sink" in name.rsplit(".", 1)[-1] for name in tensor_names),
        has_alibi=bool(getattr(text, "alibi", False)) or text.model_type == "bloom",
        kv_lora_rank=kv_lora_rank,
        rope_dim=getattr(text, "qk_rope_head_dim", None) or 0,
        max_length=getattr(text, "max_position_embeddings", None),
    )


def _layers(config: PreTrainedConfig) -> Iterator[LayerAttention]:
    text = config.get_text_config(decoder=True)
    caches = transformers_layers(config, None)
    kinds = getattr(text, "layer_types", None)
    for index, layer_config in enumerate(text.per_layer_config):
        # Layers that share another's cache come last, and before transformers 5.23 or so they are not in the list.
        cache = caches[index] if index < len(caches) else None
        named = kinds[index] if kinds else None
        is_chunked = named == "chunked_attention" or (not kinds and bool(getattr(text, "attention_chunk_size", None)))
        head_dim = getattr(layer_config, "head_dim", None) or text_head_dim(config)
        yield LayerAttention(
            index=index,
            kind="MLA" if getattr(text, "kv_lora_rank", None) else _kind(cache, named, is_chunked),
            head_dim=head_dim,
            value_dim=getattr(layer_config, "v_head_dim", None) or head_dim,
            num_kv_heads=_num_kv_heads(layer_config),
            window=cache.sliding_window if isinstance(cache, DynamicSlidingWindowLayer) else None,
        )


def _num_kv_heads(layer_config: PreTrainedConfig) -> int:
    # Falcon and GPTBigCode say it in other words.
    if getattr(layer_config, "multi_query", False) and not getattr(layer_config, "new_decoder_architecture", False):
        return 1
    named = (getattr(layer_config, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
    return next((count for count in named if count), layer_config.num_attention_heads)


def _kind(cache: object, named: str | None, is_chunked: bool) -> LayerKind:
    if named in ("moe", "mlp"):
        return "no attention"
    if cache is None or type(cache) in EMPTY_LAYERS:
        return "shared KV"
    if type(cache) is DynamicSlidingWindowLayer:
        return "chunked attention" if is_chunked else "sliding window"
    if type(cache) is DynamicLayer:
        return "full attention"
    return "linear attention" if type(cache) is LinearAttentionLayer else "other"
