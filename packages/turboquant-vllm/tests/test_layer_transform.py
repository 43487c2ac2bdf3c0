import pytest
import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_vllm.layer_transform import LayerTransform


def draw(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


SCALE, ORDER = 1 + draw(2, 64), draw(2, 64).argsort(-1)


@pytest.mark.parametrize(
    "given", [KeyTransform(draw(2, 64)), KeyTransform(scale=SCALE), KeyTransform(draw(2, 64), SCALE, ORDER)]
)
def test_a_transform_outlives_a_reload_at_its_addresses(device, given):
    transform = LayerTransform(device)
    # Weights are loaded before it is settled, too.
    transform.restore()
    transform.settle(given.map(lambda part: part.to(device)))
    settled = transform.settled
    # As after a sleep that dropped the device's memory.
    for part in settled.tensors().values():
        part.zero_()
    transform.restore()
    assert transform.settled is settled
    for part, expected in zip(settled.parts, given.parts, strict=True):
        assert (part is None) == (expected is None)
        if part is not None:
            torch.testing.assert_close(part.cpu(), expected, rtol=0, atol=0)


def test_keys_may_go_through_nothing(device):
    transform = LayerTransform(device)
    transform.settle()
    transform.restore()
    assert transform.settled.parts == IDENTITY.parts


def test_no_key_is_stored_before_it_is_settled_what_it_goes_through(device):
    transform = LayerTransform(device)
    with pytest.raises(RuntimeError, match="before it was settled"):
        transform.settled  # noqa: B018
    transform.settle()
    assert transform.settled
