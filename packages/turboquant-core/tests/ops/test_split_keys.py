"""Split keys, and keys that go through a scale and an order, as kernels store and gather them."""

import pytest
import torch

from turboquant_core import KVCacheLayout, Rotation, TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import cache_gather, cache_update
from turboquant_core.vector_format import SPLIT_BITS

HEADS, NUM_TOKENS = 2, 37
POISON = 0xA5

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Inputs:
    def __init__(self, head_dim, dtype, device, parts="", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device)

        self.key, self.value = (normal(NUM_TOKENS, HEADS, head_dim).to(dtype) for _ in range(2))
        self.transform = KeyTransform(
            3 * normal(HEADS, head_dim) if "mean" in parts else None,
            # Far from one in the mean: entries of a scaled float16 matrix would overflow.
            200 * normal(HEADS, head_dim).exp().clamp(1e-2, 4) if "scale" in parts else None,
            normal(HEADS, head_dim).argsort(-1) if "order" in parts else None,
        )
        self.slots = torch.randperm(48, generator=generator)[:NUM_TOKENS].to(device)
        self.slots[3] = -1

    def store(self, layout, path):
        pages = layout.allocate(4, self.key.device).fill_(POISON)
        cache_update(self.key, self.value, pages, self.slots, layout, key_transform=self.transform, path=path)
        return pages


def assert_same_pages(layout, actual, expected):
    """But for a rounding here and there: codes that differ by one are one byte of some thousands."""
    for field in ("key_codes", "value_codes", "key_scales", "value_scales"):
        found, wanted = (getattr(layout.views(pages), field) for pages in (actual, expected))
        if field.endswith("scales"):
            found, wanted = (x.contiguous().view(torch.int16).int() for x in (found, wanted))
            assert ((found - wanted).abs() <= 2).all(), field
        assert (found != wanted).float().mean() < (0.02 if field.endswith("scales") else 2e-3), field
    key, wanted_key = (
        cache_gather(
            pages,
            torch.arange(3, dtype=torch.int32, device=pages.device)[None],
            torch.tensor([48], dtype=torch.int32, device=pages.device),
            layout,
            dtype=torch.float32,
            max_tokens=48,
            path="reference",
        )[0]
        for pages in (actual, expected)
    )
    stored = wanted_key.isfinite().all(-1)
    assert (key[stored] - wanted_key[stored]).norm() < 0.01 * wanted_key[stored].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "bits", "value_bits", "parts"),
    [
        *((64, bits, bits, "") for bits in SPLIT_BITS),
        (80, 3, 4, "mean"),
        (128, 4, 4, "scale order"),
        (128, 2, 8, "mean scale order"),
        (256, 4, 3, "mean scale order"),
    ],
)
def test_the_kernel_stores_what_the_reference_does(device, head_dim, bits, value_bits, parts, dtype):
    layout = KVCacheLayout(TurboQuantConfig(head_dim, bits, value_bits, key_split=True), HEADS, 16)
    inputs = Inputs(head_dim, dtype, device, parts)
    assert_same_pages(layout, inputs.store(layout, "triton"), inputs.store(layout, "reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parts", ["scale", "order", "mean scale order"])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_a_transform_goes_with_keys_of_one_width(device, head_dim, parts, dtype):
    layout = KVCacheLayout(TurboQuantConfig(head_dim, 4, 3), HEADS, 16)
    inputs = Inputs(head_dim, dtype, device, parts)
    assert_same_pages(layout, inputs.store(layout, "triton"), inputs.store(layout, "reference"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("channel", [3, 60])
@pytest.mark.parametrize("path", ["triton", "reference"])
def test_a_key_that_is_not_finite_has_no_finite_half(device, path, channel, bad):
    layout = KVCacheLayout(TurboQuantConfig(64, 4, 4, key_split=True), HEADS, 16)
    inputs = Inputs(64, torch.float32, device)
    inputs.slots = torch.arange(NUM_TOKENS, device=device)
    expected = layout.views(inputs.store(layout, path)).key_scales
    inputs.key[5, 1, channel] = bad
    scales = layout.views(inputs.store(layout, path)).key_scales
    assert not scales[0, 1, 5].isfinite().any()
    scales[0, 1, 5] = expected[0, 1, 5]
    assert torch.equal(scales[:2], expected[:2])


@pytest.mark.parametrize("bits", SPLIT_BITS)
@pytest.mark.parametrize("parts", ["", "mean scale order"])
def test_they_are_gathered_as_they_were_stored(device, bits, parts):
    layout = KVCacheLayout(TurboQuantConfig(64, bits, 8, key_split=True), HEADS, 16)
    inputs = Inputs(64, torch.float32, device, parts)
    pages = inputs.store(layout, "reference")
    table = torch.arange(3, dtype=torch.int32, device=device)[None]
    lens = torch.tensor([48], dtype=torch.int32, device=device)
    options = {"key_transform": inputs.transform, "dtype": torch.float32, "max_tokens": 48}
    (keys, values, _), (expected, expected_values, _) = (
        cache_gather(pages, table, lens, layout, path=path, **options) for path in ("triton", "reference")
    )
    kept = inputs.slots[inputs.slots >= 0]
    torch.testing.assert_close(keys[kept], expected[kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[kept], expected_values[kept])
    if not parts:
        exact = Rotation(64).rotate(inputs.key[inputs.slots >= 0])
        assert (keys[kept] - exact).norm() < {2: 0.6, 3: 0.35, 4: 0.2}[bits] * exact.norm()


def test_a_path_that_cannot_says_so(device):
    layout = KVCacheLayout(TurboQuantConfig(64, 4, 4, key_split=True), HEADS, 16)
    with pytest.raises(ValueError, match=r"path is 'warpgroup', which cannot run here"):
        Inputs(64, torch.bfloat16, device).store(layout, "warpgroup")
