"""Attention functions that look at what passes through them."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from turboquant_core import MSEQuantizer, TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_hf._compat import AttentionInterface, AttentionMaskInterface, sdpa_mask
from turboquant_hf.attending import attending
from turboquant_hf.attention.dense import dense_attention
from turboquant_hf.tools.calibrate.sums import Sums
from turboquant_hf.tools.calibrate.watch import WatchedCache

NAME = "turboquant_calibration"
KEY_BITS = 3
"""Bits at which transforms are tried: those in the middle of the presets."""

Attention = Callable[[torch.Tensor], torch.Tensor]
"""A call's attention with these keys for its own: [batch_size, num_tokens, num_heads, head_dim]."""


class Probe(ABC):
    """Attends as transformers does, and looks at the layers whose keys a cache gave as they are.

    Args:
        cache: The cache that the model fills.
    """

    def __init__(self, cache: WatchedCache) -> None:
        self._cache = cache

    def at_work(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Have a model attend with it for a while."""
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        return attending(model, NAME)

    @abstractmethod
    def look(self, layer: int, query: torch.Tensor, keys: torch.Tensor, attention: Attention) -> None:
        """Look at a call.

        Args:
            layer: The layer whose keys are read, by whatever layer.
            query: [1, num_heads, num_tokens, head_dim].
            keys: [1, num_kv_heads, any, head_dim], the last ones those of the call's own tokens.
            attention: What attends.
        """

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `turboquant_attention`."""

        def attention(keys: torch.Tensor) -> torch.Tensor:
            output, _ = dense_attention(
                module, query, keys, value, attention_mask, dropout, scaling, softcap=softcap, sinks=s_aux, **kwargs
            )
            return output

        layer = self._cache.layer_of(key)
        if layer is not None:
            self.look(layer, query, key, attention)
        return attention(key), None


class QueryProbe(Probe):
    """Adds up the queries that read each layer.

    Args:
        cache: The cache that the model fills.
        sums: Layer index to the sums.

    Attributes:
        skipped: First tokens of the next call that do not count.
    """

    def __init__(self, cache: WatchedCache, sums: Mapping[int, Sums]) -> None:
        super().__init__(cache)
        self.skipped = 0
        self._sums = sums

    def look(self, layer: int, query: torch.Tensor, keys: torch.Tensor, attention: Attention) -> None:
        """Add the queries."""
        counted = query[0, :, self.skipped :]
        self._sums[layer].add_queries(counted.reshape(keys.shape[1], -1, query.shape[-1]))


class TransformProbe(Probe):
    """Tries transforms: attends once more with the call's own keys read back from the codes of each.

    Args:
        cache: The cache that the model fills.
        tried: Layer index to transforms by name.
    """

    def __init__(self, cache: WatchedCache, tried: Mapping[int, Mapping[str, KeyTransform]]) -> None:
        super().__init__(cache)
        self._tried = tried
        self._squares: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def look(self, layer: int, query: torch.Tensor, keys: torch.Tensor, attention: Attention) -> None:
        """Add the squares of what the output changes by."""
        exact, num_new = attention(keys), query.shape[2]
        squares = self._squares[layer]
        squares[""] += _square(exact)
        before, new = keys[:, :, :-num_new], keys[:, :, -num_new:]
        for name, transform in self._tried[layer].items():
            read = read_back(new[0].transpose(0, 1), transform.map(lambda part: part.to(keys.device)))
            changed = attention(torch.cat([before, read.transpose(0, 1)[None].to(keys.dtype)], dim=2))
            squares[name] += _square(changed - exact)

    def errors(self, layer: int) -> dict[str, float]:
        """What each transform changes the outputs that read a layer by, as a share; nothing if none does."""
        squares = self._squares[layer]
        return {name: squares[name] / squares[""] for name in self._tried[layer] if squares[""] > 0}


def read_back(keys: torch.Tensor, transform: KeyTransform) -> torch.Tensor:
    """Keys [num_tokens, num_kv_heads, head_dim] as read from codes; with an order, from halves of unequal bits."""
    stored, rule = transform.of_keys(keys).float(), TurboQuantConfig(keys.shape[-1]).key_scale
    parts = [(stored, KEY_BITS)]
    if transform.order is not None:
        parts = list(zip(stored.chunk(2, dim=-1), (KEY_BITS + 1, KEY_BITS - 1), strict=True))
    read = []
    for part, bits in parts:
        quantizer = MSEQuantizer(part.shape[-1], bits, rule)
        read.append(quantizer.dequantize(quantizer.quantize(part)))
    return transform.restored(torch.cat(read, dim=-1))


def _square(x: torch.Tensor) -> float:
    return float(x.float().square().sum())
