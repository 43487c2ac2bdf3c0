"""Mean, scale and order of keys through every operation, against float64 attention on the keys as they were."""

import math

import pytest
import torch

from turboquant_core import KVCacheLayout, Rotation, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops import cache_gather, cache_update, decode_attention

HEADS, HEAD_DIM, GROUP, NUM_TOKENS = 2, 64, 2, 40
# Codes of 8 bits err by 0.7 % of a key's length.
LAYOUT = KVCacheLayout(TurboQuantConfig(HEAD_DIM, 8, 8), HEADS, 16)
TABLE = [[3, 0, 2]]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=["triton", "reference"])
def path(request):
    return request.param


class Inputs:
    """Keys with a large mean, a transform of them, and one query token."""

    def __init__(self, device, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(device)

        mean = 3 * normal(HEADS, HEAD_DIM)
        scale, order = (normal(HEADS, HEAD_DIM) / 2).exp(), normal(HEADS, HEAD_DIM).argsort(-1)
        self.transform = KeyTransform(mean, scale, order)
        self.keys = (normal(NUM_TOKENS, HEADS, HEAD_DIM) + mean).to(dtype)
        self.values = normal(NUM_TOKENS, HEADS, HEAD_DIM).to(dtype)
        self.query = normal(1, HEADS * GROUP, HEAD_DIM).to(dtype)
        self.table = torch.tensor(TABLE, dtype=torch.int32, device=device)
        self.lens = torch.tensor([NUM_TOKENS], dtype=torch.int32, device=device)
        token = torch.arange(NUM_TOKENS, device=device)
        self.slots = self.table[0].long()[token // 16] * 16 + token % 16

    def store(self, path, transform):
        pages = LAYOUT.allocate(4, self.keys.device)
        cache_update(self.keys, self.values, pages, self.slots, LAYOUT, key_transform=transform, path=path)
        return pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_what_the_transform_makes_of_keys(device, path, dtype):
    inputs = Inputs(device, dtype)
    pages = inputs.store(path, inputs.transform)
    made = inputs.transform.of_keys(inputs.keys)
    expected = LAYOUT.allocate(4, device)
    cache_update(made, inputs.values.float(), expected, inputs.slots, LAYOUT, path=path)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_keys_as_they_were(device, path, dtype, softcap):
    inputs = Inputs(device, dtype)
    pages = inputs.store("reference", inputs.transform)
    query, keys, values = (x.double() for x in (inputs.query[0], inputs.keys, inputs.values))
    logits = torch.einsum("hgd,thd->hgt", query.view(HEADS, GROUP, -1), keys).flatten(0, 1) / math.sqrt(HEAD_DIM)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    sinks = torch.arange(HEADS * GROUP, dtype=torch.float32, device=device)
    logits = torch.cat([logits, sinks.double()[:, None]], dim=1)
    weights = logits.softmax(-1)[:, :-1].view(HEADS, GROUP, -1)
    expected = torch.einsum("hgt,thd->hgd", weights, values).flatten(0, 1)
    out, lse = decode_attention(
        inputs.query, pages, inputs.table, inputs.lens, LAYOUT,
        softcap=softcap, sinks=sinks, key_transform=inputs.transform, return_lse=True,
        path="portable" if path == "triton" else path,
    )  # fmt: skip
    assert out.dtype == dtype
    assert (out[0].double() - expected).norm() < 0.03 * expected.norm()
    torch.testing.assert_close(lse[0].double(), logits.logsumexp(-1), rtol=0, atol=0.03)


def test_gathered_keys_are_keys_as_they_were_rotated(device, path):
    inputs = Inputs(device)
    pages, arguments = inputs.store("reference", inputs.transform), (inputs.table, inputs.lens, LAYOUT)
    options = {"dtype": torch.float32, "max_tokens": NUM_TOKENS, "path": path}
    keys, values, _ = cache_gather(pages, *arguments, key_transform=inputs.transform, **options)
    expected = Rotation(HEAD_DIM).rotate(inputs.keys)
    assert (keys - expected).norm() < 0.02 * expected.norm()
    less_mean, _, _ = cache_gather(pages, *arguments, key_transform=inputs.transform.without_mean(), **options)
    rotated_mean = Rotation(HEAD_DIM).rotate(inputs.transform.mean)
    torch.testing.assert_close(less_mean + rotated_mean, keys, rtol=1e-4, atol=1e-4)
    plain, plain_values, _ = cache_gather(pages, *arguments, **options)
    assert torch.equal(values, plain_values)
    assert (plain - expected).norm() > expected.norm() / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gathered_vectors_have_the_type_asked_for(device, path, dtype):
    inputs = Inputs(device)
    pages = inputs.store("reference", inputs.transform)
    options = {"max_tokens": NUM_TOKENS, "key_transform": inputs.transform, "path": path}
    found = cache_gather(pages, inputs.table, inputs.lens, LAYOUT, dtype=dtype, **options)
    exact = cache_gather(pages, inputs.table, inputs.lens, LAYOUT, dtype=torch.float32, **options)
    assert torch.equal(found[0], exact[0].to(dtype))
    # Triton's interpreter rounds bfloat16 towards zero.
    torch.testing.assert_close(found[1], exact[1].to(dtype), rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (KeyTransform(scale=torch.ones(3, 64)), r"key_scale is .*\[3, 64\]; it must be torch.float32 \[2, 64\]"),
        (KeyTransform(order=torch.arange(32).repeat(2, 1)), r"key_channel_order is .*must be torch.int64 \[2, 64\]"),
    ],
)
def test_a_transform_of_other_keys_is_refused(device, path, wrong, message):
    inputs, wrong = Inputs(device), wrong.map(lambda part: part.to(device))
    with pytest.raises(ValueError, match=message):
        inputs.store(path, wrong)
    pages = inputs.store(path, IDENTITY)
    with pytest.raises(ValueError, match=message):
        decode_attention(inputs.query, pages, inputs.table, inputs.lens, LAYOUT, key_transform=wrong)
    with pytest.raises(ValueError, match=message):
        cache_gather(pages, inputs.table, inputs.lens, LAYOUT, max_tokens=1, key_transform=wrong)


@pytest.mark.parametrize("given", [None, torch.zeros(2, HEAD_DIM)])
def test_what_is_no_transform_is_refused(device, path, given):
    inputs = Inputs(device)
    pages = inputs.store(path, IDENTITY)
    message = r"key_transform is a (NoneType|Tensor); it must be a KeyTransform\. Leave it out"
    with pytest.raises(TypeError, match=message):
        inputs.store(path, given)
    with pytest.raises(TypeError, match=message):
        decode_attention(inputs.query, pages, inputs.table, inputs.lens, LAYOUT, key_transform=given)
    with pytest.raises(TypeError, match=message):
        cache_gather(pages, inputs.table, inputs.lens, LAYOUT, max_tokens=1, key_transform=given)
