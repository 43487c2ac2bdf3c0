"""Writing the cache against a copy of as many bytes, on a GPU; refuses to time what is not correct."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from figure_text import table
from gate import needs_gpu
from llama_8b import MODEL
from peers import BLOCK_SIZE, TIMED_PRESETS, copies_beyond_l2, copy_bandwidth, graph_milliseconds
from results_file import read_result, write_result
from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.config import preset_bits
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import cache_update
from turboquant_core.vector_format import can_split

KV_HEADS, HEAD_DIM = MODEL.num_kv_heads, MODEL.head_dim
UPDATE_TOKENS = 8192
# Of decode steps, beside it.
FEW_TOKENS = (1, 16, 64, 256)
# What keys go through: nothing, a mean, and all that a calibration file has; with the columns of their times.
KINDS = {"plain": "time", "with_mean": "with a key mean", "calibrated": "with a calibration file"}
MOST_CALLS = 200


def transform_of(kind: str) -> KeyTransform:
    """What keys go through; speed does not depend on its values."""
    shape = (KV_HEADS, HEAD_DIM)
    mean = torch.randn(shape, device="cuda")
    if kind == "calibrated":
        return KeyTransform(mean, torch.rand(shape, device="cuda") + 0.5, torch.rand(shape, device="cuda").argsort(-1))
    return KeyTransform(mean if kind == "with_mean" else None)


def time_update(preset: str, kind: str, num_tokens: int, bandwidth: float) -> dict[str, Any]:
    """Writing some tokens: milliseconds, and the share of copy bandwidth over the bytes it must move."""
    transform = transform_of(kind)
    config = TurboQuantConfig.preset(preset, HEAD_DIM).fitted_to(transform)
    layout = KVCacheLayout(config, KV_HEADS, BLOCK_SIZE)
    shape = (num_tokens, KV_HEADS, HEAD_DIM)
    moved = num_tokens * KV_HEADS * (2 * 2 * HEAD_DIM + layout.slot_bytes)

    def prepare() -> Callable[[], object]:
        pages = layout.allocate(-(-num_tokens // BLOCK_SIZE), "cuda")
        key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        slots = torch.arange(num_tokens, device="cuda")
        check_update(key, value, pages, slots, layout, transform)
        return lambda: cache_update(key, value, pages, slots, layout, key_transform=transform)

    calls = min(MOST_CALLS, copies_beyond_l2(moved))
    milliseconds = graph_milliseconds([prepare() for _ in range(calls)])
    return {"ms": milliseconds, "bytes": moved, "share_of_copy": moved / milliseconds / 1e-3 / bandwidth}


def check_update(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: KVCacheLayout,
    key_transform: KeyTransform,
) -> None:
    """Refuse to go on when more than one byte in ten thousand differs from the reference, and more than four."""
    cache_update(key, value, pages, slots, layout, key_transform=key_transform)
    expected = torch.zeros_like(pages)
    cache_update(key, value, expected, slots, layout, key_transform=key_transform, path="reference")
    differing = int((pages != expected).sum())
    # A code or a scale beside a boundary, also where there are few.
    if differing > max(4, 1e-4 * pages.numel()):
        raise SystemExit(f"not timed: {differing:,} of {pages.numel():,} bytes differ from the reference")


def times() -> str:
    """Times of every preset."""
    presets = read_result("cache_update")["presets"]
    shown = [kind for kind in KINDS if any(kind in kinds for kinds in presets.values())]
    rows = []
    for name, kinds in presets.items():
        cells = [name]
        for kind in shown:
            cells += [microseconds(kinds[kind]), f"{kinds[kind]['share_of_copy']:.0%}"] if kind in kinds else ["", ""]
        rows.append(cells)
    columns = [column for kind in shown for column in (KINDS[kind], "share of copy")]
    return table(("preset", *columns), rows)


def microseconds(measured: dict[str, Any]) -> str:
    """Of one measurement."""
    return f"{1000 * measured['ms']:.1f} µs"


def share_of_copy() -> str:
    """Share of copy bandwidth that tq4 reaches."""
    return f"{100 * read_result('cache_update')['presets']['tq4']['plain']['share_of_copy']:.0f}"


FIGURES = {"cache-update": times, "update-share": share_of_copy}


def main() -> None:
    """Measure, print, and with --json keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/cache_update.json")
    arguments = parser.parse_args()
    needs_gpu()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    presets: dict[str, dict[str, Any]] = {}
    for preset in TIMED_PRESETS:
        splits = can_split(HEAD_DIM, preset_bits(preset)[0])
        kinds = [kind for kind in KINDS if splits or kind != "calibrated"]
        presets[preset] = {kind: time_update(preset, kind, UPDATE_TOKENS, bandwidth) for kind in kinds}
        print(preset, *(f"{kind}: {microseconds(presets[preset][kind])}" for kind in kinds), flush=True)
    few = {number: {kind: time_update("tq4", kind, number, bandwidth) for kind in KINDS} for number in FEW_TOKENS}
    for number, measured in few.items():
        print(number, *(f"{kind}: {microseconds(measured[kind])}" for kind in KINDS))
    if arguments.json:
        shape = {"num_tokens": UPDATE_TOKENS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK_SIZE}
        data = {"shape": shape, "copy_bytes_per_s": bandwidth, "presets": presets, "few_tokens": few}
        print(write_result("cache_update", data))


if __name__ == "__main__":
    main()
