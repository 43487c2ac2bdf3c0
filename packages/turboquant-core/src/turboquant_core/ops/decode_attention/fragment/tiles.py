"""Gluon primitives: tiles of codes and scales on their way through shared memory.

Copies are asynchronous, so that a warp works on one tile while the next ones arrive. Plain loads into registers do not
do that here: ptxas moves a load down to where its value is used.

What is copied and read together is a stream (see `widths`). Words of eight codes are made of one or two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from turboquant_core._compat import async_load
from turboquant_core.ops._triton.bounds import existing_block
from turboquant_core.ops._triton.codes import scale_pointers
from turboquant_core.ops.decode_attention.fragment.widths import STREAMS

# What the L2 cache gives at a time.
SECTOR_BYTES = 32


@gluon.constexpr_function
def packed_bits(stored):
    """Bits of a code as it is packed: a code of either half of split keys make one."""
    return 2 * stored.bits if stored.split else stored.bits


@gluon.constexpr_function
def packed_channels(stored, head_dim):
    """How many such codes a vector has."""
    return head_dim // 2 if stored.split else head_dim


@gluon.constexpr_function
def streams(bits):
    """How many streams codes of `bits` bits have."""
    return len(STREAMS[bits])


@gluon.constexpr_function
def stream_words(head_dim, bits, index):
    """The different words of a stream in one row of codes; narrow planes serve several words of eight codes each."""
    return head_dim * STREAMS[bits][index] // 32


@gluon.constexpr_function
def copied_words(bits, row_bytes):
    """Words that a lane copies at a time.

    Copies of four words pass the L1 cache by. Where both streams have parts of one sector, it is to be fetched once.
    """
    return 2 if streams(bits) == 2 and row_bytes % SECTOR_BYTES else 4


@gluon.constexpr_function
def copy_layout(words, most):
    """[16 tokens, words]: up to `most` words a lane, a row in neighbouring lanes."""
    each = min(most, words)
    return gl.BlockedLayout([1, each], [32 * each // words, words // each], [1, 1], [1, 0])


@gluon.constexpr_function
def word_buffer_layout(words):
    """Rows rotated by sixteen bytes, so that lanes that read the same place of different rows meet fewer conflicts."""
    each = min(4, words)
    return gl.SwizzledSharedLayout(each, max(1, 32 // words), words // each, [1, 0])


@gluon.constexpr_function
def field_layout(layout, distinct):
    """A layout of [16 tokens, words] as one of [16 tokens, fields, distinct], word = field * distinct + place."""

    def split(bases):
        return [[row, word // distinct, word % distinct] for row, word in bases]

    shape = [layout.shape[0], layout.shape[1] // distinct, distinct]
    return gl.DistributedLinearLayout(split(layout.reg_bases), split(layout.lane_bases), [], [], shape)


@gluon.constexpr_function
def scale_buffer_layout():
    """[16 tokens], copied four bytes at a time."""
    return gl.SwizzledSharedLayout(vec=2, per_phase=1, max_phase=1, order=[0])


@gluon.jit
def allocate_words(stages: gl.constexpr, subtiles: gl.constexpr, head_dim: gl.constexpr, bits: gl.constexpr):
    """Room for `stages` tiles, a buffer for each stream."""
    first: gl.constexpr = stream_words(head_dim, bits, 0)
    count: gl.constexpr = stages * subtiles
    buffers = (gl.allocate_shared_memory(gl.int32, [count, 16, first], word_buffer_layout(first)),)
    if streams(bits) == 2:
        second: gl.constexpr = stream_words(head_dim, bits, 1)
        buffers = buffers + (gl.allocate_shared_memory(gl.int32, [count, 16, second], word_buffer_layout(second)),)
    return buffers


@gluon.jit
def allocate_roots(stages: gl.constexpr, subtiles: gl.constexpr, split: gl.constexpr):
    """Room for the scale roots of `stages` tiles; two of split vectors are a word."""
    kind: gl.constexpr = gl.int32 if split else gl.float16
    return gl.allocate_shared_memory(kind, [stages * subtiles, 16], scale_buffer_layout())


@gluon.jit
def tile_pages(index, length, blocks, last_block, block_size: gl.constexpr, subtiles: gl.constexpr):
    """The page of every sixteen tokens of a tile, past the end that of the last token.

    `blocks` is the page itself without a table.
    """
    # Where one is a multiple of the other, sixteen tokens inside a page lie in the page of those before them.
    aligned: gl.constexpr = block_size > 0 and (block_size % (16 * subtiles) == 0 or 16 * subtiles % block_size == 0)
    numbers = ()
    for j in gl.static_range(subtiles):
        if block_size == 0:
            numbers = numbers + (blocks,)
        elif aligned and j * 16 % block_size != 0:
            numbers = numbers + (numbers[j - 1],)
        else:
            token = gl.minimum((index * subtiles + j) * 16, length - 1)
            numbers = numbers + (existing_block(gl.load(blocks + token // block_size), last_block),)
    return numbers


@gluon.jit
def copy_tile(
    index, stage, numbers, length, pages, page_stride, buffers,
    layout: gl.constexpr, block_size: gl.constexpr, subtiles: gl.constexpr,
):  # fmt: skip
    """Start to copy a tile of a head's pages into stage `stage` of `buffers`, as one group.

    Buffers are those of key codes, value codes, key scales and value scales.
    """
    keys: gl.constexpr = layout.stored_keys
    values: gl.constexpr = layout.stored_values
    for j in gl.static_range(subtiles):
        first = (index * subtiles + j) * 16
        page = numbers[j].to(gl.int64) * page_stride
        if block_size > 0:
            # Sixteen tokens at a time, for the compiler to see that it divides.
            slot = (index * subtiles + j) % (block_size // 16) * 16
        else:
            # Past its end a contiguous row has no memory; what is read there is masked.
            slot = gl.where(first < length, first, 0)
        at = stage * subtiles + j
        _copy_words(pages, page, slot, buffers[0], at, keys, layout.head_dim)
        _copy_words(pages, page, slot, buffers[1], at, values, layout.head_dim)
        _copy_roots(pages, page, slot, buffers[2], at, keys)
        _copy_roots(pages, page, slot, buffers[3], at, values)
    async_copy.commit_group()


@gluon.jit
def _copy_words(pages, page, slot, buffers, at, stored: gl.constexpr, head_dim: gl.constexpr):
    bits: gl.constexpr = packed_bits(stored)
    channels: gl.constexpr = packed_channels(stored, head_dim)
    row_words: gl.constexpr = stored.code_stride // 4
    rows = pages + stored.codes + page + slot.to(gl.int64) * stored.code_stride
    words = rows.to(gl.pointer_type(gl.int32), bitcast=True)
    most: gl.constexpr = copied_words(bits, stored.code_stride)
    _copy_stream(words, buffers[0], at, row_words, most)
    if streams(bits) == 2:
        _copy_stream(words + stream_words(channels, bits, 0), buffers[1], at, row_words, most)


@gluon.jit
def _copy_roots(pages, page, slot, buffer, at, stored: gl.constexpr):
    scales = pages + stored.scales + page
    if stored.split:
        words = scales.to(gl.pointer_type(gl.int32), bitcast=True) + slot
        async_load(buffer.index(at), words + gl.arange(0, 16, gl.BlockedLayout([1], [32], [1], [0])))
    else:
        stride: gl.constexpr = stored.scale_stride // 2
        token = gl.arange(0, 16, gl.BlockedLayout([2], [32], [1], [0]))
        async_load(buffer.index(at), scale_pointers(scales) + slot * stride + token * stride)


@gluon.jit
def _copy_stream(rows, buffer, at, row_words: gl.constexpr, most: gl.constexpr):
    words: gl.constexpr = buffer.shape[2]
    layout: gl.constexpr = copy_layout(words, most)
    token = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    word = gl.arange(0, words, gl.SliceLayout(0, layout))[None, :]
    async_load(buffer.index(at), rows + token * row_words + word)


@gluon.jit
def read_words(buffers, at, layout: gl.constexpr, head_dim: gl.constexpr, bits: gl.constexpr):
    """Eight codes a word, int32 [16 tokens, head_dim / 8]; above four bits two such tensors.

    Nibble 2b of word n is channel 4n + b and nibble 2b + 1 channel 4n + b + head_dim / 2 (bytes b of the two words
    above four bits).
    """
    if bits == 2:
        codes = _nibbles(buffers[0], at, layout, 2)
        return codes, codes
    elif bits == 3:
        codes = _nibbles(buffers[0], at, layout, 2) | (_nibbles(buffers[1], at, layout, 1) << 2)
        return codes, codes
    else:
        first = buffers[0].index(at).load(layout)
        if bits == 4:
            return first, first
        elif bits == 8:
            return first, buffers[1].index(at).load(layout)
        else:
            high = _nibbles(buffers[1], at, layout, bits - 4)
            even = (first & 0x0F0F0F0F) | ((high & 0x0F0F0F0F) << 4)
            odd = ((first >> 4) & 0x0F0F0F0F) | (high & ~0x0F0F0F0F)
            return even, odd


@gluon.jit
def read_halves(buffers, at, layout: gl.constexpr, bits: gl.constexpr):
    """What `split_key_lookup` takes of eight codes of either half, int32 [16 tokens, head_dim / 16]."""
    if bits == 2:
        codes = buffers[0].index(at).load(layout)
        return codes, codes
    elif bits == 3:
        return buffers[0].index(at).load(layout), _nibbles(buffers[1], at, layout, 2)
    else:
        return buffers[0].index(at).load(layout), buffers[1].index(at).load(layout)


@gluon.jit
def read_roots(buffer, at, layout: gl.constexpr, masked: gl.constexpr, stored_here):
    """Scale roots, float32 [16 tokens], zeros where `masked` and nothing is `stored_here`."""
    root = buffer.index(at).load(layout).to(gl.float32)
    if masked:
        root = gl.where(stored_here, root, 0.0)
    return root


@gluon.jit
def read_half_roots(buffer, at, layout: gl.constexpr, masked: gl.constexpr, stored_here):
    """The same of both halves of split keys."""
    word = buffer.index(at).load(layout)
    if masked:
        word = gl.where(stored_here, word, 0)
    first = word.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return first, (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _nibbles(buffer, at, layout: gl.constexpr, width: gl.constexpr):
    """The fields of one or two bits that belong to each word, at the bottom of nibbles."""
    distinct: gl.constexpr = buffer.shape[2]
    fields: gl.constexpr = 4 // width
    by_field: gl.constexpr = field_layout(layout, distinct)
    mask: gl.constexpr = 0x33333333 if width == 2 else 0x11111111
    # Every lane reads the words that its fields are in, which are the same for several lanes.
    packed = buffer.index(at).load(gl.SliceLayout(1, by_field))
    field = gl.arange(0, fields, gl.SliceLayout(0, gl.SliceLayout(2, by_field)))
    codes = (gl.expand_dims(packed, 1) >> (width * field[None, :, None])) & mask
    return gl.convert_layout(gl.reshape(codes, [16, fields * distinct]), layout, assert_trivial=True)
