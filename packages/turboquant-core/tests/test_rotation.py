import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from turboquant_core import Rotation
from turboquant_core._seeded import random_normal, random_signs
from turboquant_core.rotation import FORMAT_SEEDS
from turboquant_core.testing import gaussian
from turboquant_core.testing.rotations import entry_bits, worst_excess

HEAD_DIMS = [8, 24, 64, 80, 96, 112, 128, 160, 192, 256, 512]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_matrix_is_orthogonal(head_dim):
    matrix = Rotation(head_dim).matrix.numpy()
    assert matrix.dtype == np.float64
    assert matrix.shape == (head_dim, head_dim)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(head_dim), rtol=0, atol=1e-12)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotate_multiplies_by_the_matrix_and_unrotate_by_its_transpose(head_dim):
    rotation = Rotation(head_dim)
    x = gaussian(5, head_dim, seed=1).double()
    matrix = rotation.matrix.numpy()
    rotated = np.stack([matrix @ row for row in x.numpy()])
    unrotated = np.stack([matrix.T @ row for row in x.numpy()])
    np.testing.assert_allclose(rotation.rotate(x).numpy(), rotated, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rotation.unrotate(x).numpy(), unrotated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_unrotate_undoes_rotate_and_lengths_stay(head_dim):
    rotation = Rotation(head_dim)
    x = gaussian(12, head_dim, seed=2).reshape(3, 4, head_dim)
    rotated = rotation.rotate(x)
    assert rotated.shape == x.shape
    torch.testing.assert_close(rotation.unrotate(rotated), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)
    assert not torch.allclose(rotated, x, atol=0.1)


@pytest.mark.parametrize("method", ["rotate", "unrotate"])
@pytest.mark.parametrize(
    ("given", "used"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_arithmetic_is_float32_and_float64_stays(method, given, used):
    x = gaussian(3, 64, seed=3).to(given)
    result = getattr(Rotation(64), method)(x)
    assert result.dtype == used
    assert torch.equal(result, getattr(Rotation(64), method)(x.to(used)))


def test_float64_keeps_its_digits():
    x = gaussian(3, 128, seed=4).double() / 3
    rotation = Rotation(128)
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x)), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_seeds_give_different_rotations(head_dim):
    matrices = [Rotation(head_dim, seed).matrix for seed in range(4)]
    for i, first in enumerate(matrices):
        for second in matrices[:i]:
            # Independent rotations: the trace of Π₁Π₂ᵀ has mean zero and variance one.
            assert abs((first * second).sum()) < 5


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_a_rotation_leaves_no_coordinate_where_it_was(head_dim):
    # A coordinate of a rotated basis vector is nearly normal with variance 1/d.
    for seed in range(5):
        assert Rotation(head_dim, seed).matrix.abs().max() < 6 / head_dim**0.5


@pytest.mark.parametrize("head_dim", [8, 64, 256, 512])
def test_the_matrix_of_a_power_of_two_is_exact(head_dim):
    scaled = Rotation(head_dim).matrix * float(head_dim) ** (2 if head_dim >= 128 else 3)
    assert torch.equal(scaled, scaled.round())
    integers = scaled.long().tolist()
    assert sum(entry**2 for entry in integers[1]) == head_dim ** (4 if head_dim >= 128 else 6)
    assert sum(a * b for a, b in zip(integers[0], integers[3], strict=True)) == 0


@pytest.mark.parametrize(("head_dim", "bits"), [(8, 8), (16, 8), (32, 8), (64, 8), (128, 8), (256, 11), (512, 11)])
def test_few_bits_hold_an_entry_of_the_matrix(head_dim, bits):
    assert entry_bits(Rotation(head_dim).matrix) <= bits


# Sizes that models or their outlier channels have. Eight coordinates take few sizes, whatever the seed.
MOST_EXCESS = {8: 0.9, 16: 0.055} | dict.fromkeys(
    (24, 32, 48, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256, 512), 0.035
)


@pytest.mark.parametrize(("head_dim", "most"), MOST_EXCESS.items())
def test_the_formats_rotation_is_a_good_one(head_dim, most):
    assert worst_excess(Rotation(head_dim).matrix) < most


@pytest.mark.parametrize(("head_dim", "excess"), [(16, 0.6), (64, 0.59), (96, 2.6)])
def test_an_unlucky_rotation_is_told_by_its_excess(head_dim, excess):
    assert worst_excess(Rotation(head_dim, 0).matrix) == pytest.approx(excess, abs=0.05)
    assert worst_excess(Rotation(head_dim, 0).matrix, enough=0.1) > 0.1


def test_every_head_dim_has_a_seed():
    assert list(FORMAT_SEEDS) == list(range(8, 513, 8))
    for head_dim in (64, 80):
        assert torch.equal(Rotation(head_dim).matrix, Rotation(head_dim, FORMAT_SEEDS[head_dim]).matrix)


@pytest.mark.parametrize(("head_dim", "rounds"), [(8, 6), (64, 6), (128, 4), (256, 4)])
def test_a_power_of_two_alternates_signs_and_hadamard(head_dim, rounds):
    expected = np.eye(head_dim)
    for i in range(rounds):
        signs = random_signs(f"rotation/hadamard/{head_dim}/3/{i}", head_dim)
        expected = hadamard(head_dim) / head_dim**0.5 @ np.diag(signs) @ expected
    np.testing.assert_allclose(Rotation(head_dim, 3).matrix.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("head_dim", [24, 80, 96])
def test_other_sizes_are_the_orthogonal_factor_of_a_gaussian_matrix(head_dim):
    gaussian_matrix = random_normal(f"rotation/qr/{head_dim}/3", (head_dim, head_dim))
    factor = Rotation(head_dim, 3).matrix.numpy().T @ gaussian_matrix
    np.testing.assert_allclose(np.tril(factor, -1), 0, rtol=0, atol=1e-12)
    # The factorisation is unique once the diagonal is positive.
    assert (np.diag(factor) > 0).all()


DIGEST = """
import hashlib
from turboquant_core import Rotation
digest = hashlib.sha256()
for head_dim in (64, 80, 96, 128):
    digest.update(Rotation(head_dim).matrix.numpy().tobytes())
result = digest.hexdigest()
"""


def test_every_process_computes_the_same_bytes(run_python):
    scope = {}
    exec(DIGEST, scope)
    assert run_python(DIGEST + "print(result)").strip() == scope["result"]


def test_the_matrix_is_computed_once():
    assert Rotation(80).matrix is Rotation(80).matrix


@pytest.mark.parametrize("head_dim", [0, 4, 60, 81, 520])
def test_a_head_dim_out_of_range_is_named_with_the_limits(head_dim):
    with pytest.raises(ValueError, match=rf"head_dim is {head_dim}; .* multiple of 8 from 8 to 512"):
        Rotation(head_dim)


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256, 512])
def test_signs_and_hadamard_transforms_make_the_rotation_of_a_power_of_two(head_dim):
    rotation = Rotation(head_dim)
    x = torch.eye(head_dim, dtype=torch.float64)
    for signs in rotation.signs:
        x = x * signs
        for bit in range(head_dim.bit_length() - 1):
            first, second = x.view(head_dim, -1, 2, 1 << bit).unbind(2)
            x = torch.stack([first + second, first - second], dim=2).reshape(head_dim, head_dim)
    assert torch.equal(x.T / head_dim ** (len(rotation.signs) // 2), rotation.matrix)


def test_other_sizes_have_no_signs():
    with pytest.raises(ValueError, match="head_dim is 96, and only the rotations of powers of two are made of signs"):
        _ = Rotation(96).signs
