import pytest
import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform, tensor_shapes

HEADS, HEAD_DIM, GROUP = 2, 16, 3


def normal(*shape, seed):
    return torch.randn(*shape, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def matrices(*shape, seed=1):
    """Well conditioned, neither symmetric nor orthogonal."""
    return 1.5 * torch.eye(HEAD_DIM) + normal(*shape, HEAD_DIM, seed=seed) / (2 * HEAD_DIM**0.5)


def means(*shape):
    return 3 * normal(*shape, seed=2)


TRANSFORMS = {
    "mean": KeyTransform(means(HEADS)),
    "matrix": KeyTransform(matrix=matrices(HEADS)),
    "both": KeyTransform(means(HEADS), matrices(HEADS)),
}


def test_nothing_happens_to_keys_by_default():
    keys, query = normal(5, HEADS, seed=3), normal(5, HEADS * GROUP, seed=4)
    assert IDENTITY.of_keys(keys) is keys
    assert IDENTITY.of_query(query) is query
    assert IDENTITY.restored(keys) is keys
    assert IDENTITY.stored_mean is None
    assert IDENTITY.tensors() == {}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_stored_keys_come_back_and_lack_the_score_of_the_mean_alone(name):
    transform = TRANSFORMS[name]
    keys, query = normal(5, HEADS, seed=3), normal(5, HEADS * GROUP, seed=4)
    stored = transform.of_keys(keys)
    scores = torch.einsum("qhgd,khd->hgqk", transform.of_query(query).view(5, HEADS, GROUP, -1), stored)
    grouped = query.view(5, HEADS, GROUP, -1)
    expected = torch.einsum("qhgd,khd->hgqk", grouped, keys)
    if transform.mean is not None:
        expected = expected - torch.einsum("qhgd,hd->hgq", grouped, transform.mean)[..., None]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transform.restored(stored.clone()), keys, rtol=1e-5, atol=1e-5)


def test_a_stored_mean_is_what_transformed_keys_are_stored_less_of():
    transform, keys = TRANSFORMS["both"], normal(5, HEADS, seed=3)
    transformed = KeyTransform(matrix=transform.matrix).of_keys(keys)
    torch.testing.assert_close(transform.of_keys(keys), transformed - transform.stored_mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_start_loc", [None, torch.tensor([0, 1, 1, 6], dtype=torch.int32)])
def test_every_row_may_have_its_own(query_start_loc):
    transform = KeyTransform(means(3, HEADS), matrices(3, HEADS))
    query = normal(6, HEADS * GROUP, seed=4)
    starts = [0, 2, 4, 6] if query_start_loc is None else query_start_loc.tolist()
    found = transform.of_query(query, query_start_loc)
    for row in range(3):
        tokens = slice(starts[row], starts[row + 1])
        expected = transform.of_row(row).of_query(query[tokens])
        torch.testing.assert_close(found[tokens], expected, rtol=1e-5, atol=1e-5)


def test_without_its_mean_it_is_that_of_keys_less_the_mean():
    keys, transform = normal(5, HEADS, seed=3), TRANSFORMS["both"]
    stored = transform.of_keys(keys)
    expected = keys - transform.mean
    torch.testing.assert_close(transform.without_mean().restored(stored), expected, rtol=1e-5, atol=1e-5)
    assert TRANSFORMS["mean"].without_mean().tensors() == {}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_shard_does_to_its_heads_what_the_whole_does(name):
    keys, query = normal(5, HEADS, seed=3), normal(5, HEADS * GROUP, seed=4)
    whole, shard = TRANSFORMS[name], TRANSFORMS[name].shard(slice(1, 2))
    shard.check(1, HEAD_DIM)
    assert torch.equal(shard.of_keys(keys[:, 1:]), whole.of_keys(keys)[:, 1:])
    assert torch.equal(shard.of_query(query[:, GROUP:]), whole.of_query(query)[:, GROUP:])


def test_a_map_reaches_every_tensor_and_inverts_nothing_again():
    moved = TRANSFORMS["both"].map(lambda part: part.flip(0))
    for part, original in zip(moved.parts, TRANSFORMS["both"].parts, strict=True):
        assert torch.equal(part, original.flip(0))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_tensors_are_named_for_files(name):
    transform = TRANSFORMS[name]
    tensors = transform.tensors()
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert shapes.items() <= tensor_shapes(HEADS, HEAD_DIM).items()
    again = KeyTransform.from_tensors({**tensors, "key_order": torch.zeros(1)})
    for part, original in zip(again.parts, transform.parts, strict=True):
        assert (part is None and original is None) or torch.equal(part, original)


@pytest.mark.parametrize("scales", [(1.0, 0.0), (1.0, 1e-9), (1.0, torch.nan), (torch.inf, 1.0)])
def test_a_matrix_that_cannot_be_undone_is_refused(scales):
    rotation = torch.linalg.qr(matrices(1)[0].double()).Q
    values = torch.full((HEAD_DIM,), scales[0], dtype=torch.float64)
    values[-1] = scales[1]
    matrix = (rotation @ values.diag() @ rotation.T @ matrices(1, seed=7)[0].double()).float()
    with pytest.raises(ValueError, match="cannot be undone"):
        KeyTransform(matrix=torch.stack([torch.eye(HEAD_DIM), matrix]))


def test_what_is_not_for_these_keys_is_refused():
    TRANSFORMS["both"].check(HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"key_mean is .*\[2, 16\]; these keys need float32 \[3, 16\]"):
        TRANSFORMS["mean"].check(3, HEAD_DIM)
    with pytest.raises(ValueError, match=r"key_matrix is .*; these keys need float32 \[2, 8, 8\]"):
        TRANSFORMS["matrix"].check(HEADS, 8)
    with pytest.raises(ValueError, match=r"key_mean is torch\.float64"):
        KeyTransform(means(HEADS).double()).check(HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="key_mean is not finite"):
        KeyTransform(torch.full((HEADS, HEAD_DIM), torch.nan)).check(HEADS, HEAD_DIM)
