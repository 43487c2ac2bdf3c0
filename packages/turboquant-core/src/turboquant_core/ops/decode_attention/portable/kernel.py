"""Decode attention in plain Triton: runs in the interpreter and wherever Triton does."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.bounds import existing_block
from turboquant_core.ops._triton.codes import load_codes, look_up
from turboquant_core.ops.decode_attention.portable.lookup import (
    PARTS,
    permute_fp8,
    permute_halves,
    permute_int8,
)
from turboquant_core.ops.decode_attention.schedule import row_reach, share_start
from turboquant_core.ops.decode_attention.scores import scale_exponents, softcapped

LOWEST = tl.constexpr(-1e30)
INT8_FULL = tl.constexpr(PARTS["int8"].full)
INT8_LOW_UNIT = tl.constexpr(PARTS["int8"].low_unit)
FP8_FULL = tl.constexpr(PARTS["fp8"].full)
FP8_LOW_UNIT = tl.constexpr(PARTS["fp8"].low_unit)


@triton.jit(
    do_not_specialize=[
        "batch", "num_kv_heads", "block_table_stride", "query_len", "num_tokens", "row_capacity", "last_block",
    ]
)  # fmt: skip
def portable_kernel(
    operand,  # float16 [batch, num_kv_heads, num_columns, num_positions]: rotated queries over their length
    factor,  # float32 [batch, num_kv_heads, num_columns]: scores to log2 units
    bias,  # float32 like factor, or None: the key mean's score, needed for softcap
    key_codes,  # uint8 [pages, num_kv_heads, slots, key code bytes]
    value_codes,
    key_scales,  # float16 [pages, num_kv_heads, slots]
    value_scales,
    block_table,  # int32 [batch, max_blocks]; None when row b is page b
    seq_lens,  # int32 [batch]
    seq_starts,  # int32 [batch], or None
    query_start_loc,  # int32 [batch + 1], or None
    cu_tiles,  # int32 [batch + 1]
    key_entries,  # centroids: float16 [2^key_bits], or parts [2, 2^key_bits], or int32 words of sixteen
    value_entries,  # float16 [2^value_bits], or int32 words of sixteen
    partial,  # out, float32 [num_workers + batch, num_kv_heads, num_columns, num_positions]
    partial_stats,  # out, float32 [num_workers + batch, num_kv_heads, 2, num_columns]
    batch,
    num_kv_heads,
    block_table_stride,
    key_page_stride,
    key_head_stride,
    value_page_stride,
    value_head_stride,
    key_scale_page_stride,
    key_scale_head_stride,
    value_scale_page_stride,
    value_scale_head_stride,
    query_len,
    num_tokens,
    row_capacity,  # the most stored tokens of a row
    last_block,
    softcap,  # in log2 units; 0 for none
    key_unit,  # what key entries are multiplied with
    head_dim: tl.constexpr,
    padded_octet: tl.constexpr,
    key_bits: tl.constexpr,
    value_bits: tl.constexpr,
    key_code_stride: tl.constexpr,  # from slot to slot, in elements, like the next
    value_code_stride: tl.constexpr,
    key_scale_stride: tl.constexpr,
    value_scale_stride: tl.constexpr,
    group: tl.constexpr,
    num_columns: tl.constexpr,
    columns: tl.constexpr,
    block_size: tl.constexpr,
    tile: tl.constexpr,
    window: tl.constexpr,
    has_softcap: tl.constexpr,
    block_batch: tl.constexpr,
    key_product: tl.constexpr,
    key_permute: tl.constexpr,
    value_permute: tl.constexpr,
    widen: tl.constexpr,
    overlap: tl.constexpr,
):
    """Grid (num_workers, num_kv_heads * num_columns / columns).

    `key_product` is the type that queries and keys are multiplied in: "float16", "int8" or "fp8"; with `widen` the
    products of eight bits are taken in float32, for the interpreter, which rounds those of fp8.
    """
    num_positions: tl.constexpr = 8 * padded_octet
    octet: tl.constexpr = head_dim // 8
    if overlap:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    worker = tl.program_id(0)
    num_workers = tl.num_programs(0)
    head = tl.program_id(1) // (num_columns // columns)
    column = tl.program_id(1) % (num_columns // columns) * columns + tl.arange(0, columns)

    num_tiles = tl.load(cu_tiles + batch)
    at = share_start(worker, num_workers, num_tiles)
    share_end = share_start(worker + 1, num_workers, num_tiles)
    rows = tl.arange(0, block_batch)
    ends = tl.load(cu_tiles + 1 + rows, mask=rows < batch, other=2147483647)
    row = tl.sum((ends <= at).to(tl.int32), axis=0)
    position = tl.arange(0, num_positions)
    in_tile = tl.arange(0, tile)
    wide_head = head.to(tl.int64)

    while at < share_end:
        row_begin = tl.load(cu_tiles + row)
        row_end = tl.load(cu_tiles + row + 1)
        if row_end > at:
            length, start, row_len, first = row_reach(
                row, seq_lens, seq_starts, query_start_loc, query_len, num_tokens, row_capacity, window
            )
            begin = first // tile + at - row_begin
            end = begin + tl.minimum(share_end, row_end) - at

            used = column < row_len * group
            place = (row.to(tl.int64) * num_kv_heads + head) * num_columns + column
            query = tl.load(operand + place[:, None] * num_positions + position[None, :], mask=used[:, None], other=0.0)
            high, low, query_unit = _split_query(query, key_product)
            scale = tl.load(factor + place, mask=used, other=0.0) * query_unit * key_unit
            shift = tl.zeros([columns], tl.float32)
            if has_softcap and bias is not None:
                shift = tl.load(bias + place, mask=used, other=0.0)
            last = length - row_len + column // group

            top = tl.full([columns], LOWEST, tl.float32)
            total = tl.zeros([columns], tl.float32)
            result = tl.zeros([columns, num_positions], tl.float32)
            for index in range(begin, end):
                token = index * tile + in_tile
                valid = token < length
                if block_table is None:
                    page = (tl.zeros([tile], tl.int32) + row).to(tl.int64)
                    slot = tl.where(valid, token, 0).to(tl.int64)
                else:
                    blocks = block_table + row.to(tl.int64) * block_table_stride
                    block = tl.load(blocks + token // block_size, mask=valid, other=0)
                    page = existing_block(block, last_block).to(tl.int64)
                    slot = (token % block_size).to(tl.int64)
                key_rows = key_codes + page * key_page_stride + wide_head * key_head_stride
                codes = load_codes(key_rows + slot * key_code_stride, valid, key_bits, tile, octet, padded_octet)
                root_at = key_scales + page * key_scale_page_stride + wide_head * key_scale_head_stride
                root = tl.load(root_at + slot * key_scale_stride, mask=valid, other=0.0).to(tl.float32)
                score = _key_product(high, low, codes, key_entries, key_bits, key_product, key_permute, widen)
                score = score * scale[:, None] * (root * root)[None, :]
                if has_softcap:
                    score = softcapped(score + shift[:, None], softcap)
                seen = (token[None, :] <= last[:, None]) & (token >= start)[None, :] & used[:, None]
                if window > 0:
                    seen = seen & (token[None, :] > last[:, None] - window)
                score = tl.where(seen, score, float("-inf"))

                root_at = value_scales + page * value_scale_page_stride + wide_head * value_scale_head_stride
                root = tl.load(root_at + slot * value_scale_stride, mask=valid, other=0.0).to(tl.float32)
                value_scale = root * root
                highest = tl.maximum(top, tl.max(score + scale_exponents(value_scale)[None, :], axis=1))
                rescale = tl.exp2(top - highest)
                weight = tl.exp2(score - highest[:, None])
                total = total * rescale + tl.sum(weight, axis=1)
                value_rows = value_codes + page * value_page_stride + wide_head * value_head_stride
                codes = load_codes(value_rows + slot * value_code_stride, valid, value_bits, tile, octet, padded_octet)
                values = _look_up_halves(codes, value_entries, value_bits, value_permute)
                # At most about one, whatever the value scales are: `top` counts them in.
                weight = (weight * value_scale[None, :]).to(tl.float16)
                result = tl.dot(weight, values, result * rescale[:, None])
                top = highest

            slot = ((worker + row).to(tl.int64) * num_kv_heads + head) * num_columns
            tl.store(partial + (slot + column)[:, None] * num_positions + position[None, :], result)
            tl.store(partial_stats + 2 * slot + column, top)
            tl.store(partial_stats + 2 * slot + num_columns + column, total)
            at += end - begin
        row += 1


@triton.jit
def _split_query(query, kind: tl.constexpr):
    """A float16 query as it is, or as its two parts of eight bits; and the unit [columns] of the parts."""
    if kind == "float16":
        return query, query, tl.full([query.shape[0]], 1.0, tl.float32)
    else:
        wide = query.to(tl.float32)
        size = tl.max(tl.abs(wide), axis=1)
        size = tl.where(size > 0, size, 1.0)
        if kind == "int8":
            unit = size / INT8_FULL
            scaled = wide / unit[:, None]
            high = tl.floor(scaled + 0.5)
            low = tl.floor((scaled - high) / INT8_LOW_UNIT + 0.5)
            return high.to(tl.int8), low.to(tl.int8), unit
        else:
            unit = size / FP8_FULL
            scaled = wide / unit[:, None]
            high = _three_bits(scaled)
            low = _three_bits((scaled - high) / FP8_LOW_UNIT)
            return high.to(tl.float8e4nv), low.to(tl.float8e4nv), unit


@triton.jit
def _three_bits(x):
    """float32 rounded to e4m3's three bits behind the point: the interpreter's cast does not carry."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _key_product(
    high, low, codes, entries, bits: tl.constexpr, kind: tl.constexpr, permute: tl.constexpr, widen: tl.constexpr
):
    """Scores, float32 [columns, tokens], in units of the query's times the key entries'.

    Of (high + low)(high + low) the product of the two low parts is left out, which is below float16's rounding.
    """
    if kind == "float16":
        return tl.dot(high, tl.trans(_look_up_halves(codes, entries, bits, permute)))
    else:
        if permute and kind == "int8":
            key_high = permute_int8(codes, entries)
            key_low = permute_int8(codes, entries + 4)
        elif permute:
            key_high = permute_fp8(codes, entries)
            key_low = permute_fp8(codes, entries + 4)
        else:
            entry = tl.arange(0, 1 << bits)
            key_high = look_up(tl.load(entries + entry), codes)
            key_low = look_up(tl.load(entries + (1 << bits) + entry), codes)
        low_unit: tl.constexpr = INT8_LOW_UNIT if kind == "int8" else FP8_LOW_UNIT
        return _eight_bit_product(high, low, tl.trans(key_high), tl.trans(key_low), low_unit, widen)


@triton.jit
def _eight_bit_product(high, low, key_high, key_low, low_unit: tl.constexpr, widen: tl.constexpr):
    if widen:
        wide_high = high.to(tl.float32)
        wide_key = key_high.to(tl.float32)
        cross = tl.dot(low.to(tl.float32), wide_key) + tl.dot(wide_high, key_low.to(tl.float32))
        return tl.dot(wide_high, wide_key) + cross * low_unit
    else:
        cross = tl.dot(low, key_high).to(tl.float32) + tl.dot(high, key_low).to(tl.float32)
        return tl.dot(high, key_high).to(tl.float32) + cross * low_unit


@triton.jit
def _look_up_halves(codes, entries, bits: tl.constexpr, permute: tl.constexpr):
    """float16 centroids of codes."""
    if permute:
        return permute_halves(codes, entries)
    else:
        return look_up(tl.load(entries + tl.arange(0, 1 << bits)), codes)
