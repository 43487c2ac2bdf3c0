"""What raw copies and a calibration file cost a layer's decode step, on a GPU; refuses to time what is not correct."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from bench_cache_update import transform_of
from figure_text import shape, table
from gate import checked_errors, needs_gpu
from llama_8b import MODEL
from peers import BLOCK_SIZE, copies_beyond_l2, graph_milliseconds, shuffled_table
from results_file import read_result, write_result
from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.ops import cache_update, decode_attention
from turboquant_core.ops.decode_attention.reference import stored_row
from turboquant_core.ops.merge_attention import merge_copies
from turboquant_core.ops.raw_copies import CopyTable, copy_update
from turboquant_core.raw_copies import CodeRange, CopyColumns, CopyRows, RawCopies

HEADS, KV_HEADS, HEAD_DIM = MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim
SHAPES = ((16, 16_384), (1, 32_768), (32, 4_096), (64, 8_192), (4, 65_536))
COLUMNS = CopyColumns(sink_tokens=1, recent_tokens=16)
DEVICE = torch.device("cuda")
STORED_AT_ONCE = 65_536
KINDS = {
    "codes only": (False, "with_mean"),
    "raw copies": (True, "with_mean"),
    "raw copies and a calibration file": (True, "calibrated"),
}


class Layer:
    """A layer of Llama-3.1-8B's shape whose rows have decoded their newest tokens one by one."""

    def __init__(self, batch: int, context: int, *, copies: bool, kind: str) -> None:
        self.transform = transform_of(kind)
        config = TurboQuantConfig.preset("tq4", HEAD_DIM).fitted_to(self.transform)
        self.layout = KVCacheLayout(config, KV_HEADS, BLOCK_SIZE)
        self.block_table = shuffled_table(batch, context)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        self.pages = self.layout.allocate(self.block_table.numel(), DEVICE)
        for first in range(0, batch * context, STORED_AT_ONCE):
            slots = torch.arange(first, min(first + STORED_AT_ONCE, batch * context), device=DEVICE)
            key, value = self._random(len(slots))
            cache_update(key, value, self.pages, slots, self.layout, key_transform=self.transform)
        self.query = torch.randn(batch, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        self.newest = [self._random(batch) for _ in range(COLUMNS.recent_tokens)]
        self._copies = None
        if copies:
            self._copies = RawCopies.allocate(config, KV_HEADS, batch * COLUMNS.copies_of_row, torch.bfloat16, DEVICE)
            copy_table = CopyTable(
                COLUMNS,
                num_slots=self.block_table.numel() * BLOCK_SIZE,
                num_copies=batch * COLUMNS.copies_of_row,
                max_rows=batch,
                device=DEVICE,
            )
        start_loc = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
        for step in range(COLUMNS.recent_tokens):
            lengths = self.lengths - COLUMNS.recent_tokens + step + 1
            if copies:
                entries = copy_table.assign(lengths, start_loc, self.block_table, BLOCK_SIZE)
                self._rows = CopyRows(COLUMNS, entries, lengths, None, self.block_table, batch, 1)
            self._slots = self._slots_of(lengths.long() - 1)
            self._store(self.newest[step])

    def step(self) -> torch.Tensor:
        """Store the newest token of every row and attend for it."""
        codes = self._store(self.newest[-1])
        arguments = self.query, self.pages, self.block_table, self.lengths, self.layout
        if self._copies is None or codes is None:
            out = decode_attention(*arguments, key_transform=self.transform)
            assert isinstance(out, torch.Tensor)
            return out
        out, lse = decode_attention(
            *arguments, key_transform=self.transform, seq_starts=codes.starts, seq_ends=codes.ends, return_lse=True
        )
        merge_copies(
            self.query, out, lse, self._rows, self._copies, codes, scale=HEAD_DIM**-0.5, follows_attention=True
        )
        return out

    def check(self) -> dict[str, float]:
        """Relative error of the last row against float64, and that of a bf16 attention on the same values.

        Raises:
            SystemExit: If ours is the larger one.
        """
        row, out = len(self.lengths) - 1, self.step()
        keys, values = stored_row(self.pages, self.block_table, row, int(self.lengths[row]), self.layout, torch.float64)
        keys = self.transform.restored(keys.transpose(0, 1)).transpose(0, 1)
        if self._copies is not None:
            for states, which in ((keys, 0), (values, 1)):
                newest = torch.stack([pair[which][row] for pair in self.newest], dim=1)
                states[:, -COLUMNS.recent_tokens :] = newest.double()
        exact, eager = (
            _attention(self.query[row].to(dtype), keys.to(dtype), values.to(dtype)).double()
            for dtype in (torch.float64, torch.bfloat16)
        )
        error, bound = (float((x.double() - exact).norm() / exact.norm()) for x in (out[row], eager))
        return checked_errors(error, bound)

    def _store(self, new: tuple[torch.Tensor, torch.Tensor]) -> CodeRange | None:
        cache_update(*new, self.pages, self._slots, self.layout, key_transform=self.transform)
        if self._copies is None:
            return None
        return copy_update(new, self.pages, self._rows, self._copies, self.layout, follows_update=True)

    def _slots_of(self, position: torch.Tensor) -> torch.Tensor:
        block = self.block_table.gather(1, position[:, None] // BLOCK_SIZE)[:, 0]
        return block * BLOCK_SIZE + position % BLOCK_SIZE

    @staticmethod
    def _random(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (2, count, KV_HEADS, HEAD_DIM)
        key, value = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).unbind()
        return key, value


def _attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Plain attention of one token [num_heads, head_dim] on [num_kv_heads, num_tokens, head_dim]."""
    grouped = query.view(KV_HEADS, -1, HEAD_DIM)
    weights = (grouped @ keys.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1)
    out: torch.Tensor = weights @ values
    return out.view(HEADS, HEAD_DIM)


def time_layer(batch: int, context: int, *, copies: bool, kind: str) -> dict[str, float]:
    """One checked measurement."""
    first = Layer(batch, context, copies=copies, kind=kind)
    errors = first.check()
    others = [Layer(batch, context, copies=copies, kind=kind) for _ in range(copies_beyond_l2(first.pages.nbytes) - 1)]
    calls: list[Callable[[], object]] = [layer.step for layer in (first, *others)]
    return {"ms": graph_milliseconds(calls), **errors}


def layers() -> str:
    """What a layer's step takes with each."""
    rows = []
    for row in read_result("raw_copies")["rows"]:
        without = row["codes only"]["ms"]
        cells = [f"{1000 * row[kind]['ms']:.1f} µs ({row[kind]['ms'] / without:.2f}x)" for kind in list(KINDS)[1:]]
        rows.append([shape(row["batch"], row["context"]), f"{1000 * without:.1f} µs", *cells])
    return table(("rows × tokens", *KINDS), rows)


FIGURES = {"raw-copies-layer": layers}


def main() -> None:
    """Measure, print, and with --json keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/raw_copies.json")
    arguments = parser.parse_args()
    needs_gpu()
    torch.manual_seed(0)
    rows = []
    for batch, context in SHAPES:
        row: dict[str, Any] = {"batch": batch, "context": context}
        for name, (copies, kind) in KINDS.items():
            row[name] = time_layer(batch, context, copies=copies, kind=kind)
        rows.append(row)
        print(batch, context, *(f"{name}: {1000 * row[name]['ms']:.1f} us" for name in KINDS), flush=True)
    if arguments.json:
        print(write_result("raw_copies", {"preset": "tq4", "rows": rows}))


if __name__ == "__main__":
    main()
