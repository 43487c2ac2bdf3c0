"""What the Triton kernels compile to for every card, and at the widest heads and the narrowest.

A tile at head_dim 512 takes four times the registers of one at 128, and a tensor-core product takes no dimension as
small as head_dim 8, of which the interpreter knows nothing.
"""

import os

import pytest

COMPILE = """
import os
from pathlib import Path
os.environ.pop("TRITON_INTERPRET", None)
import torch
from turboquant_core import KVCacheLayout, KeyTransform, TurboQuantConfig
from turboquant_core.ops.cache_gather import launch as gather
from turboquant_core.ops.cache_update.tensors import UpdateTensors
from turboquant_core.ops.cache_update.triton import launch as update
from turboquant_core.ops.cache_update.triton.sizes import Processor
from turboquant_core.ops.decode_attention import launch as decode
from turboquant_core.ops.decode_attention.paths import PATHS
from turboquant_core.ops.decode_attention.portable import launch as portable
from turboquant_core.ops import _card
from turboquant_core.ops._card import Card
from turboquant_core.ops.merge_attention import launch as merge
from turboquant_core.ops.merge_attention import sizes as merge_sizes
from turboquant_core.ops.raw_copies import CopyTable
from turboquant_core.ops.raw_copies import launch as copies
from turboquant_core.raw_copies import CodeRange, CopyColumns, CopyRows, RawCopies
from turboquant_core.testing.compiled import Recorder

BATCH = 32

def record(module, name):
    setattr(module, name, Recorder(getattr(module, name)))
    return getattr(module, name)

update_kernel, gather_kernel = record(update, "update_kernel"), record(gather, "gather_kernel")
prepare, portable_kernel, combine = (
    record(portable, f"{name}_kernel") for name in ("prepare", "portable", "combine")
)
merge_kernel = record(merge, "merge_kernel")
copy_kernels = [record(copies, f"{name}_kernel") for name in ("assign", "update")]
merge_sizes.interpreting = lambda: False

def report(head_dim, key_bits, dtypes, paths, arch, shared_bytes, folder, split=False):
    layout = KVCacheLayout(TurboQuantConfig(head_dim, key_bits, 4, key_split=split), 2, 16)
    pages = layout.allocate(1)
    ints, means = torch.zeros(BATCH + 1, dtype=torch.int32), torch.zeros(2, head_dim)
    transform, bounds = KeyTransform(means), None
    if split:
        bounds = ints[:BATCH]
        transform = KeyTransform(means, means + 1, torch.arange(head_dim).repeat(2, 1))
    block_table, lengths = ints[:BATCH].view(BATCH, 1), ints[:BATCH]
    decode.card_of = portable.card_of = merge_sizes.card_of = _card.card_of = lambda device: Card(divmod(arch, 10), 132)
    update._processor = lambda device: Processor(132, shared_bytes)

    def show(kernel):
        compiled = kernel.compile(arch, Path(folder))
        print(kernel.kernel.__name__, compiled.shared_bytes, compiled.stack_bytes)

    for dtype in dtypes:
        key = torch.zeros(100, 2, head_dim, dtype=dtype)
        tensors = UpdateTensors.of(key, key, transform, torch.zeros(100, dtype=torch.int64), pages)
        update.plan(layout, key.dtype, 100, key.device, transform.only_centres)(tensors, 100, 1)
        show(update_kernel)
    gather.launch(
        pages, block_table, layout, starts=None, cu_seqlens=ints, rotated_key_mean=means, key_dtype=torch.bfloat16,
        dtype=torch.bfloat16, max_tokens=100,
    )
    show(gather_kernel)
    query, lse = torch.zeros(BATCH, 8, head_dim, dtype=torch.bfloat16), torch.zeros(BATCH, 8)
    options = {"scale": 1.0, "softcap": 3.0 if split else 0.0}
    for dtype in dtypes:
        dense = torch.zeros(BATCH, 2, 18, head_dim, dtype=dtype)
        of_type = query.to(dtype)
        merge.merge_attention(of_type, of_type, lse, dense, dense, torch.zeros(1, 1, 17, dtype=torch.bool), **options)
        show(merge_kernel)
    for path in (path for path in PATHS if path.name in paths):
        launch = decode.choose_launch(path, layout, BATCH, 4, 16, query.device)
        options = {"batch": BATCH, "query_len": 1, "scale": 1.0, "window": 0, "softcap": 0.0}
        decode.plan(query, pages, block_table, layout, path, launch, **options)(
            query, pages, block_table, lengths, query_start_loc=None, seq_starts=bounds, seq_ends=bounds, sinks=None,
            key_transform=transform, out=torch.empty_like(query), lse=lse if split else None,
        )
        show(portable_kernel)
    show(prepare)
    show(combine)
    columns = CopyColumns(1, 16, max_query_len=4 if split else 1)
    table = CopyTable(columns, num_slots=16, num_copies=16, max_rows=BATCH)
    options = {"num_slots": 16, "block_size": 16, "step": 1}
    entries = torch.zeros(BATCH, columns.num_columns, dtype=torch.int32)
    copies.assign(entries, table.state, lengths, ints, block_table, columns, **options)
    rows = CopyRows(columns, entries, lengths, ints if split else None, block_table, BATCH, columns.max_query_len)
    kept, new = RawCopies.allocate(layout.config, 2, 16, torch.bfloat16), query[:, :2]
    copies.copy_update((new, new), pages, rows, kept, layout, reads_new=True, early=True)
    options = {"scale": 1.0, "window": 0, "softcap": 0.0, "mean": means if split else None}
    merge.merge_copies(query, query, lse, rows, kept, CodeRange(lengths, lengths), early=True, **options)
    for kernel in (*copy_kernels, merge_kernel):
        show(kernel)
"""
# What a program may use on an A100.
SHARED_BYTES = 163 * 1024


def compile_kernels(run_python, monkeypatch, folder, arguments, split=False):
    """The name, bytes of shared memory and bytes of stack of every kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    printed = run_python(f"{COMPILE}\nreport({arguments}, {SHARED_BYTES}, {str(folder)!r}, {split})").splitlines()
    return [(name, int(shared_bytes), int(stack)) for name, shared_bytes, stack in map(str.split, printed)]


def test_head_dim_512_fits_shared_memory_and_registers(run_python, monkeypatch, tmp_path):
    compiled = compile_kernels(
        run_python, monkeypatch, tmp_path, "512, 4, [torch.bfloat16, torch.float32], ['fp16'], 80"
    )
    assert len(compiled) == 11
    for name, shared_bytes, stack_bytes in compiled:
        assert shared_bytes <= SHARED_BYTES, name
        # A register or two of a thread may go to memory; hundreds would take most of the time.
        assert stack_bytes <= 32, name


@pytest.mark.parametrize(("arch", "split"), [(80, False), (89, False), (90, True), (100, False), (120, True)])
def test_kernels_compile_for_every_card(run_python, monkeypatch, tmp_path, arch, split):
    arguments = f"128, 4, [torch.bfloat16], ['fp16'], {arch}"
    compiled = compile_kernels(run_python, monkeypatch, tmp_path, arguments, split)
    assert len(compiled) == 9


@pytest.mark.parametrize(("key_bits", "split"), [(8, False), (4, True)])
def test_kernels_compile_with_the_oldest_triton(run_python, monkeypatch, tmp_path, key_bits, split):
    folder = os.environ.get("TURBOQUANT_OLDEST_TRITON")
    if folder is None:
        pytest.skip("TURBOQUANT_OLDEST_TRITON names no folder that it is in")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]))
    arguments = f"128, {key_bits}, [torch.bfloat16], ['fp16'], 90"
    assert len(compile_kernels(run_python, monkeypatch, tmp_path, arguments, split)) == 9


# Centroids of 4 bits are permuted as bytes, those of 8 are gathered.
@pytest.mark.parametrize(("head_dim", "key_bits"), [(8, 4), (16, 8)])
def test_the_narrowest_heads_compile(run_python, monkeypatch, tmp_path, head_dim, key_bits):
    paths = ["fp16", "int8", "fp8", "portable"]
    arguments = f"{head_dim}, {key_bits}, [torch.bfloat16, torch.float32], {paths}, 90"
    compiled = compile_kernels(run_python, monkeypatch, tmp_path, arguments)
    assert len(compiled) == 2 + 1 + 2 + len(paths) + 2 + 3
