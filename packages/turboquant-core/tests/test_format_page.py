"""The reader in docs/format.md, which uses nothing of the package, on what the package writes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig, grid_codebook
from turboquant_core.ops import cache_update
from turboquant_core.rotation import FORMAT_SEEDS
from turboquant_core.split import quantizer_of

PAGE = Path(__file__).parents[3] / "docs" / "format.md"
GOLDEN = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("golden/*.json")}
HEAD_DIMS = (64, 80, 128, 256)

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="docs are not in the source distribution")


@pytest.fixture(scope="module")
def reader():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace = {}
    exec(compile(code, PAGE, "exec"), namespace)
    return namespace


def stored(case, vector):
    packed = np.frombuffer(bytes.fromhex(case["packed"][vector]), np.uint8)
    return packed, np.array([int(scale, 16) for scale in case["scales"][vector]], "<u2").view("<f2")


def cases(quantizer):
    return [
        pytest.param(golden, case, id=f"{name}-{case['bits']}-{case['scale']}")
        for name, golden in GOLDEN.items()
        for case in golden["cases"]
        if case["quantizer"] == quantizer
    ]


@pytest.mark.parametrize(("golden", "case"), cases("mse"))
def test_it_reads_the_golden_vectors(reader, golden, case):
    head_dim, step = golden["head_dim"], golden["decoded_step"]
    for vector, expected in enumerate(case["decoded"]):
        packed, (scale,) = stored(case, vector)
        assert reader["unpack"](packed, head_dim, case["bits"]).tolist() == case["codes"][vector]
        decoded = reader["read_vector"](packed, scale, head_dim, case["bits"])
        np.testing.assert_allclose(decoded[::step], expected, atol=1e-6)


@pytest.mark.parametrize(("golden", "case"), cases("outlier"))
def test_fractional_widths_are_two_vectors(reader, golden, case):
    order, step = golden["channel_order"], golden["decoded_step"]
    outliers, others = order[: len(order) // 4], order[len(order) // 4 :]
    high, low = {2.5: (4, 2), 3.5: (5, 3)}[case["bits"]]
    for vector, expected in enumerate(case["decoded"]):
        packed, scales = stored(case, vector)
        first = len(outliers) * high // 8
        decoded = np.empty(len(order))
        decoded[outliers] = reader["read_vector"](packed[:first], scales[0], len(outliers), high)
        decoded[others] = reader["read_vector"](packed[first:], scales[1], len(others), low)
        np.testing.assert_allclose(decoded[::step], expected, atol=1e-6)


@pytest.mark.parametrize(("golden", "case"), cases("split"))
def test_it_reads_split_vectors(reader, golden, case):
    head_dim, step = golden["head_dim"], golden["decoded_step"]
    for vector, expected in enumerate(case["decoded"]):
        packed, scales = stored(case, vector)
        assert reader["unpack"](packed, head_dim // 2, 2 * case["bits"]).tolist() == case["codes"][vector]
        decoded = reader["read_split"](packed, scales, head_dim, case["bits"])
        np.testing.assert_allclose(decoded[::step], expected, atol=1e-6)


@pytest.mark.parametrize(("golden", "case"), cases("prod"))
def test_it_reads_vectors_with_a_sketch(reader, golden, case):
    head_dim, step = golden["head_dim"], golden["decoded_step"]
    for vector, expected in enumerate(case["decoded"]):
        packed, scales = stored(case, vector)
        decoded = reader["read_prod"](packed, scales, head_dim, case["bits"])
        np.testing.assert_allclose(decoded[::step], expected, atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_its_centroids_are_the_packages(reader, head_dim, bits):
    expected = grid_codebook(head_dim, bits).centroids_by_code.numpy()
    assert np.array_equal(reader["centroids"](head_dim, bits), expected)


def test_its_seeds_are_the_packages(reader):
    assert dict(zip(range(8, 513, 8), reader["SEEDS"], strict=True)) == FORMAT_SEEDS


@pytest.mark.parametrize(("key_bits", "key_split"), [(6, False), (3, True)], ids=["whole", "split keys"])
def test_it_reads_pages(reader, key_bits, key_split):
    config = TurboQuantConfig(64, key_bits, 4, key_split=key_split)
    layout = KVCacheLayout(config, num_kv_heads=2, block_size=16)
    pages = layout.allocate(num_blocks=3)
    key, value = torch.randn(2, 20, 2, 64, generator=torch.Generator().manual_seed(4)).unbind()
    cache_update(key, value, pages, torch.arange(16, 36), layout)
    token = 19
    page, slot = divmod(16 + token, 16)
    sizes = {"block_size": 16, "d": 64, "key_bits": key_bits, "value_bits": 4, "key_split": key_split}
    read = reader["read_slot"](pages[page].numpy(), 1, slot, **sizes)
    quantizers = (
        quantizer_of(config.key_format, config.key_scale),
        quantizer_of(config.value_format, config.value_scale),
    )
    for vector, quantizer, found in zip((key, value), quantizers, read, strict=True):
        expected = quantizer.dequantize(quantizer.quantize(vector[token, 1]))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_worked_example_is_a_golden_vector():
    (text,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    example, golden = json.loads(text), GOLDEN["d64"]
    (case,) = (case for case in golden["cases"] if (case["quantizer"], case["bits"]) == ("mse", 4))
    assert example["vector starts"] == golden["vectors"][0][:4]
    assert example["codes start"] == case["codes"][0][:4]
    assert (example["packed"], example["scale"]) == (case["packed"][0], case["scales"][0][0])
    assert example["decoded starts"] == pytest.approx(case["decoded"][0][:1], abs=1e-5)
