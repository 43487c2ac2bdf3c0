"""What the kernels compile to at head_dim 512, where a tile takes four times the registers of one at 128."""

COMPILE = """
import os
from pathlib import Path
os.environ.pop("TRITON_INTERPRET", None)
import torch
from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.ops.cache_gather import launch as gather
from turboquant_core.ops.cache_update.tensors import UpdateTensors
from turboquant_core.ops.cache_update.triton import launch as update
from turboquant_core.ops.cache_update.triton.sizes import Processor
from turboquant_core.ops.decode_attention import launch as decode
from turboquant_core.ops.decode_attention.paths import FP16
from turboquant_core.ops.decode_attention.portable import launch as portable
from turboquant_core.ops.decode_attention.sizes import Card
from turboquant_core.testing.compiled import Recorder

BATCH = 32
layout = KVCacheLayout(TurboQuantConfig(512, 4, 4), 2, 16)
pages = layout.allocate(1)
ints, means = torch.zeros(BATCH + 1, dtype=torch.int32), torch.zeros(2, 512)
block_table, lengths = ints[:BATCH].view(BATCH, 1), ints[:BATCH]

def record(module, name):
    setattr(module, name, Recorder(getattr(module, name)))
    return getattr(module, name)

def report(arch, shared_bytes, folder):
    decode.card_of = lambda device: Card(divmod(arch, 10), 132)
    update._processor = lambda device: Processor(132, shared_bytes)
    kernels = [
        record(update, "update_kernel"), record(gather, "gather_kernel"),
        record(decode, "prepare_kernel"), record(portable, "portable_kernel"), record(decode, "combine_kernel"),
    ]
    key = torch.zeros(100, 2, 512, dtype=torch.bfloat16)
    tensors = UpdateTensors.of(key, key, means, torch.zeros(100, dtype=torch.int64), pages)
    update.plan(layout, key.dtype, 100, key.device)(tensors, 100, 1)
    gather.launch(
        pages, block_table, layout, starts=None, cu_seqlens=ints, rotated_key_mean=means, dtype=torch.bfloat16,
        max_tokens=100,
    )
    query = torch.zeros(BATCH, 8, 512, dtype=torch.bfloat16)
    decode.attend(
        query, pages, block_table, lengths, layout, FP16,
        decode.choose_launch(FP16, layout, BATCH, 4, 16, query.device), scale=1.0, query_len=1,
        query_start_loc=None, seq_starts=None, window=0, softcap=0.0, sinks=None, key_mean=means,
        out=torch.empty_like(query), lse=None,
    )
    for kernel in kernels:
        compiled = kernel.compile(arch, Path(folder))
        print(kernel.kernel.__name__, compiled.shared_bytes, compiled.stack_bytes)
"""
# What a program may use on an A100.
SHARED_BYTES = 163 * 1024


def test_head_dim_512_fits_shared_memory_and_registers(run_python, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    printed = run_python(f"{COMPILE}\nreport(80, {SHARED_BYTES}, {str(tmp_path)!r})").splitlines()
    assert len(printed) == 5
    for line in printed:
        name, shared_bytes, stack_bytes = line.split()
        assert int(shared_bytes) <= SHARED_BYTES, name
        # A register or two of a thread may go to memory; hundreds would take most of the time.
        assert int(stack_bytes) <= 32, name
