import pytest
import torch

from turboquant_core import KeyTransform, TurboQuantConfig
from turboquant_hf.storage.codec import LayerCodec
from turboquant_hf.storage.traced import operation

ORDER = torch.arange(64).flip(0).repeat(2, 1)
CODECS = {
    "mean": LayerCodec(TurboQuantConfig(64, 4, 3, "norm", "unbiased"), KeyTransform(torch.ones(2, 64))),
    "scale, order": LayerCodec(TurboQuantConfig(64, 8, 2), KeyTransform(None, torch.ones(2, 64), ORDER)),
    "split": LayerCodec(TurboQuantConfig(64, 3, 4, key_split=True), KeyTransform(None, None, ORDER)),
    "orders": LayerCodec(TurboQuantConfig(64, 3.5, 2.5), KeyTransform(), ORDER, ORDER.flip(1)),
}


@pytest.fixture(scope="module")
def scaled():
    """An operation, and the codecs that were given to what it runs."""
    given = []

    def scale(x, factor, codec):
        given.append(codec)
        return x * factor

    schema = "test_scaled(Tensor x, int factor, CODEC) -> Tensor"
    return operation(schema, scale, lambda x, *_: torch.empty_like(x)), given


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_an_operation_is_given_the_codec_of_its_call(scaled, codec):
    call, given = scaled
    assert torch.equal(call(torch.ones(3), 2, codec), torch.full((3,), 2.0))
    arrived = given.pop()
    assert arrived.config == codec.config
    assert arrived.named().keys() == codec.named().keys()
    for name, tensor in codec.named().items():
        assert torch.equal(arrived.named()[name], tensor)


def test_a_graph_learns_the_shape_alone(scaled):
    call, given = scaled
    with torch._subclasses.FakeTensorMode():
        assert call(torch.ones(3), 2, LayerCodec(TurboQuantConfig(64), KeyTransform())).shape == (3,)
    assert not given


def test_an_operation_without_a_codec():
    call = operation("test_doubled(Tensor x) -> Tensor", lambda x: 2 * x, torch.empty_like)
    assert torch.equal(call(torch.ones(3)), torch.full((3,), 2.0))
