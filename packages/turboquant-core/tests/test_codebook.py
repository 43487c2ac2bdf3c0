import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from turboquant_core import grid_codebook
from turboquant_core.codebook import MAX_TABLE_BITS, SphereCoordinate, ascending_codes, expected_mse
from turboquant_core.testing.lloyd_max import lloyd_max_centroids, lloyd_max_mse

# E‖x - x̂‖² for ‖x‖ = 1, computed apart from this package; six decimals, four digits at 8 bits.
PUBLISHED_MSE = {
    64: (0.358387, 0.114526, 0.033391, 0.009132, 0.002399, 0.000616, 3.932e-5),
    80: (0.359389, 0.115115, 0.033620, 0.009204, 0.002420, 0.000622, 3.968e-5),
    96: (0.360056, 0.115508, 0.033773, 0.009253, 0.002434, 0.000625, 3.993e-5),
    128: (0.360889, 0.116000, 0.033966, 0.009315, 0.002451, 0.000630, 4.024e-5),
    256: (0.362136, 0.116740, 0.034256, 0.009408, 0.002478, 0.000637, 4.071e-5),
}
PUBLISHED_BITS = (1, 2, 3, 4, 5, 6, 8)

# The positive half of the 4-bit centroids times sqrt(d).
PUBLISHED_CENTROIDS = {
    64: (0.12735, 0.38472, 0.65049, 0.93189, 1.2394, 1.59085, 2.02331, 2.64637),
    128: (0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04593, 2.68886),
}

LEVELS = {1: (1,), 2: (67, 223), 3: (27, 83, 147, 235), 4: (11, 33, 55, 79, 105, 135, 173, 227)}


def integrate(head_dim, weight, low, high):
    log_norm = math.lgamma(head_dim / 2) - math.lgamma((head_dim - 1) / 2) - math.log(math.pi) / 2

    def integrand(x):
        return weight(x) * math.exp(log_norm + (head_dim - 3) / 2 * math.log1p(-x * x))

    # On a longer interval the adaptive rule could miss the mass, which lies beside its lower end.
    high = min(high, low + 12 / math.sqrt(head_dim))
    return quad(integrand, low, high, epsabs=0, epsrel=1e-10, limit=200)[0]


def positive_cells(codebook):
    half = len(codebook.centroids) // 2
    centroids = codebook.centroids.tolist()[half:]
    edges = [0.0, *codebook.boundaries.tolist()[half:], 1.0]
    return zip(centroids, edges[:-1], edges[1:], strict=True)


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("bits", range(1, 9))
def test_centroids_are_odd_integers_times_the_unit_of_least_error(head_dim, bits):
    codebook = grid_codebook(head_dim, bits)
    levels = torch.tensor(codebook.levels)
    assert codebook.levels == LEVELS.get(bits, tuple(range(1, 2**bits, 2)))
    assert torch.equal(codebook.centroids[2 ** (bits - 1) :], codebook.unit * levels.double())
    assert codebook.unit * 2**16 / 2 ** math.frexp(codebook.unit)[1] % 1 == 0
    density = SphereCoordinate(head_dim)
    others = [expected_mse(density, codebook.unit * (1 + change) * levels.numpy()) for change in (-1e-3, 1e-3)]
    assert codebook.mse < min(others)
    assert others[0] == pytest.approx(others[1], rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(head_dim=st.integers(8, 512), bits=st.integers(1, 8))
def test_any_head_dim_has_a_codebook_near_lloyd_max(head_dim, bits):
    increase = grid_codebook(head_dim, bits).mse / lloyd_max_mse(head_dim, bits) - 1
    assert -1e-9 < increase < (0.07 if bits <= MAX_TABLE_BITS else 0.16 * (bits - 1))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512])
@pytest.mark.parametrize(("bits", "most"), [(1, 1e-9), (2, 2e-5), (3, 2e-4), (4, 1e-3)])
def test_up_to_four_bits_integers_cost_next_to_nothing(head_dim, bits, most):
    assert 0 <= grid_codebook(head_dim, bits).mse / lloyd_max_mse(head_dim, bits) - 1 < most


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_code_is_a_sign_and_a_level_or_twos_complement(bits):
    codebook, half = grid_codebook(64, bits), 2 ** (bits - 1)
    for code, centroid in enumerate(codebook.centroids_by_code.tolist()):
        if bits <= MAX_TABLE_BITS:
            expected = codebook.levels[code % half] * (-1 if code >= half else 1)
        else:
            expected = 2 * (code - 2 * half if code >= half else code) + 1
        assert centroid == expected * codebook.unit
    assert torch.equal(codebook.centroids_by_code[ascending_codes(bits)], codebook.centroids)


@pytest.mark.parametrize("head_dim", [8, 80, 128, 512])
@pytest.mark.parametrize("bits", range(1, 9))
def test_boundaries_send_every_value_to_the_nearest_centroid(head_dim, bits):
    codebook = grid_codebook(head_dim, bits)
    centroids, boundaries = codebook.centroids.numpy(), codebook.boundaries.numpy()
    assert len(centroids) == 2**bits
    np.testing.assert_allclose(boundaries - centroids[:-1], centroids[1:] - boundaries, rtol=0, atol=1e-16)
    x = np.linspace(-1, 1, 5001) + 1e-7
    nearest = np.abs(x[:, None] - centroids).argmin(1)
    np.testing.assert_array_equal(np.searchsorted(boundaries, x), nearest)


@pytest.mark.parametrize("head_dim", [8, 96, 128, 512])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codebooks_are_symmetric_ascending_float32_values(head_dim, bits):
    codebook = grid_codebook(head_dim, bits)
    assert torch.equal(codebook.centroids, -codebook.centroids.flip(0))
    assert torch.equal(codebook.boundaries, -codebook.boundaries.flip(0))
    assert (codebook.centroids.diff() > 0).all()
    assert codebook.centroids.dtype == codebook.boundaries.dtype == torch.float64
    assert torch.equal(codebook.centroids, codebook.centroids.float().double())
    assert torch.equal(codebook.boundaries, codebook.boundaries.float().double())


@pytest.mark.parametrize("head_dim", [8, 64, 128, 512])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_mse_is_the_integral_of_the_squared_error(head_dim, bits):
    codebook = grid_codebook(head_dim, bits)
    error = sum(
        integrate(head_dim, lambda x, c=c: (x - c) ** 2, low, high) for c, low, high in positive_cells(codebook)
    )
    assert codebook.mse == pytest.approx(2 * head_dim * error, rel=1e-6)


@pytest.mark.parametrize("head_dim", PUBLISHED_MSE)
def test_the_error_of_lloyd_max_meets_the_published_table(head_dim):
    for bits, published in zip(PUBLISHED_BITS, PUBLISHED_MSE[head_dim], strict=True):
        half_unit = 0.5e-8 if bits == 8 else 0.5e-6
        assert abs(lloyd_max_mse(head_dim, bits) - published) <= half_unit * 1.001


@pytest.mark.parametrize("head_dim", PUBLISHED_CENTROIDS)
def test_the_centroids_of_lloyd_max_meet_the_published_ones(head_dim):
    centroids = lloyd_max_centroids(head_dim, 4) * math.sqrt(head_dim)
    np.testing.assert_allclose(centroids, PUBLISHED_CENTROIDS[head_dim], rtol=0, atol=0.51e-5)


@pytest.mark.parametrize(
    ("bits", "paper", "half_unit"),
    [(1, 0.36, 5e-3), (2, 0.117, 5e-4), (3, 0.03, 5e-3), (4, 0.009, 5e-4)],
)
def test_mse_is_the_papers_in_high_dimension(bits, paper, half_unit):
    assert abs(grid_codebook(512, bits).mse - paper) <= half_unit


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("bits", range(1, MAX_TABLE_BITS + 1))
def test_mse_lies_between_the_papers_bounds(head_dim, bits):
    mse = grid_codebook(head_dim, bits).mse
    assert 4.0**-bits <= mse <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_a_codebook_is_computed_once():
    assert grid_codebook(104, 3) is grid_codebook(104, 3)
    assert grid_codebook(104, 3) is not grid_codebook(104, 4)


DIGEST = """
import hashlib
digest = hashlib.sha256()
for head_dim in (8, 64, 80, 128, 512):
    for bits in range(1, 9):
        codebook = grid_codebook(head_dim, bits)
        digest.update(codebook.centroids.numpy().tobytes() + codebook.boundaries.numpy().tobytes())
result = digest.hexdigest()
"""

# CPU time: what else runs on the machine does not count.
COLD_START = """
import time
from turboquant_core import PRESETS, TurboQuantConfig, grid_codebook
configs = [TurboQuantConfig.preset(name, 128) for name in PRESETS]
started = time.process_time()
for config in configs:
    for group in config.key_format.groups + config.value_format.groups:
        grid_codebook(group.num_channels, group.bits)
seconds = time.process_time() - started
assert grid_codebook.cache_info().currsize == 9
"""


@pytest.fixture(scope="module")
def fresh_process(run_python):
    return run_python(COLD_START + DIGEST + "print(seconds, result)").split()


def test_every_process_computes_the_same_bytes(fresh_process):
    scope = {"grid_codebook": grid_codebook}
    exec(DIGEST, scope)
    assert fresh_process[1] == scope["result"]


def test_codebooks_of_all_presets_are_ready_in_a_fifth_of_a_second(fresh_process):
    assert float(fresh_process[0]) < 0.2


@pytest.mark.parametrize("head_dim", [-1, 0, 7, 513])
def test_a_head_dim_out_of_range_is_named_with_the_limits(head_dim):
    with pytest.raises(ValueError, match=rf"head_dim is {head_dim}; .* 8 to 512"):
        grid_codebook(head_dim, 4)


@pytest.mark.parametrize("bits", [-1, 0, 9, 2.5])
def test_bits_out_of_range_are_named_with_the_limits(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}; .* 1 to 8"):
        grid_codebook(128, bits)
