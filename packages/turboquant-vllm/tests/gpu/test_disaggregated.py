"""One server prefills, another decodes, each on a GPU of its own: pages of codes go through vLLM's NIXL connector."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(find_spec("nixl") is None, reason="needs nixl"),
]
START_UP_S = 240
TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail"}
# Pages that leave their server need the same mean on both sides, or none.
TURBOQUANT = {"key_bits": 8, "value_bits": 8, "center_keys": False}
# As `forced.py`, which the servers import, calls it.
FORCED = "forced"
TESTS = Path(__file__).parents[1]
REMOTE = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")


def start(model, gpu, port, side_channel_port, output):
    return subprocess.Popen(
        [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
            "--served-model-name", "model", "--dtype", "float16", "--max-model-len", "2048", "--max-num-seqs", "4",
            "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2**28), "--attention-backend", "CUSTOM",
            "--additional-config", json.dumps({"turboquant": TURBOQUANT}),
            "--kv-transfer-config", json.dumps(TRANSFER), "--logits-processors", "forced:SecondForcedText",
        ],
        env=os.environ
        | {
            "CUDA_VISIBLE_DEVICES": str(gpu),
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "UCX_NET_DEVICES": "all",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel_port),
        },
        stdout=output,
        stderr=output,
    )  # fmt: skip


@pytest.fixture(scope="module")
def servers(model_folder, tmp_path_factory, keep, wait_until, is_healthy, free_ports):
    """The port of the server that prefills and of the one that decodes; they run until the tests are over."""
    logs = [tmp_path_factory.mktemp("servers") / f"{does}.log" for does in ("prefills", "decodes")]
    found = free_ports(4)
    ports, side_channel_ports = found[:2], found[2:]
    with ExitStack() as stack:
        running = []
        for gpu, log in enumerate(logs):
            output = stack.enter_context(log.open("w"))
            running.append((start(model_folder, gpu, ports[gpu], side_channel_ports[gpu], output), log))
            stack.callback(lambda log=log: keep(f"disaggregated_{log.name}", log.read_text()))
            stack.callback(running[-1][0].kill)
        wait_until(lambda: all(is_healthy(f"http://localhost:{port}") for port in ports), running, START_UP_S)
        yield ports


def complete(port, prompt, **options):
    asked = {"model": "model", "prompt": prompt, "temperature": 0, "ignore_eos": True, "logprobs": 3, **options}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=120))


def tokens_from_elsewhere(port):
    metrics = urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=5).read().decode()
    (found,) = re.findall(r"^vllm:external_prefix_cache_hits_total\S* (\S+)$", metrics, re.MULTILINE)
    return float(found)


def as_of_an_engine(answer):
    """Tokens and likely ones, as the engines of the other tests give them."""
    logprobs = answer["choices"][0]["logprobs"]
    return {"tokens": [[logprobs["tokens"]]], "logprobs": [[logprobs["top_logprobs"]]]}


def test_what_one_server_prefilled_another_decodes(servers, story, figures, how_far, assert_near):
    to_come = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(REMOTE)}
    prefills, decodes = servers
    prefilled = complete(prefills, story, max_tokens=1, kv_transfer_params=to_come)
    before = tokens_from_elsewhere(decodes)
    expected = complete(prefills, story, max_tokens=60, return_token_ids=True)
    text = {FORCED: expected["choices"][0]["token_ids"]}
    found = complete(decodes, story, max_tokens=60, kv_transfer_params=prefilled["kv_transfer_params"], vllm_xargs=text)
    moved = tokens_from_elsewhere(decodes) - before
    seen = how_far(as_of_an_engine(found), as_of_an_engine(expected))
    figures(disaggregated_tokens_moved=moved, disaggregated=seen)
    assert moved >= 256
    assert moved >= found["usage"]["prompt_tokens"] - 16
    assert_near(as_of_an_engine(found), as_of_an_engine(expected))
