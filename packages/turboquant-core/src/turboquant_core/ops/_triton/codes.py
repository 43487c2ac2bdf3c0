"""Triton primitives for stored codes and scales.

A tile of codes has the channels padded after every eighth (see `turboquant_core.ops.cache_update.split_rotation`):
[rows, 8 * padded_octet], where octet is head_dim // 8. Planes are those of `turboquant_core.packing`.
"""

import triton
import triton.language as tl

from turboquant_core import codebook

MAX_TABLE_BITS = tl.constexpr(codebook.MAX_TABLE_BITS)


@triton.jit
def channels(octet: tl.constexpr, padded_octet: tl.constexpr):
    """Channel at every place of a padded row and whether one is there, [8 * padded_octet]."""
    place = tl.arange(0, 8 * padded_octet)
    return unpadded(place, octet, padded_octet), is_channel(place, octet, padded_octet)


@triton.jit
def unpadded(place, octet: tl.constexpr, padded_octet: tl.constexpr):
    """Places in rows padded after every octet as places in rows without padding."""
    if octet == padded_octet:
        return place
    return place // padded_octet * octet + place % padded_octet


@triton.jit
def is_channel(place, octet: tl.constexpr, padded_octet: tl.constexpr):
    """Whether a place is no padding."""
    return place % padded_octet < octet


@triton.jit
def numbered(ranks, ones: tl.constexpr, bits: tl.constexpr):
    """Ranks of centroids to their codes of up to four bits: `turboquant_core.codebook.ascending_codes` in arithmetic.

    A word, int32, holds several; `ones` has a 1 where each begins.
    """
    ranks = ranks.to(tl.uint32, bitcast=True)
    top: tl.constexpr = ones << (bits - 1)
    # From the top bit of each negative one, all bits below it: a multiplication does what a shift and a subtraction do.
    lower = tl.umulhi(~ranks & top, (1 << 32) - (1 << (33 - bits)))
    return (ranks ^ top ^ lower).to(tl.int32, bitcast=True)


@triton.jit
def join_halves(words, distance: tl.constexpr):
    """Words of the higher half of the channels, `distance` bits up, with those of the lower: [rows, half as many]."""
    halves = tl.reshape(words, [words.shape[0], 2, words.shape[1] // 2])
    return tl.sum(halves << (tl.arange(0, 2) * distance)[None, :, None], axis=1)


@triton.jit
def pack_plane(words, spacing: tl.constexpr, width: tl.constexpr, shift: tl.constexpr, bits: tl.constexpr):
    """Bits [shift, shift + width) of codes that lie `spacing` bits apart, 8 or 4, in words [rows, n], as bytes.

    int32 [rows, width * n / spacing].
    """
    words = words >> shift
    if width < bits and (shift + width < bits or spacing < 8):
        words = words & (0xFF // ((1 << spacing) - 1) * ((1 << width) - 1))
    for step in tl.static_range(3):
        if width <= spacing >> (step + 1):
            words = join_halves(words, spacing >> (step + 1))
    return words


@triton.jit
def unpack_plane(packed, width: tl.constexpr, rows: tl.constexpr, padded_octet: tl.constexpr):
    """Undo `pack_plane`: int32 bytes [rows, width * padded_octet] to fields [rows, 8 * padded_octet]."""
    if width == 8:
        return packed
    position = tl.arange(0, 8 // width) * width
    fields = (packed[:, None, :] >> position[None, :, None]) & ((1 << width) - 1)
    return tl.reshape(fields, [rows, 8 * padded_octet])


@triton.jit
def plane_bytes(
    code_rows,
    keep,
    width: tl.constexpr,
    shift: tl.constexpr,
    octet: tl.constexpr,
    padded_octet: tl.constexpr,
):
    """Pointers to the bytes of a plane, [rows, width * padded_octet], and where they may be used."""
    byte = tl.arange(0, width * padded_octet)
    # Wider planes come first; together they hold the `shift` lower bits.
    pointers = code_rows[:, None] + (shift * octet + unpadded(byte, octet, padded_octet))[None, :]
    mask = keep[:, None]
    if octet != padded_octet:
        mask = mask & is_channel(byte, octet, padded_octet)[None, :]
    return pointers, mask


@triton.jit
def store_plane(
    code_rows,
    words,
    keep,
    spacing: tl.constexpr,
    width: tl.constexpr,
    shift: tl.constexpr,
    bits: tl.constexpr,
    are_ranks: tl.constexpr,
    octet: tl.constexpr,
    padded_octet: tl.constexpr,
):
    """Store one plane of the codes in words, or of codes of more than four bits that are ranks still."""
    pointers, mask = plane_bytes(code_rows, keep, width, shift, octet, padded_octet)
    packed = pack_plane(words, spacing, width, shift, bits)
    if are_ranks and shift + width == bits:
        # Two's complement and ranks differ in the top bit alone.
        packed ^= 0xFF // ((1 << width) - 1) << (width - 1)
    tl.store(pointers, packed.to(tl.uint8), mask=mask)


@triton.jit
def load_plane(
    code_rows,
    keep,
    width: tl.constexpr,
    shift: tl.constexpr,
    rows: tl.constexpr,
    octet: tl.constexpr,
    padded_octet: tl.constexpr,
):
    """The bits of one plane at their position in the codes, int32 [rows, 8 * padded_octet]."""
    pointers, mask = plane_bytes(code_rows, keep, width, shift, octet, padded_octet)
    packed = tl.load(pointers, mask=mask, other=0).to(tl.int32)
    return unpack_plane(packed, width, rows, padded_octet) << shift


@triton.jit
def store_codes(
    code_rows,
    ranks,
    keep,
    bits: tl.constexpr,
    octet: tl.constexpr,
    padded_octet: tl.constexpr,
):
    """Pack the codes of centroids of these ranks, int32 [rows, 8 * padded_octet], and store them.

    They go to byte pointers code_rows [rows] where `keep` [rows].
    """
    if bits > MAX_TABLE_BITS:
        _store_planes(code_rows, ranks, keep, 8, bits, True, octet, padded_octet)
    else:
        codes = numbered(join_halves(ranks, 4), 0x11, bits)
        _store_planes(code_rows, codes, keep, 4, bits, False, octet, padded_octet)


@triton.jit
def _store_planes(
    code_rows,
    words,
    keep,
    spacing: tl.constexpr,
    bits: tl.constexpr,
    are_ranks: tl.constexpr,
    octet: tl.constexpr,
    padded_octet: tl.constexpr,
):
    for step in tl.static_range(4):
        if bits & (8 >> step):
            store_plane(
                code_rows, words, keep, spacing, 8 >> step, bits & (-16 >> step), bits, are_ranks, octet, padded_octet
            )


@triton.jit
def store_halves(
    code_rows,
    first,
    second,
    keep,
    bits: tl.constexpr,
    octet: tl.constexpr,
    padded_octet: tl.constexpr,
):
    """Pack the codes of a split vector's halves, of ranks [rows, 8 * padded_octet] each; see `SplitQuantizer`."""
    codes = _code(first, bits + 1) | (_code(second, bits - 1) << (bits + 1))
    _store_planes(code_rows, codes, keep, 8, 2 * bits, False, octet, padded_octet)


@triton.jit
def _code(ranks, bits: tl.constexpr):
    if bits > MAX_TABLE_BITS:
        return ranks ^ (1 << (bits - 1))
    else:
        return numbered(ranks, 1, bits)


@triton.jit
def load_halves(
    code_rows, keep, bits: tl.constexpr, rows: tl.constexpr, octet: tl.constexpr, padded_octet: tl.constexpr
):
    """The codes of a split vector's halves, int32 [rows, 8 * padded_octet] each."""
    codes = load_codes(code_rows, keep, 2 * bits, rows, octet, padded_octet)
    return codes & ((1 << (bits + 1)) - 1), codes >> (bits + 1)


@triton.jit
def load_codes(
    code_rows, keep, bits: tl.constexpr, rows: tl.constexpr, octet: tl.constexpr, padded_octet: tl.constexpr
):
    """Codes, int32 [rows, 8 * padded_octet], from byte pointers code_rows [rows] where `keep` [rows]."""
    codes = tl.zeros([rows, 8 * padded_octet], tl.int32)
    for step in tl.static_range(4):
        if bits & (8 >> step):
            codes |= load_plane(code_rows, keep, 8 >> step, bits & (-16 >> step), rows, octet, padded_octet)
    return codes


@triton.jit
def look_up(table, index):
    """The entries of table [n] at every index of a tensor.

    One-dimensional, a gather goes through shared memory and leaves the layout of products as it is; gathering global
    memory by pointers would move every element to another thread and back.
    """
    return tl.reshape(tl.gather(table, tl.reshape(index, [index.numel]), axis=0), index.shape)


@triton.jit
def scale_pointers(scale_bytes):
    """Byte pointers to stored scales as float16 pointers."""
    return scale_bytes.to(tl.pointer_type(tl.float16), bitcast=True)


@triton.jit
def store_scales(scale_bytes, scale, keep):
    """Store scales, float32 [rows], as the float16 of their root."""
    tl.store(scale_pointers(scale_bytes), tl.sqrt(scale).to(tl.float16), mask=keep)


@triton.jit
def store_half_scales(scale_bytes, first, second, keep):
    """Store the two scales of split vectors; neither where one would not come back finite."""
    first_root = tl.sqrt(first).to(tl.float16)
    second_root = tl.sqrt(second).to(tl.float16)
    pointers = scale_pointers(scale_bytes)
    tl.store(pointers, first_root + second_root * 0.0, mask=keep)
    tl.store(pointers + 1, second_root + first_root * 0.0, mask=keep)


@triton.jit
def load_scales(scale_bytes, keep):
    """Stored scales as float32 [rows]."""
    root = tl.load(scale_pointers(scale_bytes), mask=keep, other=0.0).to(tl.float32)
    return root * root
