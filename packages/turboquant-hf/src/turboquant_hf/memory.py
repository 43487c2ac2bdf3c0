"""How much memory a cache takes, measured from its storage."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import torch

from turboquant_core.quantized import storage_nbytes
from turboquant_hf.layers.growing import TurboQuantLayer

UNCOMPRESSED_ITEMSIZE = 2

_COLUMNS = ("layer", "kind", "tokens", "codes and scales", "kept", "reserved", "fixed", "bf16", "compression")


@dataclass(frozen=True)
class LayerMemory:
    """What one layer keeps.

    Attributes:
        index: Layer index.
        kind: "turboquant" with its bits, or the class of a layer that is left as it is.
        num_tokens: Tokens held, over all sequences.
        token_nbytes: Bytes of the tokens held: codes and scales, or native keys and values.
        kept_nbytes: Allocated bytes of sinks and recent tokens that are kept as they are beside their codes.
        reserved_nbytes: Bytes allocated for tokens to come.
        fixed_nbytes: Allocated bytes that do not grow with tokens: means, scales and orders of channels.
        bf16_nbytes: Bytes that the same keys and values take in bfloat16.
    """

    index: int
    kind: str
    num_tokens: int
    token_nbytes: int
    kept_nbytes: int
    reserved_nbytes: int
    fixed_nbytes: int
    bf16_nbytes: int

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self.token_nbytes + self.kept_nbytes + self.reserved_nbytes + self.fixed_nbytes

    @property
    def compression(self) -> float:
        """bfloat16 bytes over allocated bytes; nan when nothing is held."""
        return _ratio(self.bf16_nbytes, self.nbytes)


@dataclass(frozen=True)
class MemoryReport:
    """Memory of every layer; prints as a table, in a notebook too."""

    layers: tuple[LayerMemory, ...]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of the whole cache."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bf16_nbytes(self) -> int:
        """Bytes of the same keys and values in bfloat16."""
        return sum(layer.bf16_nbytes for layer in self.layers)

    @property
    def compression(self) -> float:
        """bfloat16 bytes over allocated bytes; nan when the cache is empty."""
        return _ratio(self.bf16_nbytes, self.nbytes)

    @property
    def bytes_per_token(self) -> float:
        """Allocated bytes for each token held, over all layers; nan when the cache is empty."""
        return _ratio(self.nbytes, max((layer.num_tokens for layer in self.layers), default=0))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = {
            "nbytes": self.nbytes,
            "bf16_nbytes": self.bf16_nbytes,
            "layers": [asdict(layer) for layer in self.layers],
        }
        if self.nbytes:  # JSON has no nan
            data |= {"compression": self.compression, "bytes_per_token": self.bytes_per_token}
        return data

    def __str__(self) -> str:
        rows = [
            _COLUMNS,
            *map(_row, self.layers),
            ("all", "", "", f"{self.nbytes:,}", "", "", "", f"{self.bf16_nbytes:,}", _times(self.compression)),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["KV cache, allocated bytes"]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[1] = cells[1].strip().ljust(widths[1])
            lines.append("  ".join(cells))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def memory_report(layers: Sequence[object]) -> MemoryReport:
    """Measure the layers of any transformers cache."""
    return MemoryReport(tuple(_measure(index, layer) for index, layer in enumerate(layers)))


def layer_tensors(layer: object) -> list[torch.Tensor]:
    """Every tensor that a layer keeps."""
    if isinstance(layer, TurboQuantLayer):
        return layer.tensors()
    return list(_find_tensors(vars(layer).values()))


def _find_tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _find_tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _find_tensors(value)


def _measure(index: int, layer: object) -> LayerMemory:
    allocated = storage_nbytes(layer_tensors(layer))
    if not isinstance(layer, TurboQuantLayer):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        held = [states for states in (keys, values) if states is not None and states.ndim == 4]
        return LayerMemory(
            index=index,
            kind=type(layer).__name__,
            num_tokens=held[0].shape[0] * held[0].shape[2] if held else 0,
            token_nbytes=allocated,
            kept_nbytes=0,
            reserved_nbytes=0,
            fixed_nbytes=0,
            bf16_nbytes=UNCOMPRESSED_ITEMSIZE * sum(states.numel() for states in held),
        )
    if not layer.is_initialized:
        return LayerMemory(index, "turboquant, empty", 0, 0, 0, 0, 0, 0)
    config = layer.config
    store, pages, full_precision = layer.store, layer.store.pages, layer.store.full_precision
    num_tokens = store.batch_size * store.num_tokens
    kept_nbytes = 0 if full_precision is None else storage_nbytes(full_precision.tensors())
    return LayerMemory(
        index=index,
        kind=f"turboquant {config.key_bits}/{config.value_bits} bits{', keys split' if config.key_split else ''}",
        num_tokens=num_tokens,
        token_nbytes=store.used_nbytes,
        kept_nbytes=kept_nbytes,
        reserved_nbytes=pages.nbytes - store.used_nbytes,
        fixed_nbytes=allocated - pages.nbytes - kept_nbytes,
        bf16_nbytes=UNCOMPRESSED_ITEMSIZE * num_tokens * store.num_kv_heads * sum(config.head_dims),
    )


def _row(layer: LayerMemory) -> tuple[str, ...]:
    sizes = (layer.token_nbytes, layer.kept_nbytes, layer.reserved_nbytes, layer.fixed_nbytes, layer.bf16_nbytes)
    counts = (f"{count:,}" for count in (layer.num_tokens, *sizes))
    return str(layer.index), layer.kind, *counts, _times(layer.compression)


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}x"
