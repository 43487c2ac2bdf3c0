import pytest
import torch

from turboquant_core import KVCacheLayout, MSEQuantizer, TurboQuantConfig
from turboquant_core.ops import cache_update, decode_attention
from turboquant_core.testing import gaussian


def test_tables_that_an_export_asked_for_first_serve_everywhere():
    # No other test has tables of this head_dim.
    quantizer, x = MSEQuantizer(88, 3), gaussian(4, 88, seed=1)

    class Codec(torch.nn.Module):
        def forward(self, x):
            return quantizer.dequantize(quantizer.quantize(x))

    exported = torch.export.export(Codec(), (x,), strict=False)
    found = quantizer.dequantize(quantizer.quantize(x))
    assert type(found) is torch.Tensor
    assert torch.equal(exported.module()(x), found)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_default_device_changes_nothing():
    layout = KVCacheLayout(TurboQuantConfig(88, 3, 5), 2, 16)
    pages, slots = layout.allocate(2), torch.arange(20)
    vectors, query = gaussian(40, 88, seed=2).view(20, 2, 88), gaussian(4, 88, seed=3).view(1, 4, 88)
    table, lengths, out = torch.arange(2).int()[None], torch.tensor([20]).int(), torch.empty(1, 4, 88)
    with torch.device("meta"):
        cache_update(vectors, vectors, pages, slots, layout)
        decode_attention(query, pages, table, lengths, layout, out=out)
    assert torch.equal(decode_attention(query, pages, table, lengths, layout), out)
