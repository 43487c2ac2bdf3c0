import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant_core import VectorFormat

head_dims = st.integers(1, 64).map(lambda eighths: 8 * eighths)


@given(head_dim=head_dims, bits=st.integers(1, 8))
def test_whole_bits_are_one_group_with_one_scale(head_dim, bits):
    fmt = VectorFormat(head_dim, bits)
    assert [(group.num_channels, group.bits) for group in fmt.groups] == [(head_dim, bits)]
    assert 8 * fmt.code_bytes == head_dim * bits
    assert (fmt.num_scales, fmt.scale_bytes) == (1, 2)
    assert fmt.nbytes == fmt.code_bytes + 2


@given(head_dim=st.integers(1, 16).map(lambda n: 32 * n), bits=st.sampled_from([2.5, 3.5]))
def test_fractional_bits_are_two_groups_of_exactly_that_average(head_dim, bits):
    fmt = VectorFormat(head_dim, bits)
    outliers, others = fmt.groups
    assert outliers.num_channels * 4 == head_dim
    assert outliers.num_channels + others.num_channels == head_dim
    assert outliers.bits == others.bits + 2
    channel_bits = outliers.num_channels * outliers.bits + others.num_channels * others.bits
    assert channel_bits == bits * head_dim == 8 * fmt.code_bytes
    assert (fmt.num_scales, fmt.scale_bytes) == (2, 4)
    assert fmt.nbytes == fmt.code_bytes + 4


@pytest.mark.parametrize(
    ("head_dim", "bits", "nbytes"),
    [(128, 4, 66), (128, 3, 50), (128, 2, 34), (128, 2.5, 44), (64, 3.5, 32), (80, 5, 52)],
)
def test_bytes_of_known_formats(head_dim, bits, nbytes):
    assert VectorFormat(head_dim, bits).nbytes == nbytes


def test_whole_bits_may_be_written_as_a_fraction():
    assert VectorFormat(64, 4.0).groups == VectorFormat(64, 4).groups


@pytest.mark.parametrize("head_dim", [0, 4, 100, 520])
def test_a_head_dim_out_of_range_is_named_with_the_limits(head_dim):
    with pytest.raises(ValueError, match=rf"head_dim is {head_dim}; .* from 8 to 512"):
        VectorFormat(head_dim, 4)


@pytest.mark.parametrize("bits", [0, 9, 1.5, 4.5])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}; .* 1 to 8"):
        VectorFormat(64, bits)


@pytest.mark.parametrize("head_dim", [8, 80, 112])
def test_fractional_bits_need_quarters_of_whole_bytes(head_dim):
    with pytest.raises(ValueError, match=rf"head_dim is {head_dim}; 3.5 bits .* multiple of 32"):
        VectorFormat(head_dim, 3.5)


def test_a_format_is_a_value():
    assert VectorFormat(64, 4) == VectorFormat(64, 4)
    assert len({VectorFormat(64, 4), VectorFormat(64, 4), VectorFormat(64, 2.5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        VectorFormat(64, 4).bits = 3
