import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import KVCacheLayout, Rotation, TurboQuantConfig, grid_codebook, unpack
from turboquant_core.codebook import ascending_codes
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops.cache_update import cache_update
from turboquant_core.ops.cache_update.warpgroup import WARPGROUP
from turboquant_core.testing import gaussian

# The interpreter computes padding and vectors that are not finite in NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

POISON = 0xA5
PATHS = ["warpgroup", "triton", "reference"]
FIELDS = ("key_codes", "value_codes", "key_scales", "value_scales")
CASES = [
    # head_dim, key_bits, value_bits, dtype, key scale, value scale, centred
    (128, 4, 4, torch.bfloat16, "unbiased", "least_squares", False),
    (128, 4, 4, torch.bfloat16, "unbiased", "least_squares", True),
    (128, 8, 2, torch.float16, "norm", "unbiased", True),
    (64, 3, 6, torch.float16, "least_squares", "norm", False),
    (64, 5, 3, torch.float32, "unbiased", "least_squares", True),
    (80, 6, 5, torch.bfloat16, "least_squares", "least_squares", True),
    (96, 2, 8, torch.float32, "unbiased", "least_squares", False),
    (192, 4, 3, torch.bfloat16, "unbiased", "least_squares", False),
    (256, 4, 4, torch.bfloat16, "unbiased", "least_squares", True),
    (256, 2, 5, torch.float32, "norm", "unbiased", True),
    (72, 4, 5, torch.float16, "unbiased", "least_squares", True),
    (160, 3, 4, torch.float32, "unbiased", "least_squares", True),
    (512, 8, 4, torch.float16, "unbiased", "least_squares", False),
    (512, 4, 4, torch.bfloat16, "unbiased", "least_squares", True),
    (8, 3, 4, torch.float16, "unbiased", "least_squares", False),
]


def make_case(device, head_dim, key_bits, value_bits, dtype, key_scale, value_scale, centred, num_tokens=70, heads=3):
    layout = KVCacheLayout(TurboQuantConfig(head_dim, key_bits, value_bits, key_scale, value_scale), heads, 16)
    key, value = (gaussian(num_tokens * heads, head_dim, s).reshape(num_tokens, heads, head_dim) for s in (1, 2))
    mean = 3 * gaussian(heads, head_dim, 3) if centred else None
    if mean is not None:
        key = key + mean
        mean = mean.to(device)
    generator = torch.Generator().manual_seed(4)
    slots = torch.randperm(2 * num_tokens + 16, generator=generator)[:num_tokens]
    slots[torch.rand(num_tokens, generator=generator) < 0.2] = -1
    return layout, key.to(device, dtype), value.to(device, dtype), slots.to(device), mean


def obstacle(layout, key, value, pages):
    """Why warpgroups cannot store these."""
    return WARPGROUP.obstacle(layout, IDENTITY, key, value, pages)


def update(path, layout, key, value, slots, mean):
    top = int(slots.max()) if len(slots) else 0
    pages = layout.allocate(max(top, 0) // layout.block_size + 2, key.device).fill_(POISON)
    if path == "warpgroup" and (reason := obstacle(layout, key, value, pages)):
        pytest.skip(reason)
    cache_update(key, value, pages, slots, layout, key_transform=KeyTransform(mean), path=path)
    return pages


def stored(layout, pages, slots):
    """The fields of the slots written, [tokens, heads, n] each."""
    slots = slots[slots >= 0]
    where = (slots // layout.block_size, slice(None), slots % layout.block_size)
    views = layout.views(pages)
    return {field: getattr(views, field)[where] for field in FIELDS}


def rotation_bound(head_dim, x, mean):
    """How far a rotated unit coordinate may be off, [tokens, heads, 1].

    Splitting, normalising and the grid are 2^-22 each at most (Cauchy-Schwarz for the sums); a product adds 16 channels
    at a time, and each addition loses up to 2^-23 of the sum. A mean subtracted later leaves the errors of the larger
    vector.
    """
    bound = 2**-20 + head_dim / 16 * 2**-23
    if mean is None:
        return torch.full((*x.shape[:2], 1), bound)
    grown = x.double().norm(dim=-1, keepdim=True) + mean.double().norm(dim=-1, keepdim=True)
    return bound * (1 + grown / (x.float() - mean).double().norm(dim=-1, keepdim=True)).cpu()


def assert_codes_agree(x, mean, bits, actual, expected):
    head_dim = x.shape[-1]
    ranks = ascending_codes(bits).argsort()
    actual, expected = (ranks[unpack(codes.cpu(), bits, head_dim).int()] for codes in (actual, expected))
    differ = actual != expected
    # Boundaries of 8 bits at head_dim 512 lie closest.
    assert differ.sum() <= 1 + 2e-4 * differ.numel()
    assert ((actual - expected).abs() <= 1).all()
    centred = (x.float() if mean is None else x.float() - mean).cpu().double()
    y = centred / centred.norm(dim=-1, keepdim=True) @ Rotation(head_dim).matrix.T
    boundary = grid_codebook(head_dim, bits).boundaries[torch.minimum(actual, expected).clamp(max=2**bits - 2)]
    assert ((y - boundary).abs() <= rotation_bound(head_dim, x, mean))[differ].all()
    return ~differ.any(-1)


def assert_scales_agree(actual, expected, same_codes):
    actual, expected = (scales.cpu().contiguous().view(torch.int16).int() for scales in (actual, expected))
    steps = (actual - expected).abs().squeeze(-1)
    # A float16 step, and where a code differs too, what its exchange does to the sums.
    assert steps.max() <= 2
    assert steps[same_codes].max() <= 1
    assert (steps > 0).float().mean() < 0.05


def assert_paths_agree(layout, key, value, slots, mean):
    expected_pages = update("reference", layout, key, value, slots, mean)
    assert_rest_untouched(layout, expected_pages, slots)
    for path in ["triton"] if obstacle(layout, key, value, expected_pages) else ["triton", "warpgroup"]:
        pages = update(path, layout, key, value, slots, mean)
        assert_rest_untouched(layout, pages, slots)
        assert_stored_agrees(layout, key, value, slots, mean, pages, expected_pages)


def assert_stored_agrees(layout, key, value, slots, mean, actual_pages, expected_pages):
    actual, expected = (stored(layout, pages, slots) for pages in (actual_pages, expected_pages))
    kept = slots >= 0
    config = layout.config
    for name, x, bits, offset in (("key", key, config.key_bits, mean), ("value", value, config.value_bits, None)):
        codes, scales = f"{name}_codes", f"{name}_scales"
        same = assert_codes_agree(x[kept], offset, bits, actual[codes], expected[codes])
        assert_scales_agree(actual[scales], expected[scales], same)


def assert_rest_untouched(layout, pages, slots):
    pages = pages.clone()
    views = layout.views(pages)
    slots = slots[slots >= 0]
    for field in FIELDS:
        view = getattr(views, field)
        poison = torch.full((), POISON, dtype=torch.uint8, device=pages.device).repeat(view.element_size())
        view[slots // layout.block_size, :, slots % layout.block_size] = poison.view(view.dtype)
    assert (pages == POISON).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_kernel_stores_what_the_reference_stores(device, case):
    assert_paths_agree(*make_case(device, *case))


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 130])
def test_any_number_of_tokens(device, num_tokens):
    layout, key, value, slots, mean = make_case(device, *CASES[1], num_tokens=130, heads=2)
    slots = torch.where(slots < 0, 300 + torch.arange(130, device=device), slots)
    key, value, slots = key[:num_tokens], value[:num_tokens], slots[:num_tokens]
    if num_tokens:
        assert_paths_agree(layout, key, value, slots, mean)
    else:
        assert all((update(path, layout, key, value, slots, mean) == POISON).all() for path in ("auto", *PATHS[1:]))


@pytest.mark.parametrize("path", PATHS)
def test_tokens_without_a_slot_are_not_stored(device, path):
    layout, key, value, slots, mean = make_case(device, *CASES[0])
    pages = update(path, layout, key, value, torch.full_like(slots, -1), mean)
    assert (pages == POISON).all()


@pytest.mark.parametrize("path", PATHS)
def test_views_of_a_fused_tensor_and_of_a_bigger_cache_are_used_in_place(device, path):
    layout, key, value, slots, mean = make_case(device, *CASES[1])
    qkv = torch.full((key.shape[0], 4 * 3 * 128), float("nan"), dtype=key.dtype, device=device)
    fused_key, fused_value = (qkv[:, i * 384 : (i + 1) * 384].unflatten(-1, (3, 128)) for i in (2, 3))
    fused_key.copy_(key)
    fused_value.copy_(value)
    strided_slots = torch.stack([slots, torch.full_like(slots, 7)], dim=1)[:, 0]
    expected = update(path, layout, key, value, slots, mean)
    num_blocks = len(expected)
    buffer = torch.full((num_blocks, 2, 3, layout.head_bytes + 8), POISON, dtype=torch.uint8, device=device)
    pages = buffer[:, 1, :, : layout.head_bytes]
    cache_update(fused_key, fused_value, pages, strided_slots, layout, key_transform=KeyTransform(mean), path=path)
    assert torch.equal(pages, expected)
    assert (buffer[:, 0] == POISON).all()
    assert (buffer[..., layout.head_bytes :] == POISON).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", ["norm", "unbiased", "least_squares"])
def test_lengths_far_from_one(device, path, rule):
    layout = KVCacheLayout(TurboQuantConfig(64, 4, 4, rule, rule), 1, 16)
    lengths = torch.tensor([1e-8, 1e-6, 1.0, 1e6, 1e9, 1e30, 0.0])
    direction = gaussian(1, 64, 5)
    x = ((direction / direction.norm()) * lengths[:, None])[:, None].to(device)
    slots = torch.arange(7, device=device)
    written = stored(layout, update(path, layout, x, x, slots, None), slots)
    for field in ("key", "value"):
        codes = unpack(written[f"{field}_codes"], 4, 64)[:, 0]
        scale = written[f"{field}_scales"].float().square().flatten().cpu()
        assert (codes[:5] == codes[2]).all()
        torch.testing.assert_close(scale[:5] / scale[2], lengths[:5], rtol=4e-3, atol=0)
        assert not scale[5].isfinite()
        assert scale[6] == 0
        # The least magnitude below zero.
        assert (codes[6] == 8).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_is_carried_and_harms_no_other(device, path, dtype, bad):
    layout, key, value, slots, _ = make_case(device, 64, 4, 8, dtype, "unbiased", "least_squares", False, 40, 2)
    slots = torch.arange(40, device=device)
    expected = update(path, layout, key, value, slots, None)
    key[5, 1, 3] = value[9, 0, 60] = bad
    pages = update(path, layout, key, value, slots, None)
    views, clean = layout.views(pages), layout.views(expected)
    assert not views.key_scales[0, 1, 5].isfinite()
    assert not views.value_scales[0, 0, 9].isfinite()
    for field, head, position in (("key", 1, 5), ("value", 0, 9)):
        for plane in ("codes", "scales"):
            getattr(views, f"{field}_{plane}")[0, head, position] = getattr(clean, f"{field}_{plane}")[
                0, head, position
            ]
    assert torch.equal(pages, expected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    head_dim=st.sampled_from([16, 40, 64, 72, 128]),
    bits=st.tuples(*[st.sampled_from([2, 3, 4, 5, 6, 8])] * 2),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    heads=st.integers(1, 5),
    num_tokens=st.integers(1, 80),
    centred=st.booleans(),
)
def test_any_shape(device, head_dim, bits, dtype, heads, num_tokens, centred):
    layout, key, value, slots, mean = make_case(
        device, head_dim, *bits, dtype, "unbiased", "least_squares", centred, num_tokens, heads
    )
    slots[0] = slots.max() + 1
    assert_paths_agree(layout, key, value, slots, mean)


def test_auto_takes_the_path_of_the_device(device):
    layout, key, value, slots, mean = make_case(device, *CASES[0])
    kernel = "triton" if obstacle(layout, key, value, layout.allocate(1, device)) else "warpgroup"
    chosen = update(kernel if device.type == "cuda" else "reference", layout, key, value, slots, mean)
    assert torch.equal(update("auto", layout, key, value, slots, mean), chosen)


def bad_input(name, **changes):
    return pytest.param(name, changes, id=name)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        bad_input(r"path is 'cuda'; it must be one of auto, warpgroup, triton, reference", path="cuda"),
        bad_input(r"key is torch.float64; it must be one of", key=lambda x: x.double()),
        bad_input(r"key is torch.float32 \[70, 3, 64\]; .* \[any, 3, 128\]", key=lambda x: x[..., :64].contiguous()),
        bad_input(r"value is torch.float16 .*; it must be torch.float32", value=lambda x: x.half()),
        bad_input(r"value is .*\[69, 3, 128\]; .* \[70, 3, 128\]", value=lambda x: x[1:]),
        bad_input(r"key has strides .* contiguous", key=lambda x: x.mT.contiguous().mT),
        bad_input(r"slot_mapping is torch.int32", slots=lambda x: x.int()),
        bad_input(r"slot_mapping is .*\[71\]; .* \[70\]", slots=lambda x: torch.cat([x, x[:1]])),
        bad_input(r"key_mean is .*\[3, 64\]", mean=lambda x: x[:, :64]),
        bad_input(r"key_mean is torch.bfloat16", mean=lambda x: x.bfloat16()),
        bad_input(r"pages is torch.int8", pages=lambda x: x.view(torch.int8)),
        bad_input(r"pages is .* it must be torch.uint8 \[any, 3, 2112\]", pages=lambda x: x[..., 2:]),
        bad_input(r"pages have strides .* even", pages=lambda x: x.new_empty(4, 3, 2113)[..., :2112]),
        bad_input(r"different devices: .*key_mean on meta", mean=lambda x: x.to("meta")),
    ],
)
def test_what_does_not_fit_is_refused(device, message, changes):
    layout, key, value, slots, mean = make_case(device, 128, 4, 4, torch.float32, "unbiased", "norm", True)
    arguments = {"key": key, "value": value, "slots": slots, "mean": mean, "pages": layout.allocate(20, device)}
    path = changes.get("path", "auto")
    arguments |= {name: change(arguments[name]) for name, change in changes.items() if name != "path"}
    with pytest.raises(ValueError, match=message):
        cache_update(
            arguments["key"],
            arguments["value"],
            arguments["pages"],
            arguments["slots"],
            layout,
            key_transform=KeyTransform(arguments["mean"]),
            path=path,
        )


@pytest.mark.parametrize(("bits", "message"), [((2.5, 4), "key_bits is 2.5"), ((4, 3.5), "value_bits is 3.5")])
def test_fractional_bits_are_refused(device, bits, message):
    layout = KVCacheLayout(TurboQuantConfig(128, *bits), 1, 16)
    x = torch.zeros(1, 1, 128, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=f"{message}; cache operations store whole bits"):
        cache_update(x, x, layout.allocate(1, device), slots, layout)


def test_kernels_are_refused_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layout, key, value, slots, mean = make_case("cpu", *CASES[0])
    with pytest.raises(ValueError, match="path is 'triton', which cannot run here: the tensors are on cpu"):
        update("triton", layout, key, value, slots, mean)


def test_reference_needs_no_triton(run_python):
    code = """
import sys
sys.modules["triton"] = None
import torch
from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.ops.cache_update import cache_update
from turboquant_core.ops.cache_gather import cache_gather
layout = KVCacheLayout(TurboQuantConfig(64), 1, 16)
pages = layout.allocate(1)
x = torch.ones(1, 1, 64)
cache_update(x, x, pages, torch.zeros(1, dtype=torch.int64), layout)
table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
print(cache_gather(pages, table, lens, layout, max_tokens=1)[2].tolist())
"""
    assert run_python(code).strip() == "[0, 1]"
