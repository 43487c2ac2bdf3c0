"""Attend with a few query tokens a row on the codes of a paged cache."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from turboquant_core._checks import check_int, check_number
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._bounds import MAX_TOKENS
from turboquant_core.ops._dispatch import (
    KnownCalls,
    check_has_kernels,
    check_is_key_transform,
    check_key_transform,
    check_one_device,
    check_pages,
    check_rows,
    check_tensor,
    check_vector_dtype,
    not_traced,
)
from turboquant_core.ops._overlap import check_no_overlap, extent, overlap
from turboquant_core.ops._values import checks_values
from turboquant_core.ops.decode_attention.path import DecodePath
from turboquant_core.ops.decode_attention.paths import PATHS, choose_path
from turboquant_core.ops.decode_attention.reference import decode_attention as reference_decode_attention
from turboquant_core.ops.decode_attention.values import check_attended_values

if TYPE_CHECKING:
    from turboquant_core.ops.decode_attention.launch import Attention

MAX_QUERY_LEN = 16
# What a path may ask of where pages begin.
PAGE_ALIGNMENT = math.lcm(*(path.page_alignment for path in PATHS))
# Kernels compute tanh in float32, which errs by 6e-8: above, a softcap would round logits to steps of more than 1e-3.
SOFTCAP_RANGE = (1e-30, 1e4)
MAX_SCALE = 1e30


@not_traced
def decode_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: KVCacheLayout,
    *,
    scale: float | None = None,
    query_start_loc: torch.Tensor | None = None,
    max_query_len: int | None = None,
    seq_starts: torch.Tensor | None = None,
    seq_ends: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_transform: KeyTransform = IDENTITY,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    path: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the last tokens of every row on the row's stored keys and values.

    The query is rotated once and the output rotated back once; keys and values stay codes until they are in registers.
    Softmax is online in float32. The grid depends on shapes alone and nothing is read back, so a call can be captured
    in a CUDA graph and replayed with other lengths; work is shared evenly whatever the lengths are.

    Values of tensors are not read back to be checked. Whatever they are, nothing outside the pages is read and nothing
    outside the output written: a block outside the pages is read as the last one, lengths are at least 0 and
    end where a row's blocks do, offsets of query tokens lie within the query, and a row has 0 to `max_query_len` of
    them. What the output holds for tokens of no row is unspecified. Set TURBOQUANT_CHECK_VALUES=1 to have such values
    refused by name.

    Args:
        query: float16, bfloat16 or float32 [num_tokens, num_heads, head_dim], rows one after another; last stride 1.
            num_heads is a multiple of the layout's num_kv_heads.
        pages: uint8 [num_blocks, num_kv_heads, head_bytes].
        block_table: int32 [batch, max_blocks]; entries past a row's length are not used. None for a contiguous cache:
            row b is page b, and the layout's block_size is the longest row.
        seq_lens: int32 [batch]: stored tokens of a row, its own query tokens included. A row of length 0 gives zeros.
        layout: Where a slot's bytes lie. Its bits must be whole.
        scale: What logits are multiplied with; None is 1 / sqrt(head_dim).
        query_start_loc: int32 [batch + 1], the first token of every row; None when all rows have equally many.
        max_query_len: The most query tokens of a row, at most 16; needed with query_start_loc.
        seq_starts: int32 [batch], the first position of a row that may be seen, such as after left padding.
        seq_ends: int32 [batch], one past the last position of a row that may be seen, such as where its newest tokens
            are kept uncompressed. Past the length it is the length; at the start or before it nothing is seen.
            Positions, the window and query tokens are counted from seq_lens all the same. What is stored from there on
            does not matter: attention on it can be merged with this by the log-sum-exp.
        window: Positions that a token sees, itself included; None for all.
        softcap: Logits become softcap * tanh(logits / softcap); up to 10,000, where float32 still tells logits apart.
        sinks: float32 [num_heads], a logit of each head that takes weight and gives no value.
        key_transform: What keys went through before they were stored, one for all rows or one of each. Softmax does not
            see a mean, but softcap, sinks and the log-sum-exp do.
        out: Written instead of a new tensor: like `query`, with a last stride of 1; no part of it twice in memory, nor
            in `query` or among the pages.
        return_lse: Also return the natural log-sum-exp of the logits, float32 [num_tokens, num_heads]; minus infinity
            where nothing is seen.
        path: A name of `turboquant_core.ops.decode_attention.paths`; "auto" is the fastest that can run here.

    Returns:
        The output like `query`, and the log-sum-exp with `return_lse`.

    Raises:
        TypeError: If `key_transform` is none.
        ValueError: If a type, shape, stride, device or value does not fit, bits are fractional, or the path cannot run.
    """
    if window is not None:
        window = check_int("window", window, 1, remedy="Use None for no window.")
    if softcap is not None:
        softcap = check_number("softcap", softcap, *SOFTCAP_RANGE, "Use None for none.")
    if scale is not None:
        scale = check_number("scale", scale, -MAX_SCALE, MAX_SCALE, "Use None for 1 / sqrt(head_dim).")
    if max_query_len is not None:
        max_query_len = check_int("max_query_len", max_query_len, 0)
    arrays = {
        "seq_lens": seq_lens,
        "block_table": block_table,
        "query_start_loc": query_start_loc,
        "seq_starts": seq_starts,
        "seq_ends": seq_ends,
        "sinks": sinks,
    }
    check_is_key_transform(key_transform)
    numbers: dict[str, Any] = {
        "scale": layout.config.head_dim**-0.5 if scale is None else scale,
        # No row is longer.
        "window": window if window is not None and window < MAX_TOKENS else 0,
        "softcap": softcap or 0.0,
    }
    tensors = (query, pages, out, *arrays.values(), *key_transform.parts)
    plan = _plans.look_up(
        (layout, path, max_query_len, *numbers.values(), pages.data_ptr() % PAGE_ALIGNMENT),
        tensors,
        lambda: _plan(query, pages, out, arrays, key_transform, layout, max_query_len, path, numbers),
    )
    if checks_values():
        check_attended_values(arrays, key_transform, query.shape[0], plan.query_len, layout, len(pages))
    if out is not None:
        _check_apart(out, query, pages, plan)
    else:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if return_lse else None
    if plan.path is None:
        # No kernel has a gradient.
        with torch.no_grad():
            result, result_lse = reference_decode_attention(
                query,
                pages,
                block_table,
                seq_lens,
                layout,
                query_len=plan.query_len,
                query_start_loc=query_start_loc,
                seq_starts=seq_starts,
                seq_ends=seq_ends,
                sinks=sinks,
                key_transform=key_transform,
                **numbers,
            )
        out.copy_(result)
        if lse is not None:
            lse.copy_(result_lse)
    elif plan.attention is not None:
        # Triton launches on the current device, whatever the tensors' is.
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            plan.attention(
                query,
                pages,
                block_table,
                seq_lens,
                query_start_loc=query_start_loc,
                seq_starts=seq_starts,
                seq_ends=seq_ends,
                sinks=sinks,
                key_transform=key_transform,
                out=out,
                lse=lse,
            )
    return out if lse is None else (out, lse)


@dataclass(frozen=True)
class _Plan:
    """What is known of a call before its data.

    Attributes:
        query_len: The most query tokens of a row.
        path: What attends; None for the reference.
        attention: What it launches; None for the reference, and where there is nothing to do.
        query_extent: Bytes from the query's first element to the end of its last.
        pages_extent: The same for the pages.
        out_extent: The same for `out`.
    """

    query_len: int
    path: DecodePath | None
    attention: "Attention | None"
    query_extent: int
    pages_extent: int
    out_extent: int


_plans: KnownCalls[_Plan] = KnownCalls()


def _plan(
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor | None,
    arrays: Mapping[str, torch.Tensor | None],
    key_transform: KeyTransform,
    layout: KVCacheLayout,
    max_query_len: int | None,
    path: str,
    numbers: Mapping[str, Any],
) -> _Plan:
    """Check the arguments of a call, and plan it."""
    check_has_kernels(layout)
    check_pages(pages, layout)
    _check_query("query", query, layout)
    num_tokens, num_heads, _ = query.shape
    batch = _check_arrays(arrays, num_heads)
    transform = key_transform.tensors()
    check_key_transform(transform, layout, batch)
    for name, part in transform.items():
        _check_strides(name, part)
    block_table = arrays["block_table"]
    if block_table is None and len(pages) < batch:
        raise ValueError(f"pages hold {len(pages)} rows and seq_lens {batch}; without a block_table row b is page b")
    query_len = _query_len(num_tokens, batch, arrays["query_start_loc"], max_query_len)
    if out is not None:
        _check_query("out", out, layout)
        check_tensor("out", out, query.dtype, tuple(query.shape))
        check_no_overlap("out", out)
    check_one_device({"query": query, "pages": pages, "out": out, **arrays, **transform})
    chosen = choose_path(path, layout, query.device, pages)
    extents = extent(query), extent(pages), 0 if out is None else extent(out)
    if chosen is None or not query.numel() or not batch:
        return _Plan(query_len, chosen, None, *extents)
    from turboquant_core.ops.decode_attention.launch import choose_launch, plan

    num_columns = num_heads // layout.num_kv_heads * query_len
    max_row_tokens = layout.block_size * (1 if block_table is None else block_table.shape[1])
    launch = choose_launch(chosen, layout, batch, num_columns, max_row_tokens, query.device)
    attention = plan(query, pages, block_table, layout, chosen, launch, batch=batch, query_len=query_len, **numbers)
    return _Plan(query_len, chosen, attention, *extents)


def _check_apart(out: torch.Tensor, query: torch.Tensor, pages: torch.Tensor, plan: _Plan) -> None:
    out_at, query_at, pages_at = out.data_ptr(), query.data_ptr(), pages.data_ptr()
    out_end = out_at + plan.out_extent
    if pages_at < out_end and out_at < pages_at + plan.pages_extent:
        _refuse_shared(out_at, "pages", pages_at)
    if query_at < out_end and out_at < query_at + plan.query_extent and overlap(out, query):
        _refuse_shared(out_at, "query", query_at)


def _refuse_shared(out_at: int, name: str, at: int) -> NoReturn:
    raise ValueError(f"out, at {out_at:#x}, shares memory with {name}, at {at:#x}. Give a tensor of its own, or None.")


def _check_arrays(arrays: Mapping[str, torch.Tensor | None], num_heads: int) -> int:
    """Check what a call has beside query, pages and the transform of keys; the number of rows."""
    seq_lens = arrays["seq_lens"]
    assert seq_lens is not None
    check_tensor("seq_lens", seq_lens, torch.int32, (-1,))
    batch = len(seq_lens)
    expected = {
        "seq_lens": (torch.int32, (batch,)),
        "block_table": (torch.int32, (batch, -1)),
        "query_start_loc": (torch.int32, (batch + 1,)),
        "seq_starts": (torch.int32, (batch,)),
        "seq_ends": (torch.int32, (batch,)),
        "sinks": (torch.float32, (num_heads,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = arrays[name]
        if tensor is None:
            continue
        check_tensor(name, tensor, dtype, shape)
        _check_strides(name, tensor)
    return batch


def _check_strides(name: str, tensor: torch.Tensor) -> None:
    # A block table is often a view of a wider one.
    if tensor.stride(-1) != 1 or (name != "block_table" and not tensor.is_contiguous()):
        raise ValueError(f"{name} has strides {list(tensor.stride())} for {list(tensor.shape)}. Call contiguous().")


def _check_query(name: str, x: torch.Tensor, layout: KVCacheLayout) -> None:
    check_vector_dtype(name, x.dtype)
    check_tensor(name, x, x.dtype, (-1, -1, layout.config.head_dim))
    check_rows(name, x)
    if x.shape[1] == 0 or x.shape[1] % layout.num_kv_heads:
        raise ValueError(
            f"{name} has {x.shape[1]} heads; they must be a positive multiple of the {layout.num_kv_heads} KV heads"
        )


def _query_len(num_tokens: int, batch: int, query_start_loc: torch.Tensor | None, max_query_len: int | None) -> int:
    """The most query tokens of a row."""
    if query_start_loc is None:
        if num_tokens % max(batch, 1) or (batch == 0 and num_tokens):
            raise ValueError(
                f"query has {num_tokens} tokens for {batch} rows; without query_start_loc every row has equally many"
            )
        query_len = num_tokens // max(batch, 1)
        if max_query_len not in (None, query_len):
            raise ValueError(f"max_query_len is {max_query_len} and query has {query_len} tokens a row")
    elif max_query_len is None:
        raise ValueError("query_start_loc needs max_query_len: reading it back would wait for the device")
    else:
        query_len = max_query_len
    if query_len > MAX_QUERY_LEN or (query_len < 1 and num_tokens):
        raise ValueError(f"rows have up to {query_len} query tokens; decode attention takes 1 to {MAX_QUERY_LEN}")
    return query_len
