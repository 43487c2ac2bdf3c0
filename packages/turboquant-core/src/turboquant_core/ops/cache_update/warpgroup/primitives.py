"""Gluon primitives of the update: copies, rotation, codes in registers, stores."""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from turboquant_core._compat import async_load
from turboquant_core.ops._triton.codes import numbered, scale_pointers
from turboquant_core.ops.cache_update.rotate import OFFSET_UNIT
from turboquant_core.ops.cache_update.warpgroup import lane_table

# Tokens of a tile, those of each half of it, and input channels of the product that subtracts a mean.
ROWS = gl.constexpr(64)
HALF = gl.constexpr(32)
OFFSET_ROWS = gl.constexpr(16)

_UNITS = struct.pack(">f", lane_table.UNITS / 2**lane_table.FIXED_BITS).hex().upper()
# $1 coordinates, $2 the factor, $3 a lane's entry.
RANKS_ASM = gl.constexpr(
    "{ .reg .f32 y; .reg .b32 fixed, cell; fma.rn.sat.f32 y, $1, $2, 0f3F000000; "
    f"fma.rn.f32 y, y, 0f{_UNITS}, 0f{lane_table.FLOAT_ONE:08X}; mov.b32 fixed, y; "
    f"shr.u32 cell, fixed, {lane_table.SHIFT}; shfl.sync.idx.b32 cell, $3, cell, 31, 0xffffffff; "
    f"add.u32 fixed, fixed, cell; shr.u32 $0, fixed, {lane_table.SHIFT}; }}"
)
CENTROIDS_ASM = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;")


@gluon.constexpr_function
def product_layout(channels):
    """[ROWS, channels]: a warp has 16 rows, a thread a quarter of two rows, eight apart."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, channels, 16])


@gluon.constexpr_function
def copy_layout(channels):
    """Sixteen bytes a thread, rows side by side."""
    return gl.BlockedLayout([1, 8], [256 // channels, channels // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def operand_layout(channels):
    """Of 16-bit operands in shared memory, as the tensor cores read them."""
    return gl.NVMMASharedLayout(min(128, 2 * channels), 16, 2)


@gluon.jit
def copy_matrix(matrix, into, rows: gl.constexpr, channels: gl.constexpr):
    """Begin to copy a contiguous [rows, channels] to shared memory."""
    layout: gl.constexpr = copy_layout(channels)
    row = gl.arange(0, rows, gl.SliceLayout(1, layout))
    channel = gl.arange(0, channels, gl.SliceLayout(0, layout))
    async_load(into, matrix + (row[:, None] * channels + channel[None, :]))


@gluon.jit
def copy_tile(x, block, num_tokens, token_stride, into, channels: gl.constexpr):
    """Begin to copy the vectors of tokens ROWS * block on; rows past the last token repeat it."""
    layout: gl.constexpr = copy_layout(channels)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, channels, gl.SliceLayout(0, layout))
    first = block * ROWS
    start = x + first.to(gl.int64) * token_stride
    if first + ROWS <= num_tokens:
        async_load(into, start + ((row * token_stride)[:, None] + channel[None, :]))
    else:
        token = gl.minimum(row, num_tokens - 1 - first)
        async_load(into, start + ((token * token_stride)[:, None] + channel[None, :]))


@gluon.jit
def load_slots(slot_mapping, slot_stride, block, num_tokens, half: gl.constexpr, layout: gl.constexpr):
    """Slots of one half of a tile, int64 [HALF]; -1 past the last token. Halves are those of `split_rows`."""
    index = gl.arange(0, HALF, layout)
    token = block * ROWS + (index // 8 * 16 + index % 8 + 8 * half)
    return gl.load(slot_mapping + token.to(gl.int64) * slot_stride, mask=token < num_tokens, other=-1)


@gluon.jit
def begin_product(x, rotation, zeros, num_parts: gl.constexpr):
    """Begin x @ the sum of rotation [num_parts, k, channels], small terms first for less rounding."""
    product = zeros
    for i in gl.static_range(num_parts):
        product = warpgroup_mma(x, rotation.index(num_parts - 1 - i), product, use_acc=i > 0, is_async=True)
    return product


@gluon.constexpr_function
def column_layout():
    """[OFFSET_ROWS, channels]: a thread has whole columns, and knows which rows of them are zeros."""
    return gl.BlockedLayout([16, 1], [1, 32], [1, 4], [1, 0])


@gluon.jit
def load_mean(mean, used, channels: gl.constexpr):
    """The mean at a float32 pointer, or zeros if it is not used, as `offset_factors` takes it."""
    channel = gl.arange(0, channels, gl.SliceLayout(0, column_layout()))
    return gl.load(mean + channel, mask=channel < gl.where(used, channels, 0), other=0.0)


@gluon.jit
def offset_factors(mean, rotation, num_parts: gl.constexpr, channels: gl.constexpr):
    """Two tiles in shared memory whose product is less the rotated mean in every row; see `rotate.offset_factor`.

    [ROWS, OFFSET_ROWS] and [OFFSET_ROWS, channels].
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    dtype: gl.constexpr = rotation.dtype
    factor = gl.allocate_shared_memory(
        dtype, [OFFSET_ROWS, channels], operand_layout(channels), _three_rows(mean, dtype)
    )
    rows = factor.load(gl.DotOperandLayout(0, layout, 2))
    rotated = gl.zeros([OFFSET_ROWS, channels], gl.float32, layout)
    for i in gl.static_range(num_parts):
        part = rotation.index(num_parts - 1 - i).load(gl.DotOperandLayout(1, layout, 2))
        rotated = mma_v2(rows, part, rotated)
    offset = -gl.sum(gl.convert_layout(rotated, column_layout()), axis=0) / OFFSET_UNIT
    factor.store(_three_rows(offset, dtype))
    ones_layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    column = gl.arange(0, OFFSET_ROWS, gl.SliceLayout(0, ones_layout))
    ones = gl.where(column < 3, OFFSET_UNIT, 0.0).to(dtype)[None, :]
    ones = ones + gl.zeros([ROWS, OFFSET_ROWS], dtype, ones_layout)
    return gl.allocate_shared_memory(dtype, [ROWS, OFFSET_ROWS], operand_layout(OFFSET_ROWS), ones), factor


@gluon.jit
def _three_rows(x, dtype: gl.constexpr):
    """x, float32 [n], as the sum of the first three rows of a 16-bit [OFFSET_ROWS, n]."""
    row = gl.arange(0, OFFSET_ROWS, gl.SliceLayout(1, column_layout()))[:, None]
    parts = gl.zeros([OFFSET_ROWS, x.shape[0]], dtype, column_layout())
    for i in gl.static_range(3):
        part = x.to(dtype)
        x -= part.to(gl.float32)
        parts = gl.where(row == i, part[None, :], parts)
    return parts


@gluon.jit
def split_rows(x, channels: gl.constexpr):
    """[ROWS, channels] of a product as two [HALF, channels]: each thread's first row and its second."""
    first, second = gl.split(gl.permute(gl.reshape(x, [4, 2, 8, channels]), [0, 2, 3, 1]))
    return gl.reshape(first, [HALF, channels]), gl.reshape(second, [HALF, channels])


@gluon.jit
def natural_order(x, channels: gl.constexpr, finest: gl.constexpr):
    """Columns in the order of `product_columns` to channels; moves nothing."""
    run: gl.constexpr = finest * channels // 32
    x = gl.permute(gl.reshape(x, [HALF, channels // 8, 4, 2]), [0, 2, 1, 3])
    x = gl.permute(gl.reshape(x, [HALF, 4, 8 // finest, run]), [0, 2, 1, 3])
    return gl.reshape(x, [HALF, channels])


@gluon.jit
def sum_rows(x, finest: gl.constexpr):
    """Sums over the channels of x in `natural_order`, [HALF]; two chains of additions a row hide each other's wait."""
    channels: gl.constexpr = x.shape[1]
    parts = gl.reshape(x, [HALF, 8 // finest, 4, finest * channels // 64, 2])
    parts = gl.reshape(gl.permute(parts, [0, 2, 4, 1, 3]), [HALF, 8, channels // 8])
    total = gl.sum(gl.sum(parts, axis=2), axis=1)
    return gl.convert_layout(total, gl.SliceLayout(1, x.type.layout), assert_trivial=True)


@gluon.jit
def lane_ranks(x, factor, entries):
    """Ranks of the centroids nearest to x times factor, int32; see `LaneTable`. `entries` differ from lane to lane."""
    return gl.inline_asm_elementwise(RANKS_ASM, "=r,r,r,r", [x, factor, entries], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def lane_centroids(ranks, centroids):
    """The centroid of each rank, float32."""
    found = gl.inline_asm_elementwise(CENTROIDS_ASM, "=r,r,r", [centroids, ranks], dtype=gl.int32, is_pure=True, pack=1)
    return found.to(gl.float32, bitcast=True)


@gluon.jit
def _join_bytes(ranks, word_bytes: gl.constexpr, channels: gl.constexpr):
    """Numbers [HALF, channels] as the bytes of words, int32 [HALF, channels / word_bytes]."""
    low, high = gl.split(gl.reshape(ranks, [HALF, channels // 2, 2]))
    words = low + high * 256
    if word_bytes == 4:
        low, high = gl.split(gl.reshape(words, [HALF, channels // 4, 2]))
        words = low + high * 65536
    return words


@gluon.jit
def _join_halves(words, distance: gl.constexpr):
    """The words of the higher half of the channels, `distance` bits up, with those of the lower half."""
    low, high = gl.split(gl.permute(gl.reshape(words, [HALF, 2, words.shape[1] // 2]), [0, 2, 1]))
    return low + high * (1 << distance)


@gluon.jit
def pack_plane(words, width: gl.constexpr, shift: gl.constexpr, bits: gl.constexpr):
    """Bits [shift, shift + width) of the codes in the nibbles of words [HALF, n], packed, [HALF, width * n / 4]."""
    if width < bits:
        words = (words >> shift) & (((1 << width) - 1) * 0x11111111)
    if width <= 2:
        words = _join_halves(words, 2)
    if width == 1:
        words = _join_halves(words, 1)
    return words


@gluon.jit
def store_plane(
    code_rows,
    words,
    keep,
    width: gl.constexpr,
    shift: gl.constexpr,
    bits: gl.constexpr,
    word_bytes: gl.constexpr,
    channels: gl.constexpr,
):
    """Store one plane of the codes in the nibbles of words; of ranks there, where it is the only plane."""
    packed = pack_plane(words, width, shift, bits)
    if width == bits:
        # The fewer words, the less there is to do.
        packed = numbered(packed, 0xFFFFFFFF // ((1 << width) - 1), bits)
    layout: gl.constexpr = packed.type.layout
    word = gl.arange(0, packed.shape[1], gl.SliceLayout(0, layout))
    # Wider planes come first; together they hold the `shift` lower bits.
    rows = gl.convert_layout(code_rows + shift * channels // 8, gl.SliceLayout(1, layout), assert_trivial=True)
    mask = gl.convert_layout(keep, gl.SliceLayout(1, layout), assert_trivial=True)
    word_type: gl.constexpr = gl.int32 if word_bytes == 4 else gl.int16
    pointers = rows.to(gl.pointer_type(word_type), bitcast=True)[:, None] + word[None, :]
    gl.store(pointers, packed.to(word_type), mask=mask[:, None])


@gluon.jit
def store_codes(code_rows, ranks, keep, bits: gl.constexpr, channels: gl.constexpr):
    """Pack the codes of centroids of these ranks, int32 [HALF, channels], and store them.

    They go to byte pointers code_rows [HALF] where `keep` [HALF].
    """
    # As many neighbouring bytes as a thread has of every plane.
    word_bytes: gl.constexpr = min(4, (bits & -bits) * channels // 32)
    words = _join_halves(_join_bytes(ranks, word_bytes, channels), 4)
    if bits & (bits - 1):
        words = numbered(words, 0x11111111, bits)
    for step in gl.static_range(1, 4):
        if bits & (8 >> step):
            store_plane(code_rows, words, keep, 8 >> step, bits & (-16 >> step), bits, word_bytes, channels)


@gluon.jit
def store_scales(scale_rows, scale, keep):
    """Store scales, float32 [HALF], as the float16 of their root."""
    gl.store(scale_pointers(scale_rows), gl.sqrt(scale).to(gl.float16), mask=keep)
