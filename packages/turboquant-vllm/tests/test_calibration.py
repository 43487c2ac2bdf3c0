from pathlib import Path

import pytest
import torch
import transformers
from vllm.config import ModelConfig

from turboquant_core.calibration import KeyMeans, ModelIdentity, write_key_means
from turboquant_vllm.calibration import heads_of_rank, read_for_model


def identity(folder):
    return ModelIdentity.of(transformers.AutoConfig.from_pretrained(folder).get_text_config(), "theirs")


def model_config(folder):
    return ModelConfig(str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=256)


@pytest.fixture
def means_of(tmp_path):
    """Writes a file of means for a model."""

    def write(folder):
        # Unlike one another, and so large that a head with the mean of another one is hardly stored at all.
        random = torch.Generator().manual_seed(0)
        means = {layer: 5 * torch.randn(2, 64, generator=random) for layer in range(4)}
        path = tmp_path / "means.safetensors"
        write_key_means(path, KeyMeans(means, identity(folder), str(folder), num_tokens=100))
        return str(path)

    return write


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3Text", "GptOss", "Qwen3Next"])
def test_vllm_and_transformers_agree_on_what_a_model_is(tiny_model, means_of, architecture):
    folder = tiny_model(architecture)
    assert read_for_model(means_of(folder), model_config(folder)).num_tokens == 100


def test_the_language_model_counts_where_there_are_images(tiny_vision_model, means_of):
    assert read_for_model(means_of(tiny_vision_model), model_config(tiny_vision_model)).model.model_type == "llama"


def test_the_file_of_another_model_is_refused(tiny_model, means_of):
    with pytest.raises(ValueError, match=r"this model is another.*model_type llama and gpt_oss.*turboquant calibrate"):
        read_for_model(means_of(tiny_model("Llama")), model_config(tiny_model("GptOss")))


def test_a_missing_a_truncated_and_a_foreign_file_are_refused(tiny_model, means_of, tmp_path):
    folder = tiny_model("Llama")
    config = model_config(folder)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*turboquant calibrate MODEL"):
        read_for_model(str(tmp_path / "none"), config)
    whole = means_of(folder)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(whole).read_bytes()[:-9])
    with pytest.raises(ValueError, match="is truncated"):
        read_for_model(str(cut), config)
    with pytest.raises(ValueError, match="holds no key means that can be used: its format is"):
        read_for_model(str(folder / "model.safetensors"), config)


@pytest.mark.parametrize(
    ("num_kv_heads", "world_size", "heads"),
    [(4, 1, [[0, 1, 2, 3]]), (2, 2, [[0, 1], [2, 3]]), (1, 4, [[0], [1], [2], [3]])],
)
def test_every_rank_gets_the_means_of_its_heads(num_kv_heads, world_size, heads):
    mean = torch.arange(4.0)[:, None].expand(4, 64)
    found = [heads_of_rank(mean, num_kv_heads, rank, world_size)[:, 0].tolist() for rank in range(world_size)]
    assert found == heads


def test_ranks_that_share_a_head_share_its_mean():
    mean = torch.arange(2.0)[:, None].expand(2, 64)
    assert [heads_of_rank(mean, 1, rank, 4)[:, 0].tolist() for rank in range(4)] == [[0], [0], [1], [1]]


TOKENS = [{"prompt_token_ids": list(range(start, 400, 3))} for start in (3, 5)]


@pytest.fixture
def calibrated(generate, tiny_model, means_of):
    """Runs the small Llama with a calibration file."""
    folder = tiny_model("Llama")
    path = means_of(folder)

    def run(turboquant, **options):
        settings = {"turboquant": {**turboquant, "calibration": path}}
        return generate(
            TOKENS, model=folder, skip_tokenizer_init=True, max_tokens=30, attention_backend="CUSTOM",
            additional_config=settings, **options,
        )  # fmt: skip

    return run


def test_two_ranks_have_the_means_of_their_own_heads(calibrated, assert_same_but_for_ties):
    found = calibrated({}, tensor_parallel_size=2, env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    assert_same_but_for_ties(found, calibrated({}))


def test_a_connector_hands_pages_to_another_engine(calibrated, tmp_path, assert_same_but_for_ties):
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "pages")},
    }
    options = {"kv_transfer_config": connector, "block_size": 16}
    eight_bits = {"key_bits": 8, "value_bits": 8}
    first = calibrated(eight_bits, **options)
    # Other arguments, or the answer of the first engine would be taken for that of the second.
    second = calibrated(eight_bits, **options, max_num_seqs=4)
    assert [first["cached"], second["cached"]] == [[[0, 0]], [[128, 128]]]
    assert_same_but_for_ties(second, first)
