import pytest
import torch

from turboquant_vllm.centring import KeyMean


def test_a_mean_outlives_a_reload_at_its_address(device):
    given = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    mean = KeyMean(2, 64, device)
    address = mean.mean.data_ptr()
    mean.restore()
    assert not mean.mean.any()
    mean.settle(given.to(device))
    torch.testing.assert_close(mean.mean.cpu(), given, rtol=0, atol=0)
    # As after a sleep that dropped the device's memory.
    mean.mean.fill_(torch.nan)
    mean.restore()
    torch.testing.assert_close(mean.mean.cpu(), given, rtol=0, atol=0)
    assert mean.mean.data_ptr() == address


def test_no_mean_is_zero(device):
    mean = KeyMean(1, 64, device)
    mean.settle(None)
    mean.mean.fill_(torch.nan)
    mean.restore()
    assert not mean.mean.any()


def test_no_key_is_stored_before_its_mean_is_settled(device):
    mean = KeyMean(1, 64, device)
    with pytest.raises(RuntimeError, match="before it was settled"):
        mean.check_settled()
    mean.settle(None)
    mean.check_settled()
