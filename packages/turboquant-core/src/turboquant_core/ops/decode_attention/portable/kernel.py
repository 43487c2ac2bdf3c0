"""Decode attention in plain Triton: runs in the interpreter and wherever Triton does."""

import triton
import triton.language as tl

from turboquant_core.ops._triton.bounds import existing_block
from turboquant_core.ops._triton.codes import load_codes, load_halves, load_scales, look_up
from turboquant_core.ops._triton.overlap import wait_for_previous_kernel
from turboquant_core.ops._triton.softcap import softcapped
from turboquant_core.ops.decode_attention.call import AttendCounts
from turboquant_core.ops.decode_attention.portable.lookup import (
    PARTS,
    permute_fp8,
    permute_halves,
    permute_int8,
)
from turboquant_core.ops.decode_attention.schedule import row_reach, share_start
from turboquant_core.ops.decode_attention.scores import scale_exponents, score_scale

LOWEST = tl.constexpr(-1e30)
INT8_FULL = tl.constexpr(PARTS["int8"].full)
INT8_LOW_UNIT = tl.constexpr(PARTS["int8"].low_unit)
FP8_FULL = tl.constexpr(PARTS["fp8"].full)
FP8_LOW_UNIT = tl.constexpr(PARTS["fp8"].low_unit)


@triton.jit(do_not_specialize=AttendCounts._fields)
def portable_kernel(
    tensors,  # see `AttendTensors`
    operand,  # see `prepare_kernel`, like the next
    factor,
    batch, num_tokens, query_len, row_capacity, last_block, block_table_stride,  # see `AttendCounts`
    key_entries,  # of each group of channels its centroids: float16 [2^bits], or parts [2, 2^bits], or int32 words
    value_entries,  # float16 [2^value_bits], or int32 words of sixteen
    softcap,  # in log2 units; 0 for none
    key_units,  # what key entries are multiplied with
    layout: tl.constexpr,
    sizes: tl.constexpr,  # see `AttendSizes`
    padded_octet: tl.constexpr,
    key_product: tl.constexpr,
    key_permutes: tl.constexpr,
    value_permute: tl.constexpr,
    widen: tl.constexpr,
):  # fmt: skip
    """Grid (num_workers, num_kv_heads * num_columns / columns).

    `key_product` is the type that queries and keys are multiplied in: "float16", "int8" or "fp8"; with `widen` the
    products of eight bits are taken in float32, for the interpreter, which rounds those of fp8.
    """
    keys: tl.constexpr = layout.stored_keys
    values: tl.constexpr = layout.stored_values
    octet: tl.constexpr = layout.head_dim // 8
    num_positions: tl.constexpr = sizes.num_positions
    num_columns: tl.constexpr = sizes.num_columns
    columns: tl.constexpr = sizes.columns
    tile: tl.constexpr = sizes.tile
    window: tl.constexpr = sizes.window
    if sizes.overlap:
        wait_for_previous_kernel()
    worker = tl.program_id(0)
    num_workers = tl.num_programs(0)
    head = tl.program_id(1) // (num_columns // columns)
    column = tl.program_id(1) % (num_columns // columns) * columns + tl.arange(0, columns)

    num_tiles = tl.load(tensors.cu_tiles + batch)
    at = share_start(worker, num_workers, num_tiles)
    share_end = share_start(worker + 1, num_workers, num_tiles)
    rows = tl.arange(0, sizes.block_batch)
    ends = tl.load(tensors.cu_tiles + 1 + rows, mask=rows < batch, other=2147483647)
    row = tl.sum((ends <= at).to(tl.int32), axis=0)
    position = tl.arange(0, num_positions)
    in_tile = tl.arange(0, tile)
    pages = tensors.pages + head.to(tl.int64) * tensors.page_head_stride

    while at < share_end:
        row_end = tl.load(tensors.cu_tiles + row + 1)
        if row_end > at:
            length, start, token_end, row_len, first, _ = row_reach(
                row, True, tensors.seq_lens, tensors.seq_starts, tensors.seq_ends, tensors.query_start_loc, query_len,
                num_tokens, row_capacity, tile, window,
            )  # fmt: skip
            begin = first // tile + at - tl.load(tensors.cu_tiles + row)
            end = begin + tl.minimum(share_end, row_end) - at
            used = column < row_len * sizes.group
            place = (row.to(tl.int64) * layout.num_kv_heads + head) * num_columns + column
            query_rows = operand + place * num_positions
            scale = tl.load(factor + place, mask=used, other=0.0)
            if keys.split:
                high, low, query_unit = _load_query(query_rows, used, num_positions // 2, key_product)
                second_high, second_low, second_unit = _load_query(
                    query_rows + num_positions // 2, used, num_positions // 2, key_product
                )
                second_scale = scale * second_unit * key_units[1]
            else:
                high, low, query_unit = _load_query(query_rows, used, num_positions, key_product)
            scale = scale * query_unit * key_units[0]
            shift = tl.zeros([columns], tl.float32)
            if sizes.has_softcap and tensors.bias is not None:
                shift = tl.load(tensors.bias + place, mask=used, other=0.0)
            last = length - row_len + column // sizes.group

            top = tl.full([columns], LOWEST, tl.float32)
            total = tl.zeros([columns], tl.float32)
            result = tl.zeros([columns, num_positions], tl.float32)
            for index in range(begin, end):
                token = index * tile + in_tile
                valid = token < token_end
                if tensors.block_table is None:
                    page = (tl.zeros([tile], tl.int32) + row).to(tl.int64)
                    slot = tl.where(valid, token, 0).to(tl.int64)
                else:
                    blocks = tensors.block_table + row.to(tl.int64) * block_table_stride
                    block = tl.load(blocks + token // layout.block_size, mask=valid, other=0)
                    page = existing_block(block, last_block).to(tl.int64)
                    slot = (token % layout.block_size).to(tl.int64)
                head_rows = pages + page * tensors.page_stride
                code_rows = head_rows + keys.codes + slot * keys.code_stride
                scale_rows = head_rows + keys.scales + slot * keys.scale_stride
                if keys.split:
                    codes, second_codes = load_halves(code_rows, valid, keys.bits, tile, octet // 2, padded_octet // 2)
                    score = _scores(
                        high, low, scale, codes, scale_rows, valid, key_entries[0], keys.bits + 1, key_product,
                        key_permutes[0], widen,
                    )  # fmt: skip
                    score += _scores(
                        second_high, second_low, second_scale, second_codes, scale_rows + 2, valid, key_entries[1],
                        keys.bits - 1, key_product, key_permutes[1], widen,
                    )  # fmt: skip
                else:
                    codes = load_codes(code_rows, valid, keys.bits, tile, octet, padded_octet)
                    score = _scores(
                        high, low, scale, codes, scale_rows, valid, key_entries[0], keys.bits, key_product,
                        key_permutes[0], widen,
                    )  # fmt: skip
                if sizes.has_softcap:
                    score = softcapped(score + shift[:, None], softcap)
                seen = (token[None, :] <= last[:, None]) & (token >= start)[None, :] & used[:, None]
                if window > 0:
                    seen = seen & (token[None, :] > last[:, None] - window)
                if tensors.seq_ends is not None:
                    seen = seen & valid[None, :]
                score = tl.where(seen, score, float("-inf"))

                value_scale = load_scales(head_rows + values.scales + slot * values.scale_stride, valid)
                highest = tl.maximum(top, tl.max(score + scale_exponents(value_scale)[None, :], axis=1))
                rescale = tl.exp2(top - highest)
                weight = tl.exp2(score - highest[:, None])
                total = total * rescale + tl.sum(weight, axis=1)
                code_rows = head_rows + values.codes + slot * values.code_stride
                value_codes = load_codes(code_rows, valid, values.bits, tile, octet, padded_octet)
                looked_up = _look_up_halves(value_codes, value_entries, values.bits, value_permute)
                # At most about one, whatever the value scales are: `top` counts them in.
                weight = (weight * value_scale[None, :]).to(tl.float16)
                result = tl.dot(weight, looked_up, result * rescale[:, None])
                top = highest

            slot = ((worker + row).to(tl.int64) * layout.num_kv_heads + head) * num_columns
            tl.store(tensors.partial + (slot + column)[:, None] * num_positions + position[None, :], result)
            tl.store(tensors.stats + 2 * slot + column, top)
            tl.store(tensors.stats + 2 * slot + num_columns + column, total)
            at += end - begin
        row += 1


@triton.jit
def _load_query(rows, used, count: tl.constexpr, kind: tl.constexpr):
    """`count` positions of rotated queries, as `_split_query` gives them."""
    position = tl.arange(0, count)
    return _split_query(tl.load(rows[:, None] + position[None, :], mask=used[:, None], other=0.0), kind)


@triton.jit
def _scores(
    high, low, scale, codes, scale_rows, valid, entries,
    bits: tl.constexpr, kind: tl.constexpr, permute: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    """What a group of channels adds to scores, float32 [columns, tokens]."""
    scales = load_scales(scale_rows, valid)
    product = _key_product(high, low, codes, entries, bits, kind, permute, widen)
    return product * scale[:, None] * score_scale(scales)[None, :]


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
