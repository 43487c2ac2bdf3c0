"""Damaged files of models: doctor reads what they say, or refuses them; it never fails otherwise."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from turboquant_core.testing.damage import damaged_bytes, damaged_json, header_of, with_header
from turboquant_hf.tools.doctor.checkpoint import INDEX_FILE, open_checkpoint
from turboquant_hf.tools.gguf_header import check_gguf

randoms = st.randoms(use_true_random=False)


def opened_or_refused(path):
    """The checkpoint at a path; None where it is refused."""
    try:
        return open_checkpoint(str(path))
    except (OSError, ValueError) as error:
        assert 0 < len(str(error)) < 1500  # noqa: PT017
        return None


@pytest.fixture(scope="module")
def folder(tiny_model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copy(tiny_model_folder / "config.json", folder)
    save_file({f"layers.{layer}.k_proj.bias": torch.ones(128) for layer in range(2)}, folder / "model.safetensors")
    return folder


@given(randoms)
@settings(max_examples=50, deadline=None)
def test_a_configuration(folder, tiny_model_folder, random):
    content = (tiny_model_folder / "config.json").read_bytes()
    damaged = damaged_bytes(content, random)
    if random.random() < 0.7:
        damaged = damaged_json(json.loads(content), random).encode("utf-8", "surrogatepass")
    (folder / "config.json").write_bytes(damaged)
    opened_or_refused(folder)
    (folder / "config.json").write_bytes(content)


@given(randoms)
@settings(max_examples=100, deadline=None)
def test_the_header_of_safetensors(folder, random):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = damaged_bytes(content, random)
    if random.random() < 0.5:
        damaged = with_header(content, damaged_json(header_of(content), random))
    path.write_bytes(damaged)
    checkpoint = opened_or_refused(folder)
    if checkpoint is not None:
        # No tensor reaches beyond the file.
        assert checkpoint.weights_nbytes <= len(damaged)
        for tensor in checkpoint.tensors.values():
            try:
                tensor.load()
            except ValueError as error:
                assert "must be one of" in str(error)  # noqa: PT017
    path.write_bytes(content)


@given(randoms)
@settings(max_examples=100, deadline=None)
def test_an_index(folder, random):
    index = {"metadata": {"total_size": 4096}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    damaged = damaged_json(index, random).encode("utf-8", "surrogatepass")
    (folder / INDEX_FILE).write_bytes(damaged if random.random() < 0.7 else damaged_bytes(damaged, random))
    opened_or_refused(folder)
    (folder / INDEX_FILE).unlink()


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/../../b", "..", "", "a\\b"])
def test_an_index_does_not_lead_out_of_its_folder(folder, name):
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"index\.json of .* is damaged: it names .* for a file"):
        open_checkpoint(str(folder))
    (folder / INDEX_FILE).unlink()


@given(randoms, st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_gguf_file(gguf_content, tmp_path_factory, random, in_header):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    if in_header:
        # All that has counts and sizes.
        at, value = random.randrange(len(gguf_content)), random.choice([0, 1, 255, 2**31, 2**63, 2**64 - 1])
        length = random.choice([1, 4, 8])
        damaged = gguf_content[:at] + value.to_bytes(8, "little")[:length] + gguf_content[at + length :]
    else:
        damaged = damaged_bytes(gguf_content, random)
    path.write_bytes(damaged)
    opened_or_refused(path)


@pytest.mark.parametrize("count", [2**20, 2**40, 2**63])
def test_a_gguf_file_whose_counts_lie(gguf_content, tmp_path, count):
    path = tmp_path / "lying.gguf"
    for at in (8, 16):
        path.write_bytes(gguf_content[:at] + count.to_bytes(8, "little") + gguf_content[at + 8 :])
        with pytest.raises(OSError, match=r"lying\.gguf is cut off, damaged or no GGUF file .* Download it again"):
            check_gguf(path)


def test_arrays_of_arrays_of_a_gguf_file_end(gguf_content, tmp_path):
    nested = (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little")
    nested += ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 5000
    path = tmp_path / "deep.gguf"
    path.write_bytes(gguf_content[:16] + (1).to_bytes(8, "little") + nested)
    with pytest.raises(OSError, match="inside 2 arrays"):
        check_gguf(path)


@pytest.fixture(scope="module")
def gguf_content(tmp_path_factory):
    """A GGUF file with fields of every kind."""
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(256)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["one", "two"])
    writer.add_tensor("blk.0.attn_k.bias", torch.full((128,), 90.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
