import pytest
import torch

from turboquant_core.layer_bits import LayerBits, write_layer_bits
from turboquant_core.model_identity import ModelIdentity
from turboquant_hf import TurboQuantCache


@pytest.fixture
def tuned_file(tiny_config, tmp_path):
    """Writes the bits of a model's layers to a file."""

    def write(bits, **changes):
        identity = ModelIdentity.of(tiny_config(**changes), "LlamaForCausalLM")
        write_layer_bits(tmp_path / "turboquant.json", LayerBits(bits, identity, "a/model"))
        return tmp_path / "turboquant.json"

    return write


def test_bits_of_a_file(tiny_config, tuned_file):
    cache = TurboQuantCache(tiny_config(), layer_bits=tuned_file({0: (8, 3), 1: (2, 6)}))
    states = torch.randn(1, 2, 3, 64)
    for index, bits in enumerate([(8, 3), (2, 6)]):
        cache.update(states, states, index)
        config = cache.layers[index].config
        assert (config.key_bits, config.value_bits) == bits


def test_a_file_of_bits_serves_its_model_and_all_of_its_layers(tiny_config, tuned_file, tmp_path):
    path = tuned_file({0: (8, 3)})
    with pytest.raises(ValueError, match=r"a/model have none for layer 1\. .*turboquant tune"):
        TurboQuantCache(tiny_config(), layer_bits=path)
    TurboQuantCache(tiny_config(), layer_bits=str(path), skip_layers=[-1])
    with pytest.raises(ValueError, match="hidden_size 64 and 128"):
        TurboQuantCache(tiny_config(hidden_size=128), layer_bits=path)
    with pytest.raises(FileNotFoundError, match="turboquant tune"):
        TurboQuantCache(tiny_config(), layer_bits=tmp_path / "missing.json")
