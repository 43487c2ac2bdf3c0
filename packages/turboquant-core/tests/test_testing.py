import pytest
import torch

from turboquant_core import Rotation
from turboquant_core.testing import (
    INPUT_KINDS,
    MODEL_SHAPES,
    equal_magnitude,
    gaussian,
    heavy_tailed,
    one_hot,
    two_hot,
)


@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_inputs_are_float32_and_the_same_for_the_same_seed(kind):
    draw = INPUT_KINDS[kind]
    x = draw(20, 96, 5)
    assert (x.shape, x.dtype) == ((20, 96), torch.float32)
    assert x.isfinite().all()
    assert torch.equal(x, draw(20, 96, 5))
    assert not torch.equal(x, draw(20, 96, 6))


def test_inputs_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    for draw in INPUT_KINDS.values():
        draw(4, 64, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("draw", "count"), [(one_hot, 1), (two_hot, 2), (equal_magnitude, 64)])
def test_spikes_are_of_one_size_with_both_signs_everywhere(draw, count):
    x = draw(4000, 64, 7)
    assert ((x != 0).sum(-1) == count).all()
    assert set(x.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert (x == 1).any(0).all()
    assert (x == -1).any(0).all()


def test_quantiles_are_those_of_the_distributions():
    # The 97.5 % points of the normal distribution and of Student's t with 2 degrees of freedom.
    assert gaussian(2000, 64, 8).quantile(0.975) == pytest.approx(1.960, abs=0.03)
    assert heavy_tailed(2000, 64, 8).quantile(0.975) == pytest.approx(4.303, abs=0.1)


def test_no_seed_reproduces_a_rotation():
    for seed in range(3):
        x = gaussian(80, 80, seed).double()
        q, _ = torch.linalg.qr(x)
        assert (q.abs() - Rotation(80, seed).matrix.abs()).abs().max() > 0.1


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda shape: shape.name)
def test_shapes_are_consistent(shape):
    assert shape.num_layers > 0
    assert shape.num_heads % shape.num_kv_heads == 0
    assert Rotation(shape.head_dim).matrix.shape == (shape.head_dim, shape.head_dim)


def test_shapes_have_names_of_their_own():
    assert len({shape.name for shape in MODEL_SHAPES}) == len(MODEL_SHAPES)
