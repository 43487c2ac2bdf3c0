"""Writing the cache against a copy of as many bytes, on a GPU; refuses to time what is not correct."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from figure_text import table
from llama_8b import MODEL
from peers import BLOCK_SIZE, TIMED_PRESETS, copies_beyond_l2, copy_bandwidth, graph_milliseconds
from results_file import read_result, write_result
from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import cache_update

KV_HEADS, HEAD_DIM = MODEL.num_kv_heads, MODEL.head_dim
UPDATE_TOKENS = 8192


def time_update(preset: str, centred: bool, bandwidth: float) -> dict[str, Any]:
    """Writing UPDATE_TOKENS tokens: milliseconds, and the share of copy bandwidth over the bytes it must move."""
    layout = KVCacheLayout(TurboQuantConfig.preset(preset, HEAD_DIM), KV_HEADS, BLOCK_SIZE)
    shape = (UPDATE_TOKENS, KV_HEADS, HEAD_DIM)
    mean = torch.randn(KV_HEADS, HEAD_DIM, device="cuda") if centred else None
    moved = UPDATE_TOKENS * KV_HEADS * (2 * 2 * HEAD_DIM + layout.slot_bytes)

    def prepare() -> Callable[[], object]:
        pages = layout.allocate(UPDATE_TOKENS // BLOCK_SIZE, "cuda")
        key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        slots = torch.arange(UPDATE_TOKENS, device="cuda")
        check_update(key, value, pages, slots, layout, mean)
        return lambda: cache_update(key, value, pages, slots, layout, key_transform=KeyTransform(mean))

    milliseconds = graph_milliseconds([prepare() for _ in range(copies_beyond_l2(moved))])
    return {"ms": milliseconds, "bytes": moved, "share_of_copy": moved / milliseconds / 1e-3 / bandwidth}


def check_update(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: KVCacheLayout,
    mean: torch.Tensor | None,
) -> None:
    """Refuse to go on when more than one byte in ten thousand differs from the reference."""
    cache_update(key, value, pages, slots, layout, key_transform=KeyTransform(mean))
    expected = torch.zeros_like(pages)
    cache_update(key, value, expected, slots, layout, key_transform=KeyTransform(mean), path="reference")
    differing = float((pages != expected).float().mean())
    if differing > 1e-4:
        raise SystemExit(f"not timed: {differing:.1e} of the bytes differ from the reference")


def times() -> str:
    """Times of every preset."""
    rows = []
    for name, kinds in read_result("cache_update")["presets"].items():
        cells = [name]
        for kind in ("plain", "with_mean"):
            cells += [f"{1000 * kinds[kind]['ms']:.1f} µs", f"{kinds[kind]['share_of_copy']:.0%}"]
        rows.append(cells)
    return table(("preset", "time", "share of copy", "with a key mean", "share of copy"), rows)


def share_of_copy() -> str:
    """Share of copy bandwidth that tq4 reaches."""
    return f"{100 * read_result('cache_update')['presets']['tq4']['plain']['share_of_copy']:.0f}"


FIGURES = {"cache-update": times, "update-share": share_of_copy}


def main() -> None:
    """Measure, print, and with --json keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/cache_update.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: this benchmark times kernels on one")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    presets: dict[str, dict[str, Any]] = {}
    for preset in TIMED_PRESETS:
        presets[preset] = {}
        for name, centred in (("plain", False), ("with_mean", True)):
            measured = presets[preset][name] = time_update(preset, centred, bandwidth)
            print(
                f"{preset} {name}: {measured['ms'] * 1e3:.1f} us, {measured['share_of_copy']:.0%} of copy", flush=True
            )
    if arguments.json:
        shape = {"num_tokens": UPDATE_TOKENS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK_SIZE}
        print(write_result("cache_update", {"shape": shape, "copy_bytes_per_s": bandwidth, "presets": presets}))


if __name__ == "__main__":
    main()
