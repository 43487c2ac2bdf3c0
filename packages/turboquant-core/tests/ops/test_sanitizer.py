"""Every kernel under compute-sanitizer: no access out of bounds, no race in shared memory, no stuck barrier."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

# Every path that can run here, on pages and vectors that end where their memory does, with values that fit and with
# slots, blocks, lengths and offsets that do not.
KERNELS = """
import torch
from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import cache_gather, cache_update, decode_attention, merge_attention
from turboquant_core.ops.decode_attention.paths import PATHS
from turboquant_core.ops.cache_update.warpgroup import WARPGROUP
from turboquant_core.ops.merge_attention import merge_copies
from turboquant_core.ops.raw_copies import CopyTable, copy_update
from turboquant_core.raw_copies import CopyColumns, CopyRows, RawCopies

device, seen = torch.device("cuda" if torch.cuda.is_available() else "cpu"), set()
shapes = [
    (64, 3, 2, torch.float16), (96, 8, 5, torch.float32), (128, 4, 4, torch.bfloat16), (256, 4, 4, torch.bfloat16),
]
# The interpreter is slow.
for head_dim, key_bits, value_bits, dtype in shapes if device.type == "cuda" else shapes[:1]:
    layout = KVCacheLayout(TurboQuantConfig(head_dim, key_bits, value_bits), 2, 16)
    key, value = (torch.randn(83, 2, head_dim, device=device, dtype=dtype) for _ in range(2))
    slots = torch.randperm(96, device=device)[:83]
    slots[5] = -1
    wrong_slots = slots.clone()
    wrong_slots[10:15] = torch.tensor([96, 97, 2**31, 2**62, -2**63])
    pages = layout.allocate(6, device)
    mean = torch.randn(2, head_dim, device=device)
    for path in ("warpgroup", "triton"):
        if path == "triton" or WARPGROUP.obstacle(layout, KeyTransform(), key, value, pages) is None:
            for key_mean in (None, mean):
                for given in (wrong_slots, slots):
                    cache_update(key, value, pages, given, layout, key_transform=KeyTransform(key_mean), path=path)
            seen.add(path)
    table = torch.arange(6, dtype=torch.int32, device=device).view(2, 3)
    lens = torch.tensor([48, 17], dtype=torch.int32, device=device)
    int32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)
    wrong = (int32(*[6, 2**30, -1, -2**31, 5, 2**31 - 1]).view(2, 3), int32(2**31 - 1, 49))
    wrong_offsets = (int32(0, 2**31 - 1, -3), int32(5, 2, 9), int32(-2**31, 1, 2**31 - 1))
    cache_gather(pages, table, lens, layout, max_tokens=65)
    for offsets in (None, *wrong_offsets):
        cache_gather(pages, *wrong, layout, starts=int32(-2**31, 7), cu_seqlens=offsets, max_tokens=65)
    sinks = torch.zeros(8, device=device)
    query = torch.randn(6, 8, head_dim, device=device, dtype=dtype)
    attended = torch.zeros_like(query), sinks.repeat(6, 1)
    dense, shown = query[:2, :2, None].repeat(1, 1, 5, 1), torch.ones(1, 3, 5, dtype=torch.bool, device=device)
    merge_attention(query, *attended, dense, dense, shown, softcap=9.0)
    columns = CopyColumns(1, 4, max_query_len=3)
    copies = CopyTable(columns, num_slots=96, num_copies=2 * columns.copies_of_row, max_rows=2, device=device)
    offsets = int32(0, 3, 6)
    rows = CopyRows(columns, copies.assign(lens, offsets, table, 16), lens, offsets, table, 6, 3)
    kept = RawCopies.allocate(layout.config, 2, copies.num_copies, dtype, device)
    codes = copy_update((key[:6], value[:6]), pages, rows, kept, layout)
    merge_copies(query, *attended, rows, kept, codes, scale=1.0, window=20, softcap=9.0, key_mean=mean)
    for path in PATHS:
        if path.obstacle(layout, device, pages) is None:
            everything = {
                "window": 20, "softcap": 9.0, "sinks": sinks, "key_transform": KeyTransform(mean),
                "seq_ends": int32(40, 2**31 - 1),
            }
            for query_len, options in ((1, {}), (3, everything)):
                query = torch.randn(2 * query_len, 8, head_dim, device=device, dtype=dtype)
                for given in ((table, lens), wrong, (table, int32(-2**31, -1))):
                    decode_attention(query, pages, *given, layout, path=path.name, return_lse=True, **options)
                for offsets in wrong_offsets:
                    decode_attention(
                        query, pages, *wrong, layout, path=path.name, query_start_loc=offsets, max_query_len=3,
                        seq_starts=int32(-2**31, 2**31 - 1), **options,
                    )
            seen.add(path.name)
if device.type == "cuda":
    torch.cuda.synchronize()
print("ran", *sorted(seen))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="compute-sanitizer runs them")
def test_the_interpreter_runs_what_the_sanitizer_watches(run_python):
    assert set(run_python(KERNELS).split()) == {"ran", "triton", "fp16", "int8", "fp8", "portable"}


@pytest.mark.skipif(
    not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None,
    reason="needs a GPU and compute-sanitizer",
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_kernels_are_clean(tool):
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", KERNELS],
        # Tensors that share an allocation hide what is read beyond one of them.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert {"ran", "triton", "fp16", "int8", "portable"} <= set(done.stdout.split())
