import pytest
import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_vllm.centring import KeyMean


def test_a_mean_outlives_a_reload_at_its_address(device):
    given = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    mean = KeyMean(2, 64, device)
    address = mean.transform.mean.data_ptr()
    mean.restore()
    assert not mean.transform.mean.any()
    mean.settle(KeyTransform(given.to(device)))
    torch.testing.assert_close(mean.transform.mean.cpu(), given, rtol=0, atol=0)
    # As after a sleep that dropped the device's memory.
    mean.transform.mean.fill_(torch.nan)
    mean.restore()
    torch.testing.assert_close(mean.transform.mean.cpu(), given, rtol=0, atol=0)
    assert mean.transform.mean.data_ptr() == address


def test_a_matrix_outlives_a_reload_at_its_address(device):
    matrix = torch.eye(64).repeat(2, 1, 1) + torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0)) / 64
    mean = KeyMean(2, 64, device)
    mean.settle(KeyTransform(matrix=matrix))
    settled = mean.transform
    for part in settled.parts:
        part.fill_(torch.nan)
    mean.restore()
    assert mean.transform is settled
    assert not settled.mean.any()
    torch.testing.assert_close(settled.matrix.cpu(), matrix, rtol=0, atol=0)
    torch.testing.assert_close((settled.inverse @ settled.matrix).cpu(), torch.eye(64).repeat(2, 1, 1))


def test_no_mean_is_zero(device):
    mean = KeyMean(1, 64, device)
    mean.settle()
    mean.transform.mean.fill_(torch.nan)
    mean.restore()
    assert not mean.transform.mean.any()


def test_no_key_is_stored_before_its_mean_is_settled(device):
    mean = KeyMean(1, 64, device)
    with pytest.raises(RuntimeError, match="before it was settled"):
        mean.check_settled()
    mean.settle()
    mean.check_settled()
