import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import KVCacheLayout, Rotation, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops.cache_gather import cache_gather, cumulative_lengths, launch, reference
from turboquant_core.ops.cache_update import cache_update
from turboquant_core.testing import gaussian

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random_pages(layout, num_blocks, device):
    pages = layout.allocate(num_blocks).random_(generator=torch.Generator().manual_seed(1))
    views = layout.views(pages)
    for scales in (views.key_scales, views.value_scales):
        scales.copy_(torch.rand(scales.shape, generator=torch.Generator().manual_seed(2)))
    return pages.to(device)


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def gather(path, pages, layout, seq_lens, starts, max_tokens, dtype=torch.float32, key_transform=IDENTITY):
    device = pages.device
    batch = len(seq_lens)
    generator = torch.Generator().manual_seed(3)
    columns = len(pages) // max(batch, 1)
    table = torch.randperm(len(pages), generator=generator)[: batch * columns].reshape(batch, columns).int().to(device)
    starts = None if starts is None else int32(starts, device)
    return cache_gather(
        pages,
        table,
        int32(seq_lens, device),
        layout,
        starts=starts,
        key_transform=key_transform,
        dtype=dtype,
        max_tokens=max_tokens,
        path=path,
    )


def assert_same(actual, expected):
    """Equal up to one step of the type: Triton's interpreter cuts a bfloat16 off where PyTorch rounds it."""
    tolerance = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "key_bits", "value_bits"),
    [
        (128, 4, 4),
        (64, 3, 8),
        (80, 5, 6),
        (96, 2, 3),
        (192, 6, 2),
        (256, 8, 5),
        (8, 4, 3),
        (72, 4, 5),
        (160, 3, 4),
        (512, 4, 8),
    ],
)
@pytest.mark.parametrize("starts", [None, [0, 5, 31, 40]], ids=["from the start", "from within"])
def test_kernel_gathers_what_the_reference_gathers(device, head_dim, key_bits, value_bits, starts, dtype):
    layout = KVCacheLayout(TurboQuantConfig(head_dim, key_bits, value_bits), 3, 16)
    pages = random_pages(layout, 16, device)
    arguments = (pages, layout, [17, 0, 64, 33], starts, 120, dtype)
    actual, expected = gather("triton", *arguments), gather("reference", *arguments)
    assert torch.equal(actual[2], expected[2])
    assert actual[2].tolist() == ([0, 17, 17, 81, 114] if starts is None else [0, 17, 17, 50, 50])
    total = int(actual[2][-1])
    for mine, theirs in zip(actual[:2], expected[:2], strict=True):
        assert mine.dtype == dtype
        assert mine.shape == (120, 3, head_dim)
        assert_same(mine[:total], theirs[:total])


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_what_was_stored_comes_back_rotated_in_the_order_of_the_table(device, path):
    layout = KVCacheLayout(TurboQuantConfig(128, 8, 8), 2, 16)
    key, value = (gaussian(80, 128, seed).reshape(40, 2, 128).to(device) for seed in (1, 2))
    pages = layout.allocate(5, device)
    slots = (
        torch.tensor([3, 1, 4], device=device).repeat_interleave(16)[:40] * 16 + torch.arange(40, device=device) % 16
    )
    cache_update(key, value, pages, slots, layout, path="reference")
    table, lens, starts = int32([[3, 1, 4]], device), int32([40], device), int32([9], device)
    keys, values, cu = cache_gather(
        pages, table, lens, layout, starts=starts, dtype=torch.float32, max_tokens=31, path=path
    )
    assert cu.tolist() == [0, 31]
    rotation = Rotation(128)
    for got, x in ((keys, key), (values, value)):
        error = (rotation.unrotate(got) - x[9:]).norm(dim=-1) / x[9:].norm(dim=-1)
        assert error.max() < 0.02


@pytest.mark.parametrize("head_dim", [128, 80])
def test_a_key_mean_is_added_rotated(device, head_dim):
    layout = KVCacheLayout(TurboQuantConfig(head_dim), 3, 16)
    pages = random_pages(layout, 16, device)
    mean = gaussian(3, head_dim, 4).to(device)
    plain, *found = (
        gather(path, pages, layout, [17, 0, 64, 33], None, 114, key_transform=KeyTransform(given))
        for path, given in (("reference", None), ("reference", mean), ("triton", mean))
    )
    for keys, values, _ in found:
        torch.testing.assert_close(keys, plain[0] + Rotation(head_dim).rotate(mean), rtol=1e-6, atol=1e-6)
        assert_same(values, plain[1])


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_where_rows_begin_may_be_given(device, path):
    layout = KVCacheLayout(TurboQuantConfig(64), 2, 16)
    pages, table = random_pages(layout, 8, device), int32([[7, 1, 2], [3, 0, 5]], device)
    lens, starts = int32([40, 33], device), int32([3, 20], device)
    arguments = {"layout": layout, "starts": starts, "max_tokens": 50, "path": path}
    expected = cache_gather(pages, table, lens, **arguments)
    given = cumulative_lengths(lens, starts)
    found = cache_gather(pages, table, lens, cu_seqlens=given, **arguments)
    assert found[2] is given
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_tokens_past_the_bound_are_counted_and_not_written(device, path):
    layout = KVCacheLayout(TurboQuantConfig(64), 2, 16)
    pages = random_pages(layout, 8, device)
    full = gather(path, pages, layout, [20, 50], None, 70)
    cut = gather(path, pages, layout, [20, 50], None, 33)
    assert cut[0].shape == cut[1].shape == (33, 2, 64)
    assert torch.equal(cut[2], full[2])
    for i in (0, 1):
        assert torch.equal(cut[i], full[i][:33])


def test_nothing_past_the_last_token_is_written(device, monkeypatch):
    layout = KVCacheLayout(TurboQuantConfig(64), 2, 16)
    pages = random_pages(layout, 8, device)

    def poisoned(pages, layout, key_dtype, dtype, max_tokens):
        shape = (max_tokens, layout.num_kv_heads, layout.config.head_dim)
        return torch.full(shape, 77.0, dtype=dtype, device=device), torch.full(shape, 77.0, dtype=dtype, device=device)

    for module in (launch, reference):
        monkeypatch.setattr(module, "empty_output", poisoned)
    for path in ("triton", "reference"):
        keys, values, cu = gather(path, pages, layout, [20, 30], [4, 40], 40)
        assert cu.tolist() == [0, 16, 16]
        assert (keys[16:] == 77).all()
        assert (values[16:] == 77).all()
        assert not (keys[:16] == 77).any()


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_pages_and_block_tables_may_be_strided(device, path):
    layout = KVCacheLayout(TurboQuantConfig(64, 3, 4), 2, 16)
    pages = random_pages(layout, 8, device)
    buffer = torch.zeros(8, 3, 2, layout.head_bytes + 2, dtype=torch.uint8, device=device)
    buffer[:, 1, :, :-2] = pages
    table = int32([[7, 1, 2], [3, 0, 5]], device)
    wide = torch.full((2, 6), -1, dtype=torch.int32, device=device)
    wide[:, ::2] = table
    lens = int32([40, 33], device)
    expected = cache_gather(pages, table, lens, layout, max_tokens=73, path=path)
    actual = cache_gather(buffer[:, 1, :, :-2], wide[:, ::2], lens, layout, max_tokens=73, path=path)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize(("seq_lens", "max_tokens"), [([], 8), ([0, 0], 8), ([5], 0)])
def test_nothing_to_gather(device, path, seq_lens, max_tokens):
    layout = KVCacheLayout(TurboQuantConfig(64), 2, 16)
    keys, values, cu = gather(path, random_pages(layout, 4, device), layout, seq_lens, None, max_tokens)
    assert keys.shape == values.shape == (max_tokens, 2, 64)
    assert cu.dtype == torch.int32
    assert cu.tolist() == [0, *torch.tensor(seq_lens, dtype=torch.int32).cumsum(0).tolist()]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    bits=st.tuples(*[st.sampled_from([2, 3, 4, 5, 6, 8])] * 2),
    head_dim=st.sampled_from([16, 40, 64]),
    block_size=st.sampled_from([8, 16, 24]),
    max_tokens=st.integers(1, 100),
)
def test_any_shape(device, lens, bits, head_dim, block_size, max_tokens):
    layout = KVCacheLayout(TurboQuantConfig(head_dim, *bits), 2, block_size)
    pages = random_pages(layout, 5 * len(lens), device)
    seq_lens, starts = ([pair[i] for pair in lens] for i in (0, 1))
    actual, expected = (gather(path, pages, layout, seq_lens, starts, max_tokens) for path in ("triton", "reference"))
    assert torch.equal(actual[2], expected[2])
    written = min(max_tokens, int(actual[2][-1]))
    assert_same(actual[0][:written], expected[0][:written])
    assert_same(actual[1][:written], expected[1][:written])


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"path is 'cuda'", {"path": "cuda"}),
        (r"dtype is torch.int8; it must be one of", {"dtype": torch.int8}),
        (r"max_tokens is -1; it must be an int from 0", {"max_tokens": -1}),
        (r"max_tokens is 2.5; it must be an int from 0", {"max_tokens": 2.5}),
        (r"max_tokens is True; it must be an int from 0", {"max_tokens": True}),
        (r"max_tokens is 2147483648; it must be an int from 0 to 1073741824", {"max_tokens": 2**31}),
        (r"block_table is torch.int64", {"block_table": torch.zeros(2, 3, dtype=torch.int64)}),
        (r"block_table is .*\[6\]", {"block_table": torch.zeros(6, dtype=torch.int32)}),
        (r"seq_lens is .*\[3\]; .* \[2\]", {"seq_lens": torch.zeros(3, dtype=torch.int32)}),
        (r"starts is torch.int64", {"starts": torch.zeros(2, dtype=torch.int64)}),
        (r"cu_seqlens is .*\[2\]; .* \[3\]", {"cu_seqlens": torch.zeros(2, dtype=torch.int32)}),
        (r"key_mean is .*\[3, 64\]; .* \[2, 64\]", {"key_transform": KeyTransform(torch.zeros(3, 64))}),
        (r"pages is .* \[4, 1, 1088\]", {"pages": torch.zeros(4, 1, 1088, dtype=torch.uint8)}),
        (r"different devices", {"starts": torch.zeros(2, dtype=torch.int32, device="meta")}),
    ],
)
def test_what_does_not_fit_is_refused(device, message, changes):
    layout = KVCacheLayout(TurboQuantConfig(64), 2, 16)
    arguments = {
        "pages": layout.allocate(4, device),
        "block_table": torch.zeros(2, 3, dtype=torch.int32, device=device),
        "seq_lens": torch.ones(2, dtype=torch.int32, device=device),
        "layout": layout,
        "max_tokens": 8,
    }
    with pytest.raises(ValueError, match=message):
        cache_gather(**(arguments | changes))


def test_fractional_bits_are_refused(device):
    layout = KVCacheLayout(TurboQuantConfig(128, 4, 2.5), 1, 16)
    lens = int32([1], device)
    with pytest.raises(ValueError, match=r"value_bits is 2\.5"):
        cache_gather(layout.allocate(1, device), lens[None], lens, layout, max_tokens=1)
