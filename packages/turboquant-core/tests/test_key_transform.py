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


def with_singular_values(first, others=1.0):
    left, right = (torch.linalg.qr(matrices(1, seed=seed)[0].double()).Q for seed in (5, 6))
    values = torch.full((HEAD_DIM,), others, dtype=torch.float64)
    values[0] = first
    return torch.stack([torch.eye(HEAD_DIM), (left @ values.diag() @ right).float()])


@pytest.mark.parametrize("first", [0.0, 1e-9, 1e-5, 1e5, 1e7, 1e9])
def test_a_matrix_that_cannot_be_undone_is_refused(first):
    with pytest.raises(ValueError, match="cannot be undone: the condition number"):
        KeyTransform(matrix=with_singular_values(first))


@pytest.mark.parametrize("factor", [1e-30, 5e-3, 200, 1e30])
def test_a_matrix_that_scales_in_float16_do_not_hold_is_refused(factor):
    with pytest.raises(ValueError, match=r"largest singular value .* Multiply it"):
        KeyTransform(matrix=torch.stack([torch.eye(HEAD_DIM), torch.eye(HEAD_DIM) * factor]))


@pytest.mark.parametrize(("first", "others"), [(2e-2, 10), (90.0, 0.1), (90.0, 90.0), (0.011, 0.011)])
def test_any_matrix_that_is_taken_is_undone(first, others):
    keys = normal(5, HEADS, seed=3)
    transform = KeyTransform(means(HEADS), with_singular_values(first, others))
    restored = transform.restored(transform.of_keys(keys))
    assert (restored - keys).norm() <= 1e-3 * keys.norm()


@pytest.mark.parametrize(
    ("mean", "matrix", "message"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), None, "key_mean is not finite. Take it from finite keys"),
        (torch.full((2, 4), -torch.inf), torch.eye(4).expand(2, 4, 4), "key_mean is not finite"),
        (None, torch.full((2, 4, 4), torch.nan), "key_matrix is not finite"),
        (None, torch.full((2, 4, 4), torch.inf), "key_matrix is not finite"),
        (None, torch.eye(4), r"key_matrix is torch.float32 \[4, 4\]; it must be float32 \[num_kv_heads, head_dim, he"),
        (None, torch.ones(2, 4, 3), r"key_matrix is \[2, 4, 3\]; the matrix of a head must be square"),
        (None, torch.ones(2, 4, 4, dtype=torch.int32), r"key_matrix is torch.int32"),
        (None, torch.eye(4).bfloat16().expand(2, 4, 4), r"key_matrix is torch.bfloat16"),
        (None, torch.ones(0, 4, 4), r"key_matrix is torch.float32 \[0, 4, 4\]"),
        (
            torch.ones(4),
            None,
            r"key_mean is torch.float32 \[4\]; it must be float32 \[num_kv_heads, head_dim\], or one",
        ),
        (torch.ones(2, 4).double(), None, r"key_mean is torch.float64"),
        (torch.ones(3, 4), torch.eye(4).expand(2, 4, 4), "same rows, heads and head_dim"),
        (torch.ones(2, 8), torch.eye(4).expand(2, 4, 4), "same rows, heads and head_dim"),
        (torch.ones(3, 2, 4), torch.eye(4).expand(2, 2, 4, 4), "same rows, heads and head_dim"),
        (torch.ones(2, 4, device="meta"), torch.eye(4).expand(2, 4, 4), "key_mean is on meta and key_matrix on cpu"),
    ],
)
def test_what_is_no_transform_is_refused_when_it_is_made(mean, matrix, message):
    with pytest.raises(ValueError, match=message):
        KeyTransform(mean, matrix)


@pytest.mark.parametrize("options", [{"matrix": [[1.0]]}, {"mean": 0.0}, {"mean": "a"}])
def test_what_is_no_tensor_is_refused(options):
    with pytest.raises(TypeError, match=r"is a (list|float|str); it must be a tensor"):
        KeyTransform(**options)


def test_another_kind_is_no_subclass():
    with pytest.raises(TypeError, match="Rotated is a subclass of KeyTransform"):
        type("Rotated", (KeyTransform,), {})


def test_the_inverse_is_not_given():
    with pytest.raises(TypeError):
        KeyTransform(None, matrices(HEADS), matrices(HEADS))


def test_a_part_of_a_transform_is_checked_no_more(monkeypatch):
    """Every step makes some: the check waits for the device."""
    transform = KeyTransform(means(3, HEADS), matrices(3, HEADS))
    monkeypatch.setattr(KeyTransform, "__post_init__", lambda transform: pytest.fail("checked again"))
    transform.map(torch.clone).shard(slice(1)).without_mean().of_row(0)
    KeyTransform.of_parts(*transform.parts)


def test_what_is_not_for_these_keys_is_refused():
    TRANSFORMS["both"].check(HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"key_mean is .*\[2, 16\]; these keys need float32 \[3, 16\]"):
        TRANSFORMS["mean"].check(3, HEAD_DIM)
    with pytest.raises(ValueError, match=r"key_matrix is .*; these keys need float32 \[2, 8, 8\]"):
        TRANSFORMS["matrix"].check(HEADS, 8)
    with pytest.raises(ValueError, match="key_mean is not finite"):
        TRANSFORMS["mean"].map(lambda part: part * torch.nan).check(HEADS, HEAD_DIM)
