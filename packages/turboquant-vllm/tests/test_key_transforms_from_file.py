from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from vllm.config import ModelConfig

from turboquant_core import TurboQuantConfig
from turboquant_core.calibration import Calibration, read_calibration, write_calibration
from turboquant_core.key_transform import KeyTransform
from turboquant_core.model_identity import ModelIdentity
from turboquant_vllm._compat.engine import AttentionLayerBase
from turboquant_vllm.artifacts import calibration_of
from turboquant_vllm.key_transforms import from_file
from turboquant_vllm.key_transforms.from_file import heads_of_rank
from turboquant_vllm.layer_transform import LayerTransform


def identity(folder):
    return ModelIdentity.of(transformers.AutoConfig.from_pretrained(folder).get_text_config(), "theirs")


def model_config(folder):
    return ModelConfig(str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=256)


def write_means(path, folder):
    # Unlike one another, and so large that a head with the mean of another one is hardly stored at all.
    random = torch.Generator().manual_seed(0)
    layers = {}
    for layer in range(4):
        mean, scale, order = torch.randn(3, 2, 64, generator=random)
        layers[layer] = KeyTransform(5 * mean, (scale / 2).exp(), order.argsort(-1))
    write_calibration(path, Calibration(layers, identity(folder), str(folder), num_tokens=100))
    return str(path)


@pytest.fixture
def means_of(tmp_path):
    """Writes a file of means for a model."""
    return partial(write_means, tmp_path / "means.safetensors")


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3Text", "GptOss", "Qwen3Next"])
def test_vllm_and_transformers_agree_on_what_a_model_is(tiny_model, means_of, architecture):
    folder = tiny_model(architecture)
    assert calibration_of(model_config(folder), means_of(folder)).num_tokens == 100


def test_the_language_model_counts_where_there_are_images(tiny_vision_model, means_of):
    assert calibration_of(model_config(tiny_vision_model), means_of(tiny_vision_model)).model.model_type == "llama"


def test_the_file_of_another_model_is_refused(tiny_model, means_of):
    with pytest.raises(ValueError, match=r"this model is another.*model_type llama and gpt_oss.*turboquant calibrate"):
        calibration_of(model_config(tiny_model("GptOss")), means_of(tiny_model("Llama")))


def test_a_file_that_was_written_again_is_refused(tiny_model, means_of):
    folder = tiny_model("Llama")
    config, path = model_config(folder), means_of(folder)
    first = calibration_of(config, path)
    assert calibration_of(config, path) is first
    other = Calibration({0: KeyTransform(torch.ones(2, 64))}, identity(folder), str(folder), num_tokens=7)
    write_calibration(Path(path), other)
    with pytest.raises(ValueError, match=r"was written again since this process read it.*Start a new process, or give"):
        calibration_of(config, path)


def test_a_missing_a_truncated_and_a_foreign_file_are_refused(tiny_model, means_of, tmp_path):
    folder = tiny_model("Llama")
    config = model_config(folder)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*turboquant calibrate MODEL"):
        calibration_of(config, str(tmp_path / "none"))
    whole = means_of(folder)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(whole).read_bytes()[:-9])
    with pytest.raises(ValueError, match="is truncated"):
        calibration_of(config, str(cut))
    with pytest.raises(ValueError, match="holds no calibration that can be used: its format is"):
        calibration_of(config, str(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("num_kv_heads", "world_size", "heads"),
    [(4, 1, [[0, 1, 2, 3]]), (2, 2, [[0, 1], [2, 3]]), (1, 4, [[0], [1], [2], [3]])],
)
def test_every_rank_gets_the_means_of_its_heads(num_kv_heads, world_size, heads):
    found = [list(range(4))[heads_of_rank(4, num_kv_heads, rank, world_size)] for rank in range(world_size)]
    assert found == heads


def test_ranks_that_share_a_head_share_its_mean():
    assert [list(range(2))[heads_of_rank(2, 1, rank, 4)] for rank in range(4)] == [[0], [0], [1], [1]]


class Layer(AttentionLayerBase):
    """A layer of one KV head as the builder finds it."""

    def __init__(self, split):
        transform = LayerTransform(torch.device("cpu"))
        config = TurboQuantConfig(64, key_split=split)
        self.impl = SimpleNamespace(num_kv_heads=1, head_size=64, key_transform=transform, config=config)

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        raise NotImplementedError


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_of_two_ranks_gives_its_layers_their_means(monkeypatch, tiny_model, tmp_path, rank, split):
    monkeypatch.setattr(from_file, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(from_file, "get_tensor_model_parallel_world_size", lambda: 2)
    folder = tiny_model("Llama")
    path = write_means(tmp_path / "means.safetensors", folder)
    layers = {f"model.layers.{index}.self_attn.attn": Layer(split) for index in (2, 3)}
    config = SimpleNamespace(
        model_config=model_config(folder), compilation_config=SimpleNamespace(static_forward_context=layers)
    )
    from_file.give_transforms(path, layers, config, codes_only=False)
    for index, layer in zip((2, 3), layers.values(), strict=True):
        expected = read_calibration(path).layers[index].shard(slice(rank, rank + 1))
        for part, of_file in zip(layer.impl.key_transform.settled.parts, expected.parts, strict=True):
            if part is None:
                assert not split, "the order is of use where keys are split"
            else:
                assert torch.equal(part, of_file)


EIGHT_BITS = {"key_bits": 8, "value_bits": 8}
TOKENS = [{"prompt_token_ids": list(range(start, 400, 3))} for start in (3, 5)]


@pytest.fixture(scope="module")
def calibrated(generate, tiny_model, tmp_path_factory):
    """Runs the small Llama with a calibration file."""
    folder = tiny_model("Llama")
    path = write_means(tmp_path_factory.mktemp("means") / "means.safetensors", folder)

    def run(turboquant, **options):
        settings = {"turboquant": {**turboquant, "calibration": path}}
        return generate(
            TOKENS, model=folder, skip_tokenizer_init=True, max_tokens=30, attention_backend="CUSTOM",
            additional_config=settings, **options,
        )  # fmt: skip

    return run


def test_ranks_have_the_means_of_their_own_heads_and_layers(calibrated, two_ranks, assert_near):
    expected = calibrated(EIGHT_BITS)
    assert_near(calibrated(EIGHT_BITS, **two_ranks, forced=expected["tokens"][0]), expected)


def test_a_connector_hands_pages_to_another_engine(calibrated, tmp_path, assert_near):
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "pages")},
    }
    options = {"kv_transfer_config": connector, "block_size": 16}
    first = calibrated(EIGHT_BITS, **options)
    second = calibrated(EIGHT_BITS, **options, forced=first["tokens"][0])
    assert [first["cached"], second["cached"]] == [[[0, 0]], [[128, 128]]]
    assert_near(second, first)
