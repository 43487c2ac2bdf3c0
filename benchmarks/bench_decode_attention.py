"""Decode attention on codes against FlashAttention 3 and XQA, on a GPU; refuses to time what is not correct.

A peer whose package is missing is left out: vllm for FlashAttention 3, flashinfer-python's sources for XQA.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from figure_text import shape, table
from gate import checked_errors, needs_gpu
from llama_8b import MODEL
from peers import (
    BLOCK_SIZE,
    TIMED_PRESETS,
    copies_beyond_l2,
    copy_bandwidth,
    flash_attention_3,
    graph_milliseconds,
    shuffled_table,
    vllm_turboquant,
)
from results_file import read_result, write_result
from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.ops import cache_update, decode_attention
from turboquant_core.ops.decode_attention.reference import decode_attention as reference
from turboquant_core.ops.decode_attention.reference import stored_row
from xqa import default_sources, xqa_fp8

HEADS, KV_HEADS, HEAD_DIM = MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim
SHAPES = (
    (1, 8192),
    (1, 32768),
    (1, 131072),
    (8, 32768),
    (32, 1024),
    (32, 4096),
    (32, 8192),
    (32, 16384),
    (32, 32768),
    (128, 8192),
)
PRESET_SHAPE = (32, 32768)
CHECKED_ROWS = 2


class Cache:
    """Pages of `batch` rows of `context` tokens: quantised Gaussian vectors, a few of them many times."""

    def __init__(self, preset: str, batch: int, context: int) -> None:
        self.layout = KVCacheLayout(TurboQuantConfig.preset(preset, HEAD_DIM), KV_HEADS, BLOCK_SIZE)
        self.table = shuffled_table(batch, context)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        blocks = 4096
        some = self.layout.allocate(blocks, "cuda")
        tokens = blocks * BLOCK_SIZE
        key, value = (torch.randn(tokens, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        cache_update(key, value, some, torch.arange(tokens, device="cuda"), self.layout, path="reference")
        self.pages = some[torch.randint(0, blocks, (self.table.numel(),), device="cuda")]

    @property
    def nbytes(self) -> int:
        """Bytes that attention has to read."""
        return self.pages.numel()

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """Attention of query tokens on the cache."""
        out = decode_attention(query, self.pages, self.table, self.lengths, self.layout)
        assert isinstance(out, torch.Tensor)
        return out


def queries(batch: int, query_len: int) -> torch.Tensor:
    """Random queries."""
    return torch.randn(batch * query_len, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)


def check(cache: Cache, query: torch.Tensor) -> dict[str, float]:
    """Relative error of the first and last rows against float64, and that of a bf16 attention on the same values.

    Raises:
        SystemExit: If ours is the larger one.
    """
    batch = len(cache.lengths)
    query_len = len(query) // batch
    out = cache.attend(query).reshape(batch, query_len, HEADS, HEAD_DIM)
    ours = eager = norm = 0.0
    for row in sorted({0, batch - 1} if batch > 1 else {0})[:CHECKED_ROWS]:
        rows = slice(row, row + 1)
        part = query.reshape(batch, query_len, HEADS, HEAD_DIM)[row]
        table, lengths = cache.table[rows], cache.lengths[rows]
        exact, _ = reference(part.double(), cache.pages, table, lengths, cache.layout, scale=HEAD_DIM**-0.5)
        ours += float((out[row].double() - exact).square().sum())
        eager += float((bfloat16_attention(part, cache, row).double() - exact).square().sum())
        norm += float(exact.square().sum())
    error, bound = (ours / norm) ** 0.5, (eager / norm) ** 0.5
    return checked_errors(error, bound)


def bfloat16_attention(query: torch.Tensor, cache: Cache, row: int) -> torch.Tensor:
    """Plain bf16 attention of query [query_len, HEADS, HEAD_DIM] on the dequantised values of one row."""
    length = int(cache.lengths[row])
    stored = stored_row(cache.pages, cache.table, row, length, cache.layout, torch.float32)
    keys, values = (x.bfloat16().repeat_interleave(HEADS // KV_HEADS, dim=0) for x in stored)
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * HEAD_DIM**-0.5
    position = torch.arange(length, device="cuda")
    last = length - len(query) + torch.arange(len(query), device="cuda")
    scores = scores.masked_fill(position > last[:, None], -torch.inf)
    out: torch.Tensor = scores.softmax(-1, dtype=torch.float32).bfloat16() @ values
    return out.transpose(0, 1)


def time_attention(preset: str, batch: int, context: int, query_len: int = 1) -> dict[str, Any]:
    """One checked measurement."""
    first = Cache(preset, batch, context)
    caches = [first] + [Cache(preset, batch, context) for _ in range(copies_beyond_l2(first.nbytes) - 1)]
    query = queries(batch, query_len)
    errors = check(first, query)
    calls: list[Callable[[], object]] = [lambda cache=cache: cache.attend(query) for cache in caches]  # type: ignore[misc]
    milliseconds = graph_milliseconds(calls)
    return {"ms": milliseconds, "bytes": first.nbytes, "gb_per_s": first.nbytes / milliseconds / 1e6, **errors}


def main() -> None:
    """Measure, print, and with --json keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/decode_attention.json")
    parser.add_argument("--quick", action="store_true", help="only the shapes that the goals name")
    parser.add_argument("--xqa", type=Path, default=default_sources(), help="the folder csrc/xqa of flashinfer-python")
    arguments = parser.parse_args()
    needs_gpu()
    torch.manual_seed(0)
    peers = find_spec("vllm") is not None
    shapes = [
        shape
        for shape in SHAPES
        if not arguments.quick or shape in {(1, 8192), (1, 32768), (32, 1024), (32, 4096), PRESET_SHAPE, (128, 8192)}
    ]
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")

    model = (HEADS, KV_HEADS, HEAD_DIM)
    contexts = []
    for batch, context in shapes:
        row: dict[str, Any] = {"batch": batch, "context": context, "tq4": time_attention("tq4", batch, context)}
        if peers:
            row["fa3_bf16_ms"] = flash_attention_3(batch, context, *model, fp8=False)
            row["fa3_fp8_ms"] = flash_attention_3(batch, context, *model, fp8=True)
            row["vllm_turboquant_4bit_nc_ms"] = vllm_turboquant(batch, context, *model)
        if arguments.xqa is not None:
            measured = xqa_fp8(arguments.xqa.resolve(), batch, context, *model)
            row["xqa_fp8_ms"], row["xqa_fp8_relative_error"] = measured["ms"], measured["relative_error"]
        contexts.append(row)
        print(describe(f"tq4 {batch} x {context}", row["tq4"], row, bandwidth), flush=True)
    peer = next(row for row in contexts if (row["batch"], row["context"]) == PRESET_SHAPE)
    presets = {preset: time_attention(preset, *PRESET_SHAPE) for preset in TIMED_PRESETS}
    for preset, measured in presets.items():
        print(describe(f"{preset} {PRESET_SHAPE[0]} x {PRESET_SHAPE[1]}", measured, peer, bandwidth), flush=True)
    verification = {query_len: time_attention("tq4", *PRESET_SHAPE, query_len) for query_len in (1, 2, 4, 8)}
    for query_len, measured in verification.items():
        ratio = measured["ms"] / verification[1]["ms"]
        print(f"{query_len} query tokens: {measured['ms']:.4f} ms, {ratio:.2f} of one", flush=True)
    if arguments.json:
        print(
            write_result(
                "decode_attention",
                {
                    "shape": {
                        "num_heads": HEADS,
                        "num_kv_heads": KV_HEADS,
                        "head_dim": HEAD_DIM,
                        "block_size": BLOCK_SIZE,
                    },
                    "copy_bytes_per_s": bandwidth,
                    "contexts": contexts,
                    "presets": presets,
                    "verification": verification,
                },
            )
        )


def times() -> str:
    """Times of every shape beside the peers'."""
    peers = ("fa3_bf16", "fa3_fp8", "xqa_fp8", "vllm_turboquant_4bit_nc")
    rows = []
    for row in sorted(read_result("decode_attention")["contexts"], key=lambda row: (row["batch"], row["context"])):
        ours = row["tq4"]["ms"]
        of_peers = [f"{1000 * row[f'{peer}_ms']:,.0f} µs ({row[f'{peer}_ms'] / ours:.2f}x)" for peer in peers]
        rows.append([shape(row["batch"], row["context"]), f"**{1000 * ours:,.0f} µs**", *of_peers])
    columns = (
        "rows × tokens",
        "tq4",
        "FlashAttention 3, bf16",
        "FlashAttention 3, fp8",
        "XQA, fp8",
        "vLLM's own 4-bit kernel",
    )
    return table(columns, rows)


def presets() -> str:
    """Every preset at one shape beside the peers there."""
    result = read_result("decode_attention")
    peers = next(row for row in result["contexts"] if (row["batch"], row["context"]) == PRESET_SHAPE)
    rows = []
    for preset, measured in result["presets"].items():
        factors = [f"{peers[f'{peer}_ms'] / measured['ms']:.2f}x" for peer in ("fa3_bf16", "fa3_fp8", "xqa_fp8")]
        share = measured["gb_per_s"] * 1e9 / result["copy_bytes_per_s"]
        error = f"{measured['relative_error']:.2%} ({measured['bf16_relative_error']:.2%})"
        rows.append([preset, f"{1000 * measured['ms']:,.0f} µs", *factors, f"{share:.0%}", error])
    columns = (
        shape(*PRESET_SHAPE),
        "time",
        "against FA3 bf16",
        "against FA3 fp8",
        "against XQA fp8",
        "share of copy bandwidth",
        "error against float64 (bf16 attention's)",
    )
    return table(columns, rows)


def query_tokens() -> str:
    """What several query tokens of a row cost."""
    times = {int(count): measured["ms"] for count, measured in read_result("decode_attention")["verification"].items()}
    return ", ".join(f"{count} take {times[count] / times[1]:.2f} times as long as one" for count in times if count > 1)


def ratio(batch: int, context: int, peer: str, kernel: str = "tq4") -> Callable[[], str]:
    """How many times as long a peer's kernel takes as another."""

    def milliseconds(row: Any, name: str) -> float:
        return float(row["tq4"]["ms"] if name == "tq4" else row[f"{name}_ms"])

    def text() -> str:
        rows = read_result("decode_attention")["contexts"]
        (row,) = (row for row in rows if (row["batch"], row["context"]) == (batch, context))
        return f"{milliseconds(row, peer) / milliseconds(row, kernel):.2f}"

    return text


FIGURES = {
    "decode-attention": times,
    "decode-presets": presets,
    "decode-query-tokens": query_tokens,
    "kernel-bf16": ratio(32, 32_768, "fa3_bf16"),
    "kernel-xqa": ratio(32, 32_768, "xqa_fp8"),
    "kernel-xqa-short": ratio(32, 1024, "xqa_fp8"),
    "kernel-xqa-alone": ratio(1, 8192, "xqa_fp8"),
    "kernel-alone-bf16": ratio(1, 32_768, "fa3_bf16"),
    "fp8-kernel-bf16": ratio(32, 32_768, "fa3_bf16", "xqa_fp8"),
    "fp8-kernel-alone-bf16": ratio(1, 32_768, "fa3_bf16", "xqa_fp8"),
}


def describe(name: str, measured: dict[str, Any], peer: dict[str, Any], bandwidth: float) -> str:
    """One line of the table."""
    line = f"{name}: {measured['ms']:.4f} ms, {measured['bytes'] / measured['ms'] / 1e-3 / bandwidth:.0%} of copy"
    line += f", error {measured['relative_error']:.2%} (bf16 {measured['bf16_relative_error']:.2%})"
    for key in ("fa3_bf16_ms", "fa3_fp8_ms", "xqa_fp8_ms", "vllm_turboquant_4bit_nc_ms"):
        if key in peer:
            line += f", {peer[key] / measured['ms']:.2f}x {key.removesuffix('_ms')}"
    return line


if __name__ == "__main__":
    main()
