"""XQA, FlashInfer's fp8 decode kernel for Hopper, which vLLM runs with `--attention-backend FLASHINFER`.

It is built with nvcc from the sources in the package flashinfer-python (0.7.4 was used).
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from peers import copies_beyond_l2, graph_milliseconds, shuffled_table

# The faster of the two page sizes that vLLM offers for it.
PAGE = 64
SOURCES = ("mha.cu", "mha_sm90.cu", "tensorMap.cpp")
ENTRY = r"""
#include "mha.h"
extern "C" void attend(
    int multiprocessors, int kv_heads, float query_scale, void* out, void const* query, void* keys, void* values,
    int* pages, int capacity, unsigned* lengths, int batch, unsigned* semaphores, void* scratch,
    unsigned long long page_stride, unsigned long long token_stride, unsigned long long head_stride, void* stream) {
  launchHopperF8MHAFlashInfer(
      multiprocessors, kv_heads, 0, query_scale, nullptr, (OutputHead*)out, (InputHead const*)query, nullptr,
      (GMemCacheHead*)keys, (GMemCacheHead*)values, pages, capacity, lengths, batch, 1.0f, nullptr, semaphores,
      scratch, true, page_stride, token_stride, head_stride, (cudaStream_t)stream);
}
"""


def default_sources() -> Path | None:
    """Where the installed package has the sources; None without it."""
    package = find_spec("flashinfer")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0], "data", "csrc", "xqa")


@cache
def build(sources: Path, group: int, head_dim: int) -> ctypes.CDLL:
    """The kernel for bf16 queries and fp8 pages, `group` query heads a KV head."""
    folder = Path(tempfile.mkdtemp())
    entry = folder / "entry.cu"
    entry.write_text(ENTRY, encoding="utf-8")
    defines = {
        "NDEBUG": 1,
        "BEAM_WIDTH": 1,
        "USE_INPUT_KV": 0,
        "USE_CUSTOM_BARRIER": 1,
        "TOKENS_PER_PAGE": PAGE,
        "HEAD_ELEMS": head_dim,
        "HEAD_GRP_SIZE": group,
        "INPUT_FP16": 0,
        "DTYPE": "__nv_bfloat16",
        "CACHE_ELEM_ENUM": 2,
        "SLIDING_WINDOW": 0,
        "LOW_PREC_OUTPUT": 0,
        "SPEC_DEC": 0,
        "MLA_WRAPPER": 0,
        "USE_SM90_MHA": 1,
    }
    library = folder / "xqa.so"
    command = ["nvcc", "-shared", "-Xcompiler", "-fPIC", "-std=c++17", "-O3", "--expt-relaxed-constexpr"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", *(f"-D{name}={value}" for name, value in defines.items())]
    command += [f"-I{sources}", "-o", str(library), str(entry), *(str(sources / name) for name in SOURCES), "-lcuda"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def xqa_fp8(
    sources: Path, batch: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> dict[str, float]:
    """Milliseconds on shuffled fp8 pages, and the relative error against float32 on the same values."""
    library = build(sources, num_heads // num_kv_heads, head_dim)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    query = torch.randn(batch, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(query)
    semaphores, scratch = (torch.zeros(n << 20, dtype=torch.uint8, device="cuda") for n in (8, 256))

    def prepare() -> tuple[Callable[[], object], torch.Tensor, torch.Tensor, torch.Tensor]:
        table = shuffled_table(batch, context, PAGE)
        shape = (table.numel(), PAGE, num_kv_heads, head_dim)
        keys, values = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2)
        )

        def attend() -> None:
            pointers = [ctypes.c_void_p(x.data_ptr()) for x in (out, query, keys, values, table)]
            library.attend(
                multiprocessors,
                num_kv_heads,
                ctypes.c_float(1.0),
                *pointers,
                context,
                ctypes.c_void_p(lengths.data_ptr()),
                batch,
                ctypes.c_void_p(semaphores.data_ptr()),
                ctypes.c_void_p(scratch.data_ptr()),
                *(ctypes.c_ulonglong(stride) for stride in keys.stride()[:3]),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )

        return attend, keys, values, table

    cache_bytes = 2 * batch * context * num_kv_heads * head_dim
    calls = [prepare() for _ in range(min(12, copies_beyond_l2(cache_bytes)))]
    attend, keys, values, table = calls[0]
    attend()
    last = [
        x[table[-1].long()]
        .reshape(context, num_kv_heads, head_dim)
        .float()
        .repeat_interleave(num_heads // num_kv_heads, 1)
        for x in (keys, values)
    ]
    weights = (torch.einsum("hd,thd->ht", query[-1].float(), last[0]) * head_dim**-0.5).softmax(-1)
    exact = torch.einsum("ht,thd->hd", weights, last[1])
    error = float((out[-1].float() - exact).norm() / exact.norm())
    return {"ms": graph_milliseconds([call[0] for call in calls]), "relative_error": error}
