import pytest
import torch

from turboquant_vllm.centring import GivenKeyMean, KeyMean


def serving():
    return True


def observe(mean, key, slots):
    mean.observe(key, torch.tensor(slots, device=key.device))


def test_the_first_real_keys_set_the_mean_for_good(device):
    key = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    mean = KeyMean(2, 64, device, serving)
    address = mean.mean.data_ptr()
    observe(mean, key, [-1] * 5)
    assert not mean.mean.any()
    observe(mean, key, [7, -1, 3, -1, 0])
    expected = key[[0, 2, 4]].float().mean(dim=0)
    torch.testing.assert_close(mean.mean, expected)
    if device.type == "cuda":
        torch.cuda.synchronize()
    observe(mean, 2 * key, [1, 2, 3, 4, 5])
    torch.testing.assert_close(mean.mean, expected)
    assert mean.mean.data_ptr() == address


def test_keys_that_are_not_finite_do_not_count(device):
    key = torch.ones(4, 1, 64, device=device)
    mean = KeyMean(1, 64, device, serving)
    observe(mean, key * torch.inf, [0, 1, 2, 3])
    assert not mean.mean.any()
    # Padding may hold anything.
    key[3] = torch.nan
    observe(mean, key, [0, 1, 2, -1])
    assert (mean.mean == 1).all()


def test_what_was_taken_outlives_a_reload(device):
    key = torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(0)).to(device)
    mean = KeyMean(1, 64, device, serving)
    mean.restore()
    assert not mean.mean.any()
    observe(mean, key, [0, 1, 2, 3, 4])
    taken = mean.mean.clone()
    assert taken.any()
    # As after a sleep that dropped the device's memory; nothing says when it is read back.
    mean.mean.fill_(torch.nan)
    mean.restore()
    torch.testing.assert_close(mean.mean, taken, rtol=0, atol=0)
    observe(mean, 2 * key, [5, 6, 7, 8, 9])
    torch.testing.assert_close(mean.mean, taken, rtol=0, atol=0)


def test_keys_of_the_warm_up_do_not_count(device):
    over = []
    mean = KeyMean(1, 64, device, lambda: bool(over))
    observe(mean, torch.ones(1, 1, 64, device=device), [0])
    assert not mean.mean.any()
    over.append(True)
    observe(mean, torch.full((1, 1, 64), 3.0, device=device), [0])
    assert (mean.mean == 3).all()


def test_a_given_mean_is_never_overwritten_and_outlives_a_reload(device):
    given = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    mean = GivenKeyMean(2, 64, device)
    address = mean.mean.data_ptr()
    mean.give(given)
    observe(mean, torch.ones(5, 2, 64, device=device), [0, 1, 2, 3, 4])
    torch.testing.assert_close(mean.mean.cpu(), given)
    # As after a sleep that dropped the device's memory.
    mean.mean.fill_(torch.nan)
    mean.restore()
    torch.testing.assert_close(mean.mean.cpu(), given)
    assert mean.mean.data_ptr() == address


def test_keys_are_not_stored_before_their_mean_is_given(device):
    with pytest.raises(RuntimeError, match="before the calibration file"):
        observe(GivenKeyMean(1, 64, device), torch.ones(1, 1, 64, device=device), [0])
