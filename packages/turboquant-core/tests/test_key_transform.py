import pytest
import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform, tensor_types

HEADS, HEAD_DIM, GROUP = 2, 16, 3


def normal(*shape, seed):
    return torch.randn(*shape, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def means(*shape):
    return 3 * normal(*shape, seed=2)


def scales(*shape):
    return normal(*shape, seed=1).exp()


def orders(*shape):
    return normal(*shape, seed=5).argsort(-1)


TRANSFORMS = {
    "mean": KeyTransform(means(HEADS)),
    "scale": KeyTransform(scale=scales(HEADS)),
    "order": KeyTransform(order=orders(HEADS)),
    "mean and scale": KeyTransform(means(HEADS), scales(HEADS)),
    "mean and order": KeyTransform(means(HEADS), order=orders(HEADS)),
    "all": KeyTransform(means(HEADS), scales(HEADS), orders(HEADS)),
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


def test_a_stored_key_is_of_another_channel_less_its_mean_and_times_its_scale():
    transform, keys = TRANSFORMS["all"], normal(5, HEADS, seed=3)
    stored = transform.of_keys(keys.bfloat16())
    assert stored.dtype == torch.float32
    for head in range(HEADS):
        mean, scale, order = (part[head].tolist() for part in transform.parts)
        for channel, origin in enumerate(order):
            expected = (keys[:, head, origin].bfloat16().float() - mean[origin]) * scale[origin]
            assert torch.equal(stored[:, head, channel], expected)


def test_keys_wider_than_float32_come_back_so():
    keys, transform = normal(5, HEADS, seed=3).double(), TRANSFORMS["all"]
    wide = ((keys - transform.mean) * transform.scale).gather(-1, transform.order.expand_as(keys))
    restored = transform.restored(wide)
    assert restored.dtype == torch.float64
    torch.testing.assert_close(restored, keys, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_stored_mean_is_what_transformed_keys_are_stored_less_of(name):
    transform, keys = TRANSFORMS[name], normal(5, HEADS, seed=3)
    transformed = transform.without_mean().of_keys(keys)
    lacked = 0 if transform.mean is None else transform.stored_mean
    torch.testing.assert_close(transform.of_keys(keys), transformed - lacked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("query_start_loc", [None, torch.tensor([0, 1, 1, 6], dtype=torch.int32)])
@pytest.mark.parametrize("parts", [(3, 3, 3), (3, None, 3), (None, 3, None), (0, 3, 0), (3, 0, 3)])
def test_every_row_may_have_its_own(query_start_loc, parts):
    """Parts of three rows, of none, or left out."""

    def part_of(rows, made):
        return None if rows is None else made(*[rows] * (rows > 0), HEADS)

    transform = KeyTransform(*map(part_of, parts, (means, scales, orders)))
    query = normal(6, HEADS * GROUP, seed=4)
    starts = [0, 2, 4, 6] if query_start_loc is None else query_start_loc.tolist()
    found = transform.of_query(query, query_start_loc)
    for row in range(3):
        tokens, of_row = slice(starts[row], starts[row + 1]), transform.of_row(row)
        assert torch.equal(found[tokens], of_row.of_query(query[tokens]))
        if transform.mean is not None:
            assert torch.equal(transform.stored_mean.expand(3, -1, -1)[row], of_row.stored_mean)


def test_without_its_mean_it_is_that_of_keys_less_the_mean():
    keys, transform = normal(5, HEADS, seed=3), TRANSFORMS["all"]
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


def test_a_map_reaches_every_tensor():
    moved = TRANSFORMS["all"].map(lambda part: part.flip(0))
    for part, original in zip(moved.parts, TRANSFORMS["all"].parts, strict=True):
        assert torch.equal(part, original.flip(0))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_tensors_are_named_for_files(name):
    transform = TRANSFORMS[name]
    tensors = transform.tensors()
    types = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    assert types.items() <= tensor_types(HEADS, HEAD_DIM).items()
    again = KeyTransform.from_tensors({**tensors, "key_order": torch.zeros(1)})
    for part, original in zip(again.parts, transform.parts, strict=True):
        assert (part is None and original is None) or torch.equal(part, original)


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_any_scale_that_is_taken_is_undone(most):
    keys, scale = normal(5, HEADS, seed=3), scales(HEADS)
    scale[0, 3] = most
    transform = KeyTransform(means(HEADS), scale)
    restored = transform.restored(transform.of_keys(keys))
    torch.testing.assert_close(restored, keys, rtol=1e-5, atol=1e-5)


ORDER = torch.arange(4).repeat(2, 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"mean": torch.tensor([[1.0, 2], [3, torch.nan]])}, "key_mean holds nan; it must be finite. Take it from"),
        ({"mean": torch.full((2, 4), -torch.inf), "scale": torch.ones(2, 4)}, "key_mean holds -inf"),
        (
            {"mean": torch.ones(4)},
            r"key_mean is torch.float32 \[4\]; it must be float32 \[num_kv_heads, head_dim\], or",
        ),
        ({"mean": torch.ones(2, 4).double()}, "key_mean is torch.float64"),
        ({"scale": torch.tensor([[1.0, 0.0]])}, "key_scale holds 0.0; it must be 0.001 to 1000, .* Multiply all"),
        ({"scale": torch.tensor([[1.0], [2.0**-11]])}, "key_scale holds 0.00048"),
        ({"scale": torch.tensor([[1.0, -1.0]])}, "key_scale holds -1.0"),
        ({"scale": torch.tensor([[1e4, 1.0]])}, "key_scale holds 10000.0"),
        ({"scale": torch.tensor([[1.0, torch.nan]])}, "key_scale holds nan"),
        ({"scale": torch.tensor([[torch.inf, 1.0]])}, "key_scale holds inf"),
        ({"scale": torch.ones(0, 4)}, r"key_scale is torch.float32 \[0, 4\]"),
        ({"scale": torch.ones(2, 4).bfloat16()}, "key_scale is torch.bfloat16"),
        ({"order": torch.tensor([[0, 1, 1]])}, "key_channel_order holds 1; it must name every channel of a head once"),
        ({"order": torch.tensor([[0, 1, 3]])}, "key_channel_order holds 3"),
        ({"order": torch.tensor([[0, 1, -1]])}, "key_channel_order holds -1"),
        ({"order": torch.ones(1, 1, 2, 4).long()}, r"key_channel_order is torch.int64 \[1, 1, 2, 4\]"),
        ({"order": ORDER.int()}, r"key_channel_order is torch.int32 .* it must be int64 \[num_kv_heads"),
        (
            {"mean": torch.ones(3, 4), "scale": torch.ones(2, 4)},
            r"key_mean is \[3, 4\] and key_scale is \[2, 4\]; they",
        ),
        ({"scale": torch.ones(2, 8), "order": ORDER}, "same rows, heads and head_dim"),
        ({"mean": torch.ones(3, 2, 4), "order": ORDER.expand(2, -1, -1)}, "same rows, heads and head_dim"),
        ({"mean": torch.ones(2, 4, device="meta"), "order": ORDER}, "key_mean is on meta and key_channel_order on cpu"),
    ],
)
def test_what_is_no_transform_is_refused_when_it_is_made(parts, message):
    with pytest.raises(ValueError, match=message):
        KeyTransform(**parts)


@pytest.mark.parametrize("options", [{"order": [[1]]}, {"scale": 0.0}, {"mean": "a"}])
def test_what_is_no_tensor_is_refused(options):
    with pytest.raises(TypeError, match=r"is a (list|float|str); it must be a tensor"):
        KeyTransform(**options)


def test_another_kind_is_no_subclass():
    with pytest.raises(TypeError, match="Rotated is a subclass of KeyTransform"):
        type("Rotated", (KeyTransform,), {})


def test_a_part_of_a_transform_is_checked_no_more(monkeypatch):
    """Every step makes some: the check waits for the device."""
    transform = KeyTransform(means(3, HEADS), scales(3, HEADS), orders(3, HEADS))
    monkeypatch.setattr(KeyTransform, "__post_init__", lambda transform: pytest.fail("checked again"))
    transform.map(torch.clone).shard(slice(1)).without_mean().of_row(0)
    KeyTransform.of_parts(*transform.parts)


def test_what_is_not_for_these_keys_is_refused():
    TRANSFORMS["all"].check(HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"key_mean is .*\[2, 16\]; these keys need float32 \[3, 16\]"):
        TRANSFORMS["mean"].check(3, HEAD_DIM)
    with pytest.raises(ValueError, match=r"key_channel_order is .*; these keys need int64 \[2, 8\]"):
        TRANSFORMS["order"].check(HEADS, 8)
    with pytest.raises(ValueError, match="key_mean holds nan"):
        TRANSFORMS["mean"].map(lambda part: part * torch.nan).check(HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="key_channel_order holds 0"):
        TRANSFORMS["order"].map(lambda part: part * 0).check(HEADS, HEAD_DIM)
