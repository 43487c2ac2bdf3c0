"""An engine takes a prompt's pages from an LMCache server, where an engine before it left them."""

import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(find_spec("lmcache") is None, reason="needs lmcache"),
]
START_UP_S = 120
BLOCK_SIZE = 16
COMMON = {
    "dtype": "float16",
    "block_size": BLOCK_SIZE,
    "kv_cache_memory_bytes": 2**28,
    "gpu_memory_utilization": 0.05,
    "attention_backend": "CUSTOM",
}
BITS = {"eight_bits": {"key_bits": 8, "value_bits": 8}, "four_bits": {"preset": "tq4"}}


def is_open(port):
    try:
        socket.create_connection(("localhost", port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(params=BITS)
def bits(request):
    return request.param


@pytest.fixture
def server(bits, tmp_path, keep, wait_until, free_ports):
    """The port of a server for one way to store pages: it does not tell several apart."""
    port, http_port = free_ports(2)
    command = [
        sys.executable, "-m", "lmcache.cli.main", "server", "--host", "localhost", "--port", str(port),
        "--http-port", str(http_port), "--chunk-size", str(BLOCK_SIZE), "--l1-size-gb", "1",
        "--eviction-policy", "LRU", "--supported-transfer-mode", "auto", "--disable-observability",
    ]  # fmt: skip
    log = tmp_path / "lmcache.log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_until(lambda: is_open(http_port), [(process, log)], START_UP_S)
            yield port
        finally:
            process.kill()
            keep(f"lmcache_{bits}.log", log.read_text(errors="replace"))


def test_an_engine_takes_pages_that_another_left(generate, server, bits, story, figures, how_far, assert_near):
    common = {**COMMON, "additional_config": {"turboquant": {**BITS[bits], "center_keys": False}}}
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.port": server},
    }
    left = generate([story], max_tokens=1, kv_transfer_config=transfer, **common)
    # In its second round it takes the prompt from pages, too: its own.
    own = generate([story], max_tokens=60, rounds=2, **common)
    expected = {name: own[name][1:] for name in ("tokens", "logprobs")}
    found = generate([story], forced=expected["tokens"][0], kv_transfer_config=transfer, **common)
    figures(**{f"lmcache_{bits}": {"tokens": found["cached"][0], **how_far(found, expected)}})
    assert left["cached"] == [[0]]
    assert found["cached"][0] == own["cached"][1]
    assert found["cached"][0][0] >= 320
    assert_near(found, expected)
