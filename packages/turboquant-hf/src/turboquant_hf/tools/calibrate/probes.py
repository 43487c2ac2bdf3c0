"""Attention functions that look at what passes through them."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from turboquant_core import TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.split import quantizer_of
from turboquant_hf._compat import AttentionInterface, AttentionMaskInterface, sdpa_mask
from turboquant_hf.attending import attending
from turboquant_hf.attention.dense import attention_logits, attention_weights, causal_mask, dense_attention
from turboquant_hf.tools.calibrate.sums import Sums
from turboquant_hf.tools.calibrate.watch import WatchedCache

NAME = "turboquant_calibration"
KEY_BITS = 3
"""Bits at which transforms are tried: those in the middle of the presets."""


@dataclass(frozen=True)
class KeptTokens:
    """Tokens that a cache keeps as they are.

    Attributes:
        first: Of a sequence.
        recent: Before a query, itself included.
    """

    first: int
    recent: int


@dataclass(frozen=True)
class Call:
    """One call of attention.

    Attributes:
        query: [1, num_heads, num_tokens, head_dim].
        keys: [1, num_kv_heads, any, head_dim], the last ones those of the call's own tokens.
        values: The same for values.
        mask: What `sdpa_mask` made.
        scaling: What logits are multiplied with; None is 1 / sqrt(head_dim).
        softcap: The bound of logits, or None.
        sinks: [num_heads], or None.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    softcap: float | None
    sinks: torch.Tensor | None

    def queries_of(self, head: int) -> torch.Tensor:
        """The queries that read a KV head, [group, num_tokens, head_dim]."""
        return self.query[0, self._group(head)]

    def weights_of(
        self, head: int, read: torch.Tensor | None = None, is_read: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What they weigh its keys with, float32 [group, num_tokens, any].

        Args:
            head: The KV head.
            read: Keys [any, head_dim] in place of its own, or None.
            is_read: Which keys a query finds replaced, bool [num_tokens, any].
        """
        group, keys = self._group(head), self.keys[:, head, None]
        logits = attention_logits(self.query[:, group], keys, self.scaling, self.softcap)
        if read is not None and is_read is not None:
            replaced = attention_logits(self.query[:, group], read[None, None], self.scaling, self.softcap)
            logits = torch.where(is_read, replaced, logits)
        mask = self.mask
        if mask is None:
            mask = causal_mask(self.query.shape[2], self.keys.shape[2], self.query.device)
        sinks = None if self.sinks is None else self.sinks[group]
        return attention_weights(logits, mask if mask.shape[1] == 1 else mask[:, group], sinks)[0]

    def _group(self, head: int) -> slice:
        size = self.query.shape[1] // self.keys.shape[1]
        return slice(head * size, (head + 1) * size)


class Probe(ABC):
    """Attends as transformers does, and looks at the layers whose keys a cache gave as they are.

    Args:
        cache: The cache that the model fills.
        kept: What the cache that is measured for would keep as it is.

    Attributes:
        num_before: Tokens before those of the next call.
    """

    def __init__(self, cache: WatchedCache, kept: KeptTokens) -> None:
        self.num_before = 0
        self._cache = cache
        self._kept = kept

    def at_work(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Have a model attend with it for a while."""
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        return attending(model, NAME)

    @abstractmethod
    def look(self, layer: int, call: Call, is_code: torch.Tensor) -> None:
        """Look at a call.

        Args:
            layer: The layer whose keys it reads, from whatever layer.
            call: The call.
            is_code: Which keys a query would read from codes, and not as they are; bool [num_tokens, any].
        """

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `turboquant_attention`."""
        layer = self._cache.layer_of(key)
        if layer is not None:
            call = Call(query, key, value, attention_mask, scaling, softcap, s_aux)
            query_at = self.num_before + torch.arange(query.shape[2], device=query.device)[:, None]
            key_at = query_at[-1] + 1 - key.shape[2] + torch.arange(key.shape[2], device=query.device)
            self.look(layer, call, (key_at >= self._kept.first) & (key_at <= query_at - self._kept.recent))
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": s_aux, **kwargs}
        return dense_attention(module, query, key, value, attention_mask, **options)


class PairProbe(Probe):
    """Adds up queries and keys by how much an error in their scores counts.

    With weights a, an independent error in the score of query i and key j moves the output o by a_ij (v_j - o_i): the
    pair counts with the square of that. Keys that a cache keeps as they are do not count.

    Args:
        cache: The cache that the model fills.
        kept: As for `Probe`.
        sums: Layer index to the sums.
    """

    def __init__(self, cache: WatchedCache, kept: KeptTokens, sums: Mapping[int, Sums]) -> None:
        super().__init__(cache, kept)
        self._sums = sums

    def look(self, layer: int, call: Call, is_code: torch.Tensor) -> None:
        """Add the pairs."""
        counts = []
        for head in range(call.keys.shape[1]):
            weights, values = call.weights_of(head), call.values[0, head].float()
            outputs = weights @ values
            distances = values.square().sum(-1) - 2 * outputs @ values.T + outputs.square().sum(-1, keepdim=True)
            counts.append((weights.square() * distances.clamp(min=0) * is_code).flatten(0, 1))
        queries = torch.stack([call.queries_of(head).flatten(0, 1) for head in range(len(counts))])
        self._sums[layer].add_pairs(queries, call.keys[0], torch.stack(counts))


class TransformProbe(Probe):
    """Tries transforms: attends once more with the call's own keys read back from the codes of each.

    Args:
        cache: The cache that the model fills.
        kept: As for `Probe`.
        tried: Layer index to transforms by name.
    """

    def __init__(self, cache: WatchedCache, kept: KeptTokens, tried: Mapping[int, Mapping[str, KeyTransform]]) -> None:
        super().__init__(cache, kept)
        self._tried = tried
        self._squares: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def look(self, layer: int, call: Call, is_code: torch.Tensor) -> None:
        """Add the squares of what the output changes by."""
        keys, num_new, squares = call.keys[0], call.query.shape[2], self._squares[layer]
        exact = [call.weights_of(head) @ values.float() for head, values in enumerate(call.values[0])]
        squares[""] += sum(map(_square, exact))
        for name, transform in self._tried[layer].items():
            new = keys[:, -num_new:].transpose(0, 1)
            back = read_back(new, transform.map(lambda part: part.to(keys.device))).transpose(0, 1).to(keys.dtype)
            read = torch.cat([keys[:, :-num_new], back], dim=1)
            for head, values in enumerate(call.values[0]):
                squares[name] += _square(call.weights_of(head, read[head], is_code) @ values.float() - exact[head])

    def errors(self, layer: int) -> dict[str, float]:
        """What each transform changes the outputs that read a layer by, as a share; nothing if none does."""
        squares = self._squares[layer]
        return {name: squares[name] / squares[""] for name in self._tried[layer] if squares[""] > 0}


def read_back(keys: torch.Tensor, transform: KeyTransform) -> torch.Tensor:
    """Keys [num_tokens, num_kv_heads, head_dim] as read from codes, split where a cache splits them."""
    config = TurboQuantConfig(keys.shape[-1], KEY_BITS).fitted_to(transform)
    quantizer = quantizer_of(config.key_format, config.key_scale)
    return transform.restored(quantizer.dequantize(quantizer.quantize(transform.of_keys(keys).float())))


def _square(x: torch.Tensor) -> float:
    return float(x.square().sum())
