import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import pack, unpack
from turboquant_core.packing import bit_planes, packed_bytes

head_dims = st.integers(1, 64).map(lambda eighths: 8 * eighths)
all_bits = st.integers(1, 8)
seeds = st.integers(0, 2**32 - 1)


def random_codes(shape, bits, seed):
    return np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint8)


def pack_bit_by_bit(codes, bits):
    """The documented order, one bit at a time, for codes [num_channels]."""
    num_channels = len(codes)
    packed = np.zeros(num_channels * bits // 8, dtype=np.uint8)
    shift = offset = 0
    for width in (8, 4, 2, 1):
        if not bits & width:
            continue
        plane_bytes = num_channels * width // 8
        for channel, code in enumerate(codes):
            field, byte = divmod(channel, plane_bytes)
            for k in range(width):
                bit = int(code) >> (shift + k) & 1
                packed[offset + byte] |= bit << (field * width + k)
        shift += width
        offset += plane_bytes
    return packed


@settings(max_examples=150, deadline=None)
@given(head_dim=head_dims, bits=all_bits, seed=seeds)
def test_unpack_undoes_pack_without_padding(head_dim, bits, seed):
    codes = torch.from_numpy(random_codes((2, 3, head_dim), bits, seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, head_dim * bits // 8)
    assert packed.untyped_storage().nbytes() == 2 * 3 * head_dim * bits // 8
    unpacked = unpack(packed, bits, head_dim)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_codes_of_every_integer_type_are_packed_alike(dtype):
    codes = torch.from_numpy(random_codes((3, 16), 5, seed=0))
    packed = pack(codes.to(dtype), 5)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, pack(codes, 5))


@settings(max_examples=40, deadline=None)
@given(head_dim=head_dims, bits=all_bits, seed=seeds)
def test_bytes_follow_the_documented_order(head_dim, bits, seed):
    codes = random_codes(head_dim, bits, seed)
    expected = pack_bit_by_bit(codes, bits)
    np.testing.assert_array_equal(pack(torch.from_numpy(codes), bits).numpy(), expected)
    np.testing.assert_array_equal(unpack(torch.from_numpy(expected), bits, head_dim).numpy(), codes)


def test_byte_j_of_four_bit_codes_holds_channels_j_and_j_plus_half():
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [j | (j + 8) << 4 for j in range(8)]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    low = [1 | 3 << 2 | 1 << 4 | 3 << 6, 2 | 0 << 2 | 2 << 4 | 0 << 6]
    high = [0b01111000]
    assert pack(codes, 3).tolist() == low + high


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_cover_the_vector_and_the_code_once(bits):
    planes = bit_planes(96, bits)
    assert sum(plane.width for plane in planes) == bits
    assert sum(plane.num_bytes for plane in planes) == packed_bytes(96, bits) == 96 * bits // 8
    for plane, following in itertools.pairwise(planes):
        assert following.offset == plane.offset + plane.num_bytes
        assert following.shift == plane.shift + plane.width
        assert following.width < plane.width
    for plane in planes:
        assert plane.codes_per_byte * plane.num_bytes == 96


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("check", [True, False])
def test_codes_may_have_any_integer_type(dtype, check):
    codes = torch.from_numpy(random_codes((4, 40), 5, seed=1))
    assert torch.equal(pack(codes.to(dtype), 5, check=check), pack(codes, 5))


def test_memory_order_and_empty_batches_do_not_matter():
    codes = torch.from_numpy(random_codes((64, 6), 6, seed=2))
    assert torch.equal(pack(codes.T, 6), pack(codes.T.contiguous(), 6))
    packed = pack(codes.T, 6)
    assert torch.equal(unpack(packed[::2], 6, 64), codes.T[::2])
    assert pack(codes.T[:0], 6).shape == (0, 48)
    assert unpack(packed[:0], 6, 64).shape == (0, 64)


def test_unpack_leaves_its_input_alone():
    packed = pack(torch.from_numpy(random_codes(64, 8, seed=3)), 8)
    before = packed.clone()
    unpack(packed, 8, 64).zero_()
    unpack(packed, 4, 128).zero_()
    assert torch.equal(packed, before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_code_that_needs_more_bits_is_refused(bits):
    codes = torch.zeros(2, 16, dtype=torch.int32)
    codes[1, 3] = 2**bits
    with pytest.raises(ValueError, match=rf"from 0 to {2**bits}; {bits} bits hold 0 to {2**bits - 1}$"):
        pack(codes, bits)


def test_a_negative_code_is_refused():
    codes = torch.zeros(2, 16, dtype=torch.int64)
    codes[0, 0] = -1
    with pytest.raises(ValueError, match="from -1 to 0"):
        pack(codes, 4)


@pytest.mark.parametrize("num_channels", [0, 4, 63])
def test_channels_that_do_not_fill_bytes_are_refused(num_channels):
    with pytest.raises(ValueError, match=f"cannot pack {num_channels} channels; a multiple of 8"):
        pack(torch.zeros(2, num_channels, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=f"cannot pack {num_channels} channels"):
        unpack(torch.zeros(2, 8, dtype=torch.uint8), 4, num_channels)


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_bits_out_of_range_are_named_with_the_limits(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}; .* 1 to 8"):
        pack(torch.zeros(16, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=rf"bits is {bits}; .* 1 to 8"):
        packed_bytes(16, bits)


@pytest.mark.parametrize(
    "packed",
    [torch.zeros(2, 31, dtype=torch.uint8), torch.zeros(2, 32, dtype=torch.int8)],
    ids=["size", "type"],
)
def test_unpack_refuses_other_sizes_and_types(packed):
    with pytest.raises(ValueError, match=r"64 codes of 4 bits are torch.uint8 \[..., 32\]"):
        unpack(packed, 4, 64)


@pytest.mark.parametrize("codes", [torch.zeros(8), torch.tensor(1)], ids=["float", "scalar"])
def test_codes_that_are_no_rows_of_integers_are_refused(codes):
    with pytest.raises(ValueError, match="pack takes integers"):
        pack(codes, 4)
