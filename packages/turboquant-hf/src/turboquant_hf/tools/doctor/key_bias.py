"""Key biases: where they are large, plain 4-bit keys ruin a model, and centred ones do not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from turboquant_core import grid_codebook
from turboquant_hf.support import LayerAttention
from turboquant_hf.tools.doctor.attention import ModelAttention
from turboquant_hf.tools.doctor.checkpoint import Checkpoint

PLAIN_BITS = 4
# Qwen2.5-Coder-1.5B, which plain 4 bits ruin, has 7.8 in its first layer and below 0.2 in most.
ALARM = 0.5

# Towers of other inputs number their layers too.
_TOWER = re.compile(r"vision|visual|image|audio|speech", re.IGNORECASE)
_KEY_BIAS = re.compile(
    r"(?:^|\.)(?:layers|blk|h)\.(\d+)\.(?:.*\.)?(k_proj|attn_k|qkv_proj|c_attn|attn_qkv|query_key_value)\.bias$"
)
_KEYS_ALONE = ("k_proj", "attn_k")


@dataclass(frozen=True)
class KeyBias:
    """The key bias of one layer.

    Attributes:
        layer: Layer index.
        largest: Largest absolute value.
        logit_error: What 4-bit codes of uncentred keys add to a logit for the bias alone, in nats, as a standard
            deviation in the worst head: the bias's root mean square times the root of the codebook's distortion, for a
            query whose coordinates have root mean square 1.
    """

    layer: int
    largest: float
    logit_error: float

    @property
    def is_alarming(self) -> bool:
        """Whether plain 4-bit keys of this layer are likely to ruin the model."""
        return self.logit_error > ALARM


def key_biases(checkpoint: Checkpoint, attention: ModelAttention) -> list[KeyBias]:
    """The key biases of all layers that have one, read from the files.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a bias is not stored as floating-point numbers, is not finite, or of another size than the
            configuration's.
    """
    return sorted(_found(checkpoint, attention), key=lambda bias: bias.layer)


def _found(checkpoint: Checkpoint, attention: ModelAttention) -> Iterator[KeyBias]:
    for name, tensor in (checkpoint.tensors or {}).items():
        match = _KEY_BIAS.search(name)
        if match is None or _TOWER.search(name) or int(match[1]) >= len(attention.layers):
            continue
        layer = attention.layers[int(match[1])]
        keys = _keys_of(tensor.load(), match[2], layer, attention.model_type, name)
        if not keys.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite: the file is damaged, or the model is")
        distortion = grid_codebook(layer.head_dim, PLAIN_BITS).mse
        # The square of what a file may hold does not fit into float32.
        worst = float(keys.double().square().mean(1).max())
        yield KeyBias(layer.index, float(keys.abs().max()), (worst * distortion) ** 0.5)


def _keys_of(bias: torch.Tensor, projection: str, layer: LayerAttention, model_type: str, name: str) -> torch.Tensor:
    """The keys' part of a bias, [num_kv_heads, head_dim]."""
    kv_heads = layer.num_kv_heads
    # A bias has equal parts; in each lie heads of queries, then of keys, then of values.
    if projection in _KEYS_ALONE:
        parts, queries, keys, values = 1, 0, kv_heads, 0
    elif projection == "query_key_value" or model_type == "gpt_bigcode":
        # GPT-NeoX, BLOOM, Persimmon, Falcon and GPTBigCode: a part for each KV head.
        parts, queries, keys, values = kv_heads, layer.num_heads // kv_heads, 1, 1
    else:
        parts, queries, keys, values = 1, layer.num_heads, kv_heads, kv_heads
    heads = queries + keys + values
    if bias.numel() != parts * heads * layer.head_dim:
        raise ValueError(
            f"{name} has {bias.numel()} numbers, and {parts * heads} heads of {layer.head_dim} have "
            f"{parts * heads * layer.head_dim}: it does not belong to this configuration"
        )
    return bias.view(parts, heads, layer.head_dim)[:, queries : queries + keys].flatten(0, 1)
