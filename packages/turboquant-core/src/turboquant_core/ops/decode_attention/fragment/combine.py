"""After attention: merge a query head's partial results by log-sum-exp, un-rotate, write the output."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_core.ops.decode_attention.fragment.hadamard import bits_in_lane, unrotated, vector_layout
from turboquant_core.ops.decode_attention.fragment.operands import let_next_kernel_start, wait_for_previous_kernel
from turboquant_core.ops.decode_attention.schedule import owner, query_heads

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def _slot_layout(slots, head_dim, warps):
    """[slots, head_dim]: vectors over a warp's lanes as in `vector_layout`; slots in registers, then over warps."""
    bits, in_lane = head_dim.bit_length() - 1, bits_in_lane(1, head_dim)
    slot_bits, warp_bits = slots.bit_length() - 1, warps.bit_length() - 1
    registers = [[0, 1 << bit] for bit in range(in_lane)] + [[1 << i, 0] for i in range(slot_bits - warp_bits)]
    over_warps = [[1 << i, 0] for i in range(slot_bits - warp_bits, slot_bits)]
    return gl.DistributedLinearLayout(
        registers, [[0, 1 << bit] for bit in range(in_lane, bits)], over_warps, [], [slots, head_dim]
    )


@gluon.jit(do_not_specialize=["batch", "num_tokens", "query_len", "num_workers"])
def combine_kernel(
    tensors,  # see `AttendTensors`
    ends,  # see `AttendEnds`
    out_strides,  # of tokens and of heads
    negative,  # int32 [head_dim], see `unrotated`, in the order of positions
    channels,  # int32 [head_dim], the channel of every position
    unit,  # of partial results
    batch, num_tokens, query_len,  # see `AttendCounts`
    num_workers,
    layout: gl.constexpr,
    sizes: gl.constexpr,  # see `AttendSizes`
    rounds: gl.constexpr,
    slots: gl.constexpr,  # partial results on their way together
):  # fmt: skip
    """One program for each query head, counted through all tokens of all rows."""
    num_kv_heads: gl.constexpr = layout.num_kv_heads
    num_heads: gl.constexpr = num_kv_heads * sizes.group
    num_columns: gl.constexpr = sizes.num_columns
    head_dim: gl.constexpr = layout.head_dim
    num_warps: gl.constexpr = gl.num_warps()
    by_place: gl.constexpr = _slot_layout(slots, head_dim, num_warps)
    by_slot: gl.constexpr = gl.SliceLayout(1, by_place)
    by_position: gl.constexpr = gl.SliceLayout(0, by_place)
    position = gl.arange(0, head_dim, by_position)
    # What no kernel before this one writes comes while it waits for them.
    vector: gl.constexpr = vector_layout(1, head_dim, num_warps)
    in_vector = gl.arange(0, head_dim, gl.SliceLayout(0, vector))
    negative = gl.load(negative + in_vector)
    channel = gl.load(channels + in_vector)
    if sizes.overlap:
        wait_for_previous_kernel()
        let_next_kernel_start()
    row, head, column, token, used = query_heads(
        gl.program_id(0), tensors.query_start_loc, batch, num_heads, num_tokens, query_len, sizes.group
    )
    if used:
        kv_head = head // sizes.group
        num_tiles = gl.load(tensors.cu_tiles + batch)
        row_begin = gl.load(tensors.cu_tiles + row)
        row_end = gl.load(tensors.cu_tiles + row + 1)
        begin = owner(row_begin, num_workers, num_tiles)
        end = begin
        offset = 0.0
        if row_end > row_begin:
            end = owner(row_end - 1, num_workers, num_tiles) + 1
            # Scores were those of centred keys: the mean's own score shifts every logit of a head alike.
            if tensors.bias is not None and not sizes.has_softcap:
                offset = gl.load(tensors.bias + (row.to(gl.int64) * num_kv_heads + kv_head) * num_columns + column)

        top = float("-inf")
        total = 0.0
        merged = gl.zeros([head_dim], gl.float32, by_position)
        for base in range(begin, end, slots):
            worker = base + gl.arange(0, slots, by_slot)
            real = worker < end
            slot = ((worker + row).to(gl.int64) * num_kv_heads + kv_head) * num_columns
            exponent = gl.load(tensors.stats + 2 * slot + column, mask=real, other=float("-inf"))
            amount = gl.load(tensors.stats + 2 * slot + num_columns + column, mask=real, other=0.0)
            part = gl.load(
                tensors.partial + ((slot + column) * head_dim)[:, None] + position[None, :],
                mask=real[:, None],
                other=0.0,
            )
            top, rescale, weight = _weights(top, exponent)
            total = total * rescale + gl.sum(weight * amount, axis=0)
            merged = merged * rescale + gl.sum(weight[:, None] * part, axis=0)

        if ends.sinks is not None:
            sink = gl.load(ends.sinks + head).to(gl.float32) / LN_2 - offset
            top, rescale, weight = _weights(top, sink)
            total = total * rescale + weight
            merged = merged * rescale
        # No key and no sink: the output is zero and the log-sum-exp minus infinity.
        weight = gl.where(total == 0, 0.0, unit / gl.where(total == 0, 1.0, total))
        x = gl.convert_layout(gl.reshape(merged * weight, [1, head_dim]), vector)
        x = unrotated(x, negative, rounds)
        target = ends.out + token * out_strides[0] + head * out_strides[1]
        gl.store(target + channel[None, :], x.to(ends.out.dtype.element_ty))
        if ends.lse is not None:
            gl.store(ends.lse + token * num_heads + head, (top + gl.log2(total) + offset) * LN_2)


@gluon.jit
def _weights(top, exponent):
    """The largest exponent so far, what the total before it weighs, and what those of these exponents weigh."""
    if exponent.type.is_block():
        highest = gl.maximum(top, gl.max(exponent, axis=0))
    else:
        highest = gl.maximum(top, exponent)
    # Where nothing was seen it stays at minus infinity.
    shift = gl.where(highest > float("-inf"), highest, 0.0)
    return highest, gl.exp2(top - shift), gl.exp2(exponent - shift)
