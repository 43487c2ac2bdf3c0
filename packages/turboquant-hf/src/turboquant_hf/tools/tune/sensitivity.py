"""What it costs a model that one layer's keys or values alone have few bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from turboquant_core import grid_codebook
from turboquant_hf._compat import DynamicCache, with_cache
from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.caches import compressed_layers
from turboquant_hf.tools.tune.command import CHUNK_SIZE, WIDTHS
from turboquant_hf.tools.tune.results import Sensitivity

FINEST_BITS = max(WIDTHS)
GROUP = 4
"""Layers that share one pass of the uncompressed cache."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores of a token.

    Attributes:
        index: Layer index.
        num_kv_heads: KV heads.
        head_dim: Dimension of its keys and values.
    """

    index: int
    num_kv_heads: int
    head_dim: int

    @property
    def bit_nbytes(self) -> int:
        """Bytes of one bit for every coordinate of a token's keys."""
        return self.num_kv_heads * self.head_dim // 8


def costs(measured: Mapping[int, float], head_dim: int) -> dict[int, float]:
    """Bits to KL.

    For small errors KL is quadratic in them, so what was not measured goes with the codebook's squared error.

    Args:
        measured: KL of the bits that were measured.
        head_dim: Dimension of the keys or values.
    """
    found = {}
    for bits in WIDTHS:
        nearest = min(measured, key=lambda other: abs(other - bits))
        share = grid_codebook(head_dim, bits).mse / grid_codebook(head_dim, nearest).mse
        found[bits] = max(measured[nearest], 0) * share
    return found


@torch.no_grad()
def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """The layers that `TurboQuantCache` compresses."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), **with_cache(cache))
    shapes = []
    for index in sorted(compressed_layers(model.config)):
        keys = cache.layers[index].keys
        shapes.append(LayerShape(index, keys.shape[1], keys.shape[3]))
    return shapes


def measure_sensitivity(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    layers: Sequence[int],
    bits: int,
    on_forward: Callable[[], None] = lambda: None,
) -> dict[int, Sensitivity]:
    """Measure some layers, each with every other layer uncompressed.

    Args:
        model: The model.
        input_ids: int64 [1, num_tokens], more than a chunk.
        layers: Their indices.
        bits: Bits of the keys, or of the values.
        on_forward: Called after each of `num_forwards` forward passes.
    """
    config = model.config
    compressed = compressed_layers(config)

    def alone(index: int, key_bits: int, value_bits: int) -> TurboQuantCache:
        return TurboQuantCache(config, skip_layers=compressed - {index}, layer_bits={index: (key_bits, value_bits)})

    candidates = {}
    for index in layers:
        candidates[f"keys {index}"] = alone(index, bits, FINEST_BITS)
        candidates[f"values {index}"] = alone(index, FINEST_BITS, bits)
    scores = score_caches(
        model, input_ids, DynamicCache(config=config), candidates, chunk_size=CHUNK_SIZE, on_forward=on_forward
    )
    return {index: Sensitivity(scores[f"keys {index}"].mean_kl, scores[f"values {index}"].mean_kl) for index in layers}


def num_forwards(num_tokens: int, num_caches: int) -> int:
    """Forward passes over a text with the uncompressed cache and some others."""
    return -(-num_tokens // CHUNK_SIZE) * (num_caches + 1)
