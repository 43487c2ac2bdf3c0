import json
from pathlib import Path

import numpy as np
import pytest
import torch

from turboquant_core import (
    MSEQuantizer,
    OutlierQuantizer,
    ProdQuantizer,
    QuantizedTensor,
    VectorFormat,
    unpack,
)
from turboquant_core.split import SplitQuantizer

GOLDEN = [json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("golden/*.json"))]
CASES = [
    pytest.param(
        golden,
        case,
        id=f"{case['quantizer']}-{golden['head_dim']}-{case['bits']}-{case['scale']}",
    )
    for golden in GOLDEN
    for case in golden["cases"]
]


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def quantizer_of(golden, case, device):
    head_dim, bits, scale = golden["head_dim"], case["bits"], case["scale"]
    match case["quantizer"]:
        case "mse":
            return MSEQuantizer(head_dim, bits, scale)
        case "prod":
            return ProdQuantizer(head_dim, bits)
        case "split":
            return SplitQuantizer(head_dim, bits, scale)
        case "outlier":
            order = torch.tensor(golden["channel_order"], device=device)
            return OutlierQuantizer(bits, order, scale)


def stored(case):
    codes = np.array([list(bytes.fromhex(packed)) for packed in case["packed"]], dtype=np.uint8)
    scales = np.array([[int(scale, 16) for scale in row] for row in case["scales"]], np.uint16)
    return QuantizedTensor(torch.from_numpy(codes), torch.from_numpy(scales.view(np.float16)))


def test_the_golden_vectors_cover_the_format():
    covered = {(golden["head_dim"], case["quantizer"], case["bits"]) for golden in GOLDEN for case in golden["cases"]}
    for head_dim in (64, 80, 128, 256):
        assert {(head_dim, "mse", bits) for bits in (1, 2, 3, 4, 5, 6, 8)} <= covered
    for head_dim in (64, 128):
        assert {(head_dim, "prod", bits) for bits in (1, 2, 4)} <= covered
        assert {(head_dim, "outlier", bits) for bits in (2.5, 3.5)} <= covered
        assert {(head_dim, "split", bits) for bits in (2, 3, 4)} <= covered


@pytest.mark.parametrize(("golden", "case"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_encoding_gives_the_golden_bytes(golden, case, dtype, device):
    x = torch.tensor(golden["vectors"], dtype=torch.float64)
    assert torch.equal(x.to(dtype).double(), x)
    q = quantizer_of(golden, case, device).quantize(x.to(device, dtype))
    expected = stored(case)
    assert torch.equal(q.codes.cpu(), expected.codes)
    assert torch.equal(q.scales.cpu(), expected.scales)


@pytest.mark.parametrize(("golden", "case"), CASES)
def test_the_golden_bytes_hold_the_golden_codes(golden, case):
    codes, packed = torch.tensor(case["codes"]), stored(case).codes
    if case["quantizer"] == "prod":
        if case["bits"] == 1:
            assert codes.numel() == 0
            return
        groups = VectorFormat(golden["head_dim"], case["bits"] - 1).groups
    elif case["quantizer"] == "split":
        groups = VectorFormat(golden["head_dim"] // 2, 2 * case["bits"]).groups
    else:
        groups = VectorFormat(golden["head_dim"], case["bits"]).groups
    for group in groups:
        part, packed = packed[:, : group.code_bytes], packed[:, group.code_bytes :]
        expected, codes = codes[:, : group.num_channels], codes[:, group.num_channels :]
        assert torch.equal(unpack(part, group.bits, group.num_channels), expected.to(torch.uint8))


@pytest.mark.parametrize(("golden", "case"), CASES)
def test_decoding_the_golden_bytes_gives_the_golden_values(golden, case, device):
    q = stored(case).map(lambda t: t.to(device))
    decoded = quantizer_of(golden, case, device).dequantize(q).cpu()
    expected = torch.tensor(case["decoded"])
    torch.testing.assert_close(decoded[:, :: golden["decoded_step"]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("golden", "case"), CASES)
def test_golden_values_are_near_the_golden_vectors(golden, case):
    x = torch.tensor(golden["vectors"])
    # A rotation back spreads the error of a vector evenly over its channels, whatever each of them holds.
    error = (torch.tensor(case["decoded"]) - x[:, :: golden["decoded_step"]]).square().mean() / x.square().mean()
    bits = case["bits"] - (case["quantizer"] == "prod")
    assert error < 6 * 4.0**-bits
