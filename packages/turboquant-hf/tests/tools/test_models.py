import json
import shutil
import socket
import sys
import time
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from huggingface_hub import constants

from turboquant_hf.tools import models
from turboquant_hf.tools.models import MAX_LAYERS, find_model, load_model

EVIL = "open('PWNED', 'w').write('x')\nclass Evil: pass\n"


def changed(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folder(tiny_model_folder, tmp_path, monkeypatch):
    """A copy of the small model, with a module that must not run, and a user who says yes to everything."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", StringIO("yes\n" * 100))
    yield tmp_path / "model"
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        ),
    ],
)
def test_a_model_that_brings_code_is_refused_and_nobody_is_asked(folder, file, fields, capsys):
    changed(folder / file, **fields)
    with pytest.raises(ValueError, match=r"brings code of its own for its .*, which is never run here\. Use a model"):
        load_model(str(folder), "cpu")
    assert "yes" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", " ", "model\0"])
def test_what_is_no_name_is_no_model(name):
    with pytest.raises(OSError, match="is the name of no model"):
        find_model(name)


def test_code_that_is_not_needed_is_not_run(folder):
    changed(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    assert load_model(str(folder), "cpu").model.config.model_type == "llama"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[[", b'{"a": 5}', b"\xff\xff"])
def test_a_file_that_is_damaged(folder, file, content):
    (folder / file).write_bytes(content)
    # What is JSON may be of nothing but defaults.
    with suppress(OSError, ValueError) if content.startswith(b"{") else pytest.raises((OSError, ValueError)):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("count", [MAX_LAYERS + 1, 10**15])
def test_layers_are_counted_before_they_are_listed(folder, count):
    changed(folder / "config.json", num_hidden_layers=count)
    with pytest.raises(ValueError, match=rf"config\.json .* num_hidden_layers is {count:,}; models of up to 10,000"):
        find_model(str(folder))


def test_what_is_no_model(tmp_path):
    (tmp_path / "file").write_text("")
    for name, said in [
        (tmp_path / "file", "is a file; name the folder"),
        (tmp_path, "has no config.json"),
        (tmp_path / "missing.gguf", "there is no file"),
        ("no/such/folder", "no hub id"),
    ]:
        with pytest.raises(OSError, match=said):
            find_model(str(name))


@pytest.fixture
def online(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "HUB_TIMEOUT_S", 0.5)


def slowly(*_, **__):
    time.sleep(4)
    raise socket.gaierror("no such host")


@pytest.mark.parametrize("look_up", [slowly, lambda *_, **__: socket.create_connection(("127.0.0.1", 1))])
def test_a_hub_that_does_not_answer_is_asked_once(online, monkeypatch, look_up):
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"no folder someone/a-model, https?://.* does not answer, and the model is not"):
        find_model("someone/a-model")
    assert time.monotonic() - begun < 3


def test_without_a_hub_the_cache_is_read(online, monkeypatch, tiny_model_folder):
    monkeypatch.setattr(models, "hub_answers", lambda _: False)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: str(tiny_model_folder / "config.json"))
    loaded = {}
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", lambda _, **arguments: loaded.update(arguments))
    assert find_model("someone/a-model").is_offline
    assert loaded == {"local_files_only": True, "trust_remote_code": False}
