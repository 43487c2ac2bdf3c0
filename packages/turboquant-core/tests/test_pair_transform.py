import numpy as np
import pytest
import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_core.pair_transform import RIDGE, pair_transform, unusable_heads

HEADS, HEAD_DIM = 3, 16
PAIRS = {
    "halves": torch.arange(8).repeat(2),
    "neighbours": torch.arange(8).repeat_interleave(2),
    # The first eight channels are rotated.
    "partial": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, *range(4, 12)]),
    "few singles": torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
    "none": torch.arange(HEAD_DIM),
}


def energies(seed):
    return torch.randn(HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).double().mul(2).exp()


def rotated(x, position, pairs):
    """By a rotary embedding that turns each pair, all by other angles, and leaves single channels alone."""
    turned = x.double().clone()
    for number in pairs.unique().tolist():
        channels = (pairs == number).nonzero().flatten().tolist()
        if len(channels) == 2:
            (a, b), angle = channels, torch.tensor(position * 100.0 ** (-number / 8), dtype=torch.float64)
            turned[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
            turned[..., b] = x[..., a] * angle.sin() + x[..., b] * angle.cos()
    return turned


@pytest.mark.parametrize("kind", PAIRS)
def test_scale_and_order_are_those_of_the_formulas(kind):
    pairs, keys, queries = PAIRS[kind], energies(1), energies(2)
    transform = pair_transform(None, keys, queries, pairs)
    for head in range(HEADS):
        scale, cost = np.zeros(HEAD_DIM), np.zeros(HEAD_DIM)
        for channel in range(HEAD_DIM):
            alike = (pairs == pairs[channel]).numpy()
            k, q = (x[head].numpy()[alike].mean() for x in (keys, queries))
            k, q = ((1 - RIDGE) * of_pair + RIDGE * x[head].numpy().mean() for of_pair, x in ((k, keys), (q, queries)))
            scale[channel], cost[channel] = (q / k) ** 0.25, k * q
        scale /= np.exp(np.log(scale).mean())
        np.testing.assert_allclose(transform.scale[head].numpy(), scale, rtol=1e-6)
        order = transform.order[head].numpy()
        half, others = cost[order[: HEAD_DIM // 2]], cost[order[HEAD_DIM // 2 :]]
        assert (np.diff(half) <= 1e-9 * half[:-1]).all()
        if kind not in ("partial", "few singles"):
            assert half.min() >= others.max()
    assert transform.mean is None


@pytest.mark.parametrize("kind", PAIRS)
def test_a_half_holds_whole_pairs(kind):
    """For whatever a head's pairs cost, also where a half has room for one channel and a pair is next."""
    pairs = PAIRS[kind]
    for seed in range(20):
        order = pair_transform(None, energies(seed), energies(seed + 100), pairs).order
        for head in order:
            first, second = (set(pairs[channels].tolist()) for channels in head.chunk(2))
            assert not first & second


@pytest.mark.parametrize("position", [1, 700, 100_000])
@pytest.mark.parametrize("kind", PAIRS)
def test_it_does_the_same_before_and_after_the_rotary_embedding(kind, position):
    """What a scale of channels that are no pairs does not."""
    pairs = PAIRS[kind]
    keys = torch.randn(5, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3)).double()
    scale = pair_transform(None, energies(1), energies(2), pairs).scale.double()
    expected = rotated(keys, position, pairs) * scale
    torch.testing.assert_close(rotated(keys * scale, position, pairs), expected, rtol=1e-12, atol=1e-12)
    if kind != "none":
        apart = pair_transform(None, energies(1), energies(2), PAIRS["none"]).scale.double()
        assert not torch.allclose(rotated(keys * apart, position, pairs), rotated(keys, position, pairs) * apart)


def test_scores_err_less_with_it():
    """Where keys and queries differ in their channels, at the same error of what is stored."""
    generator = torch.Generator().manual_seed(4)
    deviations = energies(1).sqrt(), energies(2).sqrt()
    keys, queries = (torch.randn(400, HEADS, HEAD_DIM, generator=generator).double() * x for x in deviations)
    pairs = PAIRS["halves"]
    transform = pair_transform(None, keys.square().mean(0), queries.square().mean(0), pairs)
    noise = torch.randn(400, HEADS, HEAD_DIM, generator=generator).double()

    def errors(transform):
        stored = transform.of_keys(keys)
        stored = stored + 0.1 * stored.norm(dim=-1, keepdim=True) * noise / HEAD_DIM**0.5
        error = transform.restored(stored) - keys
        return torch.einsum("qhd,khd->hqk", queries, error).square().mean((1, 2))

    assert (errors(KeyTransform(scale=transform.scale)) < 0.8 * errors(KeyTransform())).all()


def test_heads_that_say_nothing_stay_as_they_are():
    keys, queries = energies(1), energies(2)
    keys[0, 3], queries[1] = torch.inf, 0
    assert unusable_heads(keys, queries) == {0: "its keys or queries are not finite", 1: "no query reads it"}
    transform = pair_transform(torch.ones(HEADS, HEAD_DIM), keys, queries, PAIRS["halves"])
    for head in (0, 1):
        assert torch.equal(transform.scale[head], torch.ones(HEAD_DIM))
        assert torch.equal(transform.order[head], torch.arange(HEAD_DIM).view(2, 8).T.flatten())
    alone = pair_transform(None, keys[2:], queries[2:], PAIRS["halves"])
    assert torch.equal(transform.scale[2], alone.scale[0])
    assert torch.equal(transform.mean, torch.ones(HEADS, HEAD_DIM))
    keys[2] = 0
    assert unusable_heads(keys, queries)[2] == "its keys are all alike"


def test_a_channel_without_energy_has_a_scale_that_is_taken():
    keys, queries = energies(1), energies(2)
    keys[:, 0] = keys[:, 8] = queries[:, 1] = queries[:, 9] = 0
    scale = pair_transform(None, keys, queries, PAIRS["halves"]).scale
    assert scale.isfinite().all()
