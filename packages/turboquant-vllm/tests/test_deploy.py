"""The files in deploy/ as far as they can be tried without a container engine."""

import re
from pathlib import Path

import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from turboquant_vllm._compat import versions
from turboquant_vllm.settings import Settings

DEPLOY = Path(__file__).parents[3] / "deploy"


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["vllm"]


def test_the_command_asks_vllm_for_our_backend(service, tiny_model):
    model, *flags = service["command"]
    assert model.startswith("${MODEL:?")
    arguments = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
        [f"--model={tiny_model('Llama')}", *flags]
    )
    engine = AsyncEngineArgs.from_cli_args(arguments)
    assert engine.attention_backend == "CUSTOM"
    assert Settings.of(engine.additional_config) == Settings(preset="tq4")


def test_what_is_copied_is_there(service):
    root = (DEPLOY / service["build"]["context"]).resolve()
    assert (root / service["build"]["dockerfile"]) == DEPLOY / "Containerfile"
    copied = [line.split()[1] for line in containerfile() if line.startswith("COPY packages/")]
    assert len(copied) == 2
    kept = (DEPLOY / "Containerfile.dockerignore").read_text().split()
    for folder in copied:
        assert (root / folder / "pyproject.toml").is_file()
        assert f"!{folder}" in kept


def test_the_image_has_a_vllm_that_was_tested():
    bases = [line.split()[1] for line in containerfile() if line.startswith("FROM ")]
    assert set(bases) == {"${VLLM_IMAGE}"}
    (image,) = [line.partition("=")[2] for line in containerfile() if line.startswith("ARG VLLM_IMAGE=")]
    found = re.fullmatch(r"vllm/vllm-openai:v(\d+\.\d+)\.\d+@sha256:[0-9a-f]{64}", image)
    assert found is not None
    assert found[1] in versions.TESTED


def test_the_container_does_not_run_as_root(service):
    (user,) = [line.split()[1] for line in containerfile() if line.startswith("USER ")]
    assert user not in ("root", "0")
    mounted = [volume.split(":")[1] for volume in service["volumes"]]
    assert mounted
    assert all(path.startswith(f"/home/{user}/") for path in mounted)


def containerfile():
    return (DEPLOY / "Containerfile").read_text().splitlines()
