"""Decode attention in Gluon: one warp a worker, codes looked up in the tensor cores' own registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from turboquant_core.ops._triton.lanes import lane_constant
from turboquant_core.ops._triton.softcap import softcapped
from turboquant_core.ops.decode_attention.call import AttendCounts
from turboquant_core.ops.decode_attention.fragment.hadamard import vector_layout
from turboquant_core.ops.decode_attention.fragment.operands import (
    column_of_heads,
    columns_of_heads,
    half_operands,
    head_layout,
    head_of_column,
    key_operand,
    key_word_layout,
    let_next_kernel_start,
    mma_layout,
    parts_of_heads,
    value_columns,
    value_operand,
    value_word_layout,
    wait_for_previous_kernel,
    weight_operand,
)
from turboquant_core.ops.decode_attention.fragment.query import load_part, load_query, query_operand
from turboquant_core.ops.decode_attention.fragment.tiles import (
    allocate_roots,
    allocate_words,
    copy_tile,
    packed_bits,
    packed_channels,
    read_half_roots,
    read_halves,
    read_roots,
    read_words,
    tile_pages,
)
from turboquant_core.ops.decode_attention.schedule import row_reach, row_tiles, share_start
from turboquant_core.ops.decode_attention.scores import scale_exponents, score_scale

LOWEST = gl.constexpr(-1e30)


@gluon.jit(do_not_specialize=AttendCounts._fields)
def fragment_kernel(
    tensors,  # see `AttendTensors`; all but `pages` and what says which of them is written
    query,  # [num_tokens, num_heads, head_dim]
    transform,  # see `AttendTransform`
    query_token_stride,
    query_head_stride,
    batch, num_tokens, query_len, row_capacity, last_block, block_table_stride,  # see `AttendCounts`
    negative,  # int32 [head_dim], see `rotated`
    scale,  # of a logit
    score_scale,  # the same, times the unit of products
    table,  # int32 [constants, 32]: look-up constants of keys, then of values, for each lane
    softcap,  # in log2 units; 0 for none
    layout: gl.constexpr,
    sizes: gl.constexpr,  # see `AttendSizes`
    stages: gl.constexpr,
    rounds: gl.constexpr,
    swaps: gl.constexpr,  # from channels to positions of keys, see `bit_swaps`; of each group, like the next two
    key_offsets: gl.constexpr,  # see `query_operand`
    key_units: gl.constexpr,  # of products, over the first one's
    key_asm: gl.constexpr,
    key_constraints: gl.constexpr,
    key_constants: gl.constexpr,
    value_asm: gl.constexpr,
    value_constraints: gl.constexpr,
    value_constants: gl.constexpr,
):  # fmt: skip
    """Grid (num_workers, num_kv_heads * num_columns / columns), one warp each."""
    mma: gl.constexpr = mma_layout()
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    by_row: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    by_head: gl.constexpr = gl.SliceLayout(0, head_layout(sizes.columns))
    tile_tokens: gl.constexpr = sizes.tile
    subtiles: gl.constexpr = tile_tokens // 16
    head_dim: gl.constexpr = layout.head_dim
    keys: gl.constexpr = layout.stored_keys
    values: gl.constexpr = layout.stored_values
    num_columns: gl.constexpr = sizes.num_columns
    columns: gl.constexpr = sizes.columns
    window: gl.constexpr = sizes.window
    has_ends: gl.constexpr = tensors.seq_ends is not None
    # Without a table a row has one page, however long that is.
    block_size: gl.constexpr = 0 if tensors.block_table is None else layout.block_size
    # What no kernel before this one writes comes while it waits for them.
    key_table = ()
    for i in gl.static_range(key_constants):
        key_table = key_table + (lane_constant(table, i),)
    value_table = ()
    for i in gl.static_range(value_constants):
        value_table = value_table + (lane_constant(table, key_constants + i),)
    if sizes.overlap:
        wait_for_previous_kernel()
        let_next_kernel_start()
    worker = gl.program_id(0)
    num_workers = gl.num_programs(0)
    head = gl.program_id(1) // (num_columns // columns)
    first_column = gl.program_id(1) % (num_columns // columns) * columns

    rows = gl.arange(0, sizes.block_batch, by_row)
    counts = row_tiles(
        rows, rows < batch, tensors.seq_lens, tensors.seq_starts, tensors.seq_ends, tensors.query_start_loc, query_len,
        num_tokens, row_capacity, tile_tokens, window,
    )  # fmt: skip
    ends = gl.associative_scan(counts, 0, _plus)
    num_tiles = gl.sum(counts, axis=0)
    if (worker == 0) & (gl.program_id(1) == 0):
        gl.store(tensors.cu_tiles, 0)
        gl.store(tensors.cu_tiles + 1 + rows, ends, mask=rows < batch)
    tile = share_start(worker, num_workers, num_tiles)
    share_end = share_start(worker + 1, num_workers, num_tiles)
    row = gl.sum((ends <= tile).to(gl.int32), axis=0)
    row_begin = gl.sum(gl.where(ends <= tile, counts, 0), axis=0)

    pages = tensors.pages + head.to(gl.int64) * tensors.page_head_stride
    buffers = (
        allocate_words(stages, subtiles, packed_channels(keys, head_dim), packed_bits(keys)),
        allocate_words(stages, subtiles, head_dim, values.bits),
        allocate_roots(stages, subtiles, keys.split),
        allocate_roots(stages, subtiles, False),
    )
    column = first_column + gl.arange(0, columns, by_head)
    channel = gl.arange(0, head_dim, gl.SliceLayout(1, mma))[:, None]
    output_column = gl.arange(0, value_columns(columns), by_column)
    output_head = first_column + head_of_column(output_column, columns)

    while tile < share_end:
        length, start, token_end, row_len, first, count = row_reach(
            row, True, tensors.seq_lens, tensors.seq_starts, tensors.seq_ends, tensors.query_start_loc, query_len,
            num_tokens, row_capacity, tile_tokens, window,
        )  # fmt: skip
        row_end = row_begin + count
        if row_end > tile:
            begin = first // tile_tokens + tile - row_begin
            end = begin + gl.minimum(share_end, row_end) - tile
            # Kept from row to row they would take four times the registers: what is made of them would be kept.
            order = gl.arange(0, head_dim, gl.SliceLayout(0, vector_layout(columns, head_dim)))
            signs = gl.load(negative + order)
            if transform.order is not None:
                order = load_part(transform.order, row, transform.order_row_stride, head, head_dim, order).to(gl.int32)
            stored = load_query(
                query, query_token_stride, query_head_stride, tensors.query_start_loc, row, head, first_column, row_len,
                num_tokens, query_len, order, sizes.group, columns,
            )  # fmt: skip
            mean = None
            if transform.mean is not None:
                mean = load_part(transform.mean, row, transform.mean_row_stride, head, head_dim, order)
            key_scale = None
            if transform.scale is not None:
                key_scale = load_part(transform.scale, row, transform.scale_row_stride, head, head_dim, order)
            if block_size == 0:
                blocks = row
            else:
                blocks = tensors.block_table + row.to(gl.int64) * block_table_stride
            # Tiles that every query token sees in full need no mask. The order of tiles does not matter.
            if window > 0:
                first = gl.maximum(start, length - window)
            full_begin = gl.minimum(gl.maximum(begin, (first + tile_tokens - 1) // tile_tokens), end)
            seen_by_all = length - row_len + 1
            if has_ends:
                seen_by_all = gl.minimum(seen_by_all, token_end)
            full_end = gl.maximum(gl.minimum(end, seen_by_all // tile_tokens), full_begin)
            # Those that need one come last.
            num_full = full_end - full_begin
            last = end - begin - 1
            for ahead in gl.static_range(stages - 1):
                tile_ahead = _nth_tile(gl.minimum(ahead, last), begin, full_begin, num_full)
                copy_tile(
                    tile_ahead, ahead, tile_pages(tile_ahead, token_end, blocks, last_block, block_size, subtiles),
                    token_end, pages, tensors.page_stride, buffers, layout, block_size, subtiles,
                )  # fmt: skip
            next_tile = _nth_tile(gl.minimum(stages - 1, last), begin, full_begin, num_full)
            numbers = tile_pages(next_tile, token_end, blocks, last_block, block_size, subtiles)
            # While the first tiles are on their way.
            operands, lackings, factor, bias = query_operand(
                stored, mean, key_scale, signs, scale, score_scale, rounds, swaps, key_offsets
            )
            if tensors.bias is not None:
                # Every worker of the row writes the same.
                place = (row.to(gl.int64) * layout.num_kv_heads + head) * num_columns
                gl.store(tensors.bias + place + column, bias)
            position = length - row_len + column // sizes.group
            top = gl.full([columns], LOWEST, gl.float32, by_head)
            total = gl.zeros([16, columns], gl.float32, head_layout(columns))
            result = gl.zeros([head_dim, value_columns(columns)], gl.float32, mma)
            for masked in gl.static_range(2):
                for turn in range(num_full if masked else 0, last + 1 if masked else num_full):
                    async_copy.wait_group(stages - 2)
                    copy_tile(
                        next_tile, (turn + stages - 1) % stages, numbers, token_end, pages, tensors.page_stride,
                        buffers, layout, block_size, subtiles,
                    )  # fmt: skip
                    next_tile = _nth_tile(gl.minimum(turn + stages, last), begin, full_begin, num_full)
                    numbers = tile_pages(next_tile, token_end, blocks, last_block, block_size, subtiles)
                    top, total, result = _attend_tile(
                        _nth_tile(turn, begin, full_begin, num_full) if masked else full_begin + turn,
                        turn % stages, buffers, masked == 1, token_end, start, position, operands, lackings, factor,
                        bias, softcap, top, total, result, key_table, value_table, head_dim, keys, values.bits,
                        key_units, columns, subtiles, window, has_ends, sizes.has_softcap, key_asm, key_constraints,
                        value_asm, value_constraints,
                    )  # fmt: skip
            async_copy.wait_group(0)

            slot = ((worker + row).to(gl.int64) * layout.num_kv_heads + head) * num_columns
            partial = tensors.partial + (slot + output_head[None, :]) * head_dim + channel
            if columns == 4:
                gl.store(partial, result, mask=output_column[None, :] % 2 == 0)
            else:
                gl.store(partial, result)
            gl.store(tensors.stats + 2 * slot + column, top)
            gl.store(tensors.stats + 2 * slot + num_columns + column, gl.sum(total, axis=0))
            tile += end - begin
        row_begin = row_end
        row += 1


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _nth_tile(n, begin, full_begin, num_full):
    """Of the tiles from `begin` on the nth, if the num_full ones from `full_begin` on come first."""
    edge = begin + n - num_full
    edge += gl.where(edge >= full_begin, num_full, 0)
    return gl.where(n < num_full, full_begin + n, edge)


@gluon.jit
def _attend_tile(
    index, stage, buffers, masked: gl.constexpr, token_end, start, position, queries, lackings, scale, shift, softcap,
    top, total, result, key_table, value_table,
    head_dim: gl.constexpr, stored_keys: gl.constexpr, value_bits: gl.constexpr, key_units: gl.constexpr,
    columns: gl.constexpr, subtiles: gl.constexpr, window: gl.constexpr, has_ends: gl.constexpr,
    has_softcap: gl.constexpr, key_asm: gl.constexpr, key_constraints: gl.constexpr, value_asm: gl.constexpr,
    value_constraints: gl.constexpr,
):  # fmt: skip
    """One tile of online softmax.

    `top` is the reference exponent of each column: the largest log2 of weight times value scale so far, so that the
    weights that multiply value codes are at most about one and fit float16, whatever the scales are.
    """
    by_head: gl.constexpr = head_layout(columns)
    token = gl.arange(0, 16, gl.SliceLayout(1, by_head))
    zeros = gl.zeros([16, columns], gl.float32, by_head)
    words: gl.constexpr = head_dim // 8
    row_layout: gl.constexpr = gl.SliceLayout(1, by_head)
    scores = ()
    value_scale = ()
    scale_tile = scale[None, :] + zeros
    for j in gl.static_range(subtiles):
        at = stage * subtiles + j
        token_at = (index * subtiles + j) * 16 + token
        if stored_keys.split:
            key_words = read_halves(buffers[0], at, key_word_layout(words // 2), stored_keys.bits)
            first, second = half_operands(
                key_words, key_table, head_dim // 2, key_asm, key_constraints, stored_keys.bits > 2
            )
            root, second_root = read_half_roots(buffers[2], at, row_layout, masked, token_at < token_end)
            score = _products(first, queries[0], lackings[0], columns) * score_scale(root * root)[:, None]
            second_scale = score_scale(second_root * second_root) * key_units[1]
            score += _products(second, queries[1], lackings[1], columns) * second_scale[:, None]
        else:
            key_words = read_words(buffers[0], at, key_word_layout(words), head_dim, stored_keys.bits)
            keys = key_operand(key_words, key_table, head_dim, key_asm, key_constraints, stored_keys.bits > 4)
            root = read_roots(buffers[2], at, row_layout, masked, token_at < token_end)
            score = _products(keys, queries[0], lackings[0], columns) * score_scale(root * root)[:, None]
        if has_softcap:
            score = softcapped(score * scale_tile + shift[None, :], softcap)
        elif masked:
            # Of any sign: a mask comes after it.
            score = score * scale_tile
        if masked:
            seen = (token_at[:, None] <= position[None, :]) & (token_at[:, None] >= start)
            if window > 0:
                seen = seen & (token_at[:, None] > position[None, :] - window)
            if has_ends:
                seen = seen & (token_at < token_end)[:, None]
            score = gl.where(seen, score, float("-inf"))
        root = read_roots(buffers[3], at, row_layout, masked, token_at < token_end)
        weight_scale = root * root
        exponent = scale_exponents(weight_scale)
        if has_softcap or masked:
            reach = score + exponent[:, None]
        else:
            reach = gl.fma(score, scale_tile, exponent[:, None] + zeros)
        if j == 0:
            reached = reach
        else:
            reached = gl.maximum(reached, reach)
        scores = scores + (score,)
        value_scale = value_scale + (weight_scale,)

    highest = gl.maximum(top, gl.max(reached, axis=0))
    rescale = gl.exp2(top - highest)
    result = result * column_of_heads(rescale, columns)[None, :]
    total = total * rescale[None, :]
    floor = zeros - highest[None, :]
    for j in gl.static_range(subtiles):
        if has_softcap or masked:
            weight = gl.exp2(scores[j] + floor)
        else:
            weight = gl.exp2(gl.fma(scores[j], scale_tile, floor))
        total += weight
        weights = columns_of_heads(weight * value_scale[j][:, None], columns)
        right = weight_operand(weights, value_columns(columns))
        value_words = read_words(buffers[1], stage * subtiles + j, value_word_layout(words), head_dim, value_bits)
        values = value_operand(value_words, value_table, head_dim, value_asm, value_constraints, value_bits > 4)
        result = mma_v2(values, right, result)
    return highest, total, result


@gluon.jit
def _products(keys, query, lacking, columns: gl.constexpr):
    """Products of keys with both parts of every query, float32 [16 tokens, columns]."""
    lacking_tile = lacking[None, :] + gl.zeros([16, 2 * columns], gl.int32, mma_layout())
    high, low = parts_of_heads(mma_v2(keys, query, lacking_tile), columns)
    return (high * 128 + low).to(gl.float32)
