"""How much memory a cache takes, measured from its storage."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from itertools import groupby
from typing import Any

import torch

from turboquant_core.quantized import storage_nbytes
from turboquant_hf._compat import DynamicLayer
from turboquant_hf.layers.growing import TurboQuantLayer

UNCOMPRESSED_ITEMSIZE = 2
LONG_CONTEXT = 8192
"""Tokens of which a report tells the compression beside that of what is held."""

_COLUMNS = ("layer", "kind", "tokens", "codes and scales", "raw tokens", "room", "fixed", "bf16", "compression")


@dataclass(frozen=True)
class LayerMemory:
    """What one layer keeps.

    Attributes:
        index: Layer index.
        kind: "turboquant" with its bits, or the class of a layer that is left as it is.
        num_rows: Sequences held.
        num_tokens: Tokens held, over all sequences.
        token_nbytes: Bytes of the tokens held: codes and scales, or native keys and values.
        kept_nbytes: Allocated bytes of sinks and recent tokens that are kept as they are beside their codes.
        reserved_nbytes: Bytes allocated for tokens to come.
        fixed_nbytes: Allocated bytes of all else: means, scales and orders of channels, and the keys of an indexer.
        bf16_nbytes: Bytes that the same keys and values take in bfloat16.
        grows: Whether it holds tokens, and takes more bytes for every one that comes.
    """

    index: int
    kind: str
    num_rows: int
    num_tokens: int
    token_nbytes: int
    kept_nbytes: int
    reserved_nbytes: int
    fixed_nbytes: int
    bf16_nbytes: int
    grows: bool

    def at(self, num_tokens: int) -> tuple[int, int]:
        """Bytes of a prompt of so many tokens in every sequence, computed from those held, and of it in bfloat16."""
        count = self.num_rows * num_tokens
        of_tokens, of_bf16 = (nbytes * count // self.num_tokens for nbytes in (self.token_nbytes, self.bf16_nbytes))
        return of_tokens + self.kept_nbytes + self.fixed_nbytes, of_bf16

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
    """Memory of every layer; prints as one line, and `table()` as one for every kind of layer."""

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

    def compression_at(self, num_tokens: int) -> float:
        """What `compression` would be of a prompt of so many tokens in every sequence, computed from what is stored.

        nan where a layer holds no tokens, or does not grow with every token, as those with a window, a state or a
        `max_length`.
        """
        if not self.layers or not all(layer.grows for layer in self.layers):
            return math.nan
        allocated, bf16 = (sum(sizes) for sizes in zip(*(layer.at(num_tokens) for layer in self.layers), strict=True))
        return _ratio(bf16, allocated)

    def table(self) -> str:
        """Bytes of every layer; layers that are equal in a row of their own."""
        groups = groupby(self.layers, lambda layer: replace(layer, index=0))
        rows = [
            _COLUMNS,
            *(_row(list(group)) for _, group in groups),
            ("all", "", "", f"{self.nbytes:,}", "", "", "", f"{self.bf16_nbytes:,}", _times(self.compression)),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["Allocated bytes of every layer"]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[1] = cells[1].strip().ljust(widths[1])
            lines.append("  ".join(cells))
        return "\n".join(lines)

    def __str__(self) -> str:
        if not self.nbytes:
            return "KV cache: empty"
        parts = {
            "raw tokens": sum(layer.kept_nbytes for layer in self.layers),
            "room for tokens to come": sum(layer.reserved_nbytes for layer in self.layers),
        }
        named = " and ".join(f"{_amount(nbytes)} {name}" for name, nbytes in parts.items() if nbytes)
        line = f"KV cache: {_amount(self.nbytes)}" + (f", of which {named}" if named else "")
        line += f"; bf16 takes {_amount(self.bf16_nbytes)} ({_times(self.compression)})."
        later = self.compression_at(LONG_CONTEXT)
        return line if math.isnan(later) else f"{line} At {LONG_CONTEXT:,} tokens: {_times(later)}."

    def _repr_html_(self) -> str:
        text = f"{self}\n\n{self.table()}"
        return f"<pre>{escape(text)}</pre>"


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
            num_rows=held[0].shape[0] if held else 0,
            num_tokens=held[0].shape[0] * held[0].shape[2] if held else 0,
            token_nbytes=allocated,
            kept_nbytes=0,
            reserved_nbytes=0,
            fixed_nbytes=0,
            bf16_nbytes=UNCOMPRESSED_ITEMSIZE * sum(states.numel() for states in held),
            grows=bool(held) and type(layer) is DynamicLayer,
        )
    if not layer.is_initialized:
        return LayerMemory(index, "turboquant, empty", 0, 0, 0, 0, 0, 0, 0, False)
    config = layer.config
    store, pages, full_precision = layer.store, layer.store.pages, layer.store.full_precision
    num_tokens = store.batch_size * store.num_tokens
    kept_nbytes = 0 if full_precision is None else storage_nbytes(full_precision.tensors())
    return LayerMemory(
        index=index,
        kind=f"turboquant {config.key_bits}/{config.value_bits} bits{', keys split' if config.key_split else ''}",
        num_rows=store.batch_size,
        num_tokens=num_tokens,
        token_nbytes=store.used_nbytes,
        kept_nbytes=kept_nbytes,
        reserved_nbytes=pages.nbytes - store.used_nbytes,
        fixed_nbytes=allocated - pages.nbytes - kept_nbytes,
        bf16_nbytes=UNCOMPRESSED_ITEMSIZE * num_tokens * store.num_kv_heads * sum(config.head_dims),
        grows=type(layer) is TurboQuantLayer and num_tokens > 0,
    )


def _row(layers: Sequence[LayerMemory]) -> tuple[str, ...]:
    """The row of equal layers, one after another."""
    layer, last = layers[0], layers[-1]
    sizes = (layer.token_nbytes, layer.kept_nbytes, layer.reserved_nbytes, layer.fixed_nbytes, layer.bf16_nbytes)
    counts = (f"{count:,}" for count in (layer.num_tokens, *sizes))
    index = str(layer.index) if layer is last else f"{layer.index} to {last.index}, each"
    return index, layer.kind, *counts, _times(layer.compression)


def _amount(nbytes: int) -> str:
    """Bytes for a reader."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}x"
