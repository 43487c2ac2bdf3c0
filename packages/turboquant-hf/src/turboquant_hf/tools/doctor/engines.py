"""How each engine serves every layer with a preset, and why."""

from dataclasses import dataclass
from typing import Literal

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.ops.decode_attention.paths import FASTEST_FIRST
from turboquant_core.vllm_limits import (
    BLOCK_SIZE_MULTIPLE,
    FLASH_HEAD_DIM,
    HEAD_DIMS,
    LARGER_HEADS_MAJOR,
    MIN_CAPABILITY,
)
from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.attention.dispatch import own_attention
from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.storage.pages import page_layout
from turboquant_hf.support import LayerAttention, LayerKind
from turboquant_hf.tools.doctor.attention import ModelAttention
from turboquant_hf.tools.doctor.checkpoint import Checkpoint
from turboquant_hf.tools.doctor.sizes import has_whole_bits

PathName = Literal["fused", "dequantised", "uncompressed"]

GGUF_REFUSAL = (
    "GGUF files need a plugin of vLLM's, which was not tried; give the folder or hub id of the same model in "
    "safetensors files"
)

_FRACTIONAL = "fractional bits, which the kernels do not read"

REFUSED_BY_VLLM: dict[LayerKind, str] = {
    "MLA": "multi-head latent attention caches latents instead of heads",
    "chunked attention": "chunked local attention is not served",
    "sparse attention": "attention to tokens that an indexer chooses is not served",
    "other": "a layer of a kind that is not known",
}
"""Kinds that vLLM's TurboQuant backend does not serve, each with the reason."""


@dataclass(frozen=True)
class LayerPath:
    """How an engine serves a layer.

    Attributes:
        path: "fused" attends on the codes; "dequantised" stores codes and attends on what they say, one layer at a
            time; "uncompressed" is the engine's own cache.
        reason: Why, or with which kernel.
    """

    path: PathName
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a model.

    Attributes:
        refusals: Why it does not serve the model from codes; empty if it does.
        layers: How it serves each layer; empty if it does not.
    """

    refusals: tuple[str, ...]
    layers: tuple[LayerPath, ...]

    @property
    def is_served(self) -> bool:
        """Whether any layer is compressed."""
        return not self.refusals


def by_transformers(
    config: PreTrainedConfig, attention: ModelAttention, preset: str, capability: tuple[int, int]
) -> Verdict:
    """How `TurboQuantCache` serves a model on cards of a compute capability."""
    try:
        cache = TurboQuantCache(config, preset)
    except ValueError as error:
        return Verdict((str(error),), ())
    fallback = own_attention(config)
    paths = []
    for layer in attention.layers:
        held = cache.layers[layer.index] if layer.index < len(cache.layers) else None
        if not isinstance(held, TurboQuantLayer):
            paths.append(_uncompressed(layer))
        else:
            try:
                stored = TurboQuantConfig.preset(preset, layer.head_dim, value_head_dim=layer.value_head_dim)
            except ValueError as error:
                return Verdict((f"layer {layer.index}: {error}",), ())
            if why := fallback or _no_kernel(stored):
                paths.append(LayerPath("dequantised", why))
            else:
                paths.append(LayerPath("fused", _kernel(page_layout(stored, layer.num_kv_heads), capability)))
    return Verdict((), tuple(paths))


def by_vllm(checkpoint: Checkpoint, attention: ModelAttention, preset: str, capability: tuple[int, int]) -> Verdict:
    """How turboquant-vllm serves a model on cards of a compute capability."""
    refusals = []
    if checkpoint.is_gguf:
        refusals.append(GGUF_REFUSAL)
    if capability < MIN_CAPABILITY:
        have, needed = ("sm_{}{}".format(*version) for version in (capability, MIN_CAPABILITY))
        refusals.append(f"the card is {have}, and prefill needs {needed}")
    if not has_whole_bits(preset):
        refusals.append(f"{preset} has {_FRACTIONAL}")
    if attention.has_alibi:
        refusals.append("ALiBi is not served")
    for layer, _ in attention.groups():
        if layer.kind in REFUSED_BY_VLLM:
            refusals.append(f"layer {layer.index}: {REFUSED_BY_VLLM[layer.kind]}")
        elif layer.has_heads and not layer.has_one_head_dim:
            refusals.append(
                f"layer {layer.index}: keys have {layer.head_dim} channels and values {layer.value_head_dim}; "
                "they must be equal"
            )
        elif layer.has_heads and layer.head_dim not in HEAD_DIMS:
            known = ", ".join(map(str, HEAD_DIMS))
            refusals.append(f"layer {layer.index}: head_dim is {layer.head_dim}; the backend takes {known}")
        elif layer.has_heads and layer.head_dim > FLASH_HEAD_DIM and capability[0] != LARGER_HEADS_MAJOR:
            refusals.append(
                f"layer {layer.index}: head_dim is {layer.head_dim}, and FlashAttention, which prefills, has it on "
                f"sm_{LARGER_HEADS_MAJOR}0 alone"
            )
    if not any(layer.has_heads for layer in attention.layers) and not refusals:
        refusals.append("the model has no attention layer to compress")
    if refusals:
        return Verdict(tuple(refusals), ())
    return Verdict((), tuple(_by_vllm(layer, preset, capability) for layer in attention.layers))


def _by_vllm(layer: LayerAttention, preset: str, capability: tuple[int, int]) -> LayerPath:
    if not layer.has_heads:
        return _uncompressed(layer)
    config = TurboQuantConfig.preset(preset, layer.head_dim)
    return LayerPath("fused", _kernel(KVCacheLayout(config, layer.num_kv_heads, BLOCK_SIZE_MULTIPLE), capability))


def _kernel(layout: KVCacheLayout, capability: tuple[int, int]) -> str:
    """The fastest kernel of a card, and what keeps it from a faster one."""
    reasons: list[str] = []
    for path in FASTEST_FIRST:
        obstacle = path.card_obstacle(layout, capability)
        if obstacle is None:
            return "; ".join([f"{path.name} kernel", *reasons])
        reasons.append(f"not {path.name}: {obstacle}")
    raise AssertionError("one path runs on every card")


def _no_kernel(config: TurboQuantConfig) -> str | None:
    """Why no kernel reads codes of a layer; None if one does."""
    if config.has_kernels:
        return None
    if config.value_head_dim is None:
        return _FRACTIONAL
    return f"keys of {config.head_dim} channels and values of {config.value_head_dim}, and the kernels take one size"


def _uncompressed(layer: LayerAttention) -> LayerPath:
    why = {
        "linear attention": "a state of fixed size",
        "shared KV": "reads the cache of an earlier layer",
        "no attention": "stores nothing",
        "sliding window": "bounded by its window",
        "chunked attention": "bounded by its chunk",
    }
    return LayerPath("uncompressed", why.get(layer.kind, f"{layer.kind} is left to the engine"))
