"""The quick start's `vllm serve` as it is written there, asked with curl and with OpenAI's client."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.real_weights,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(shutil.which("vllm") is None, reason="needs the command vllm on the PATH"),
]
QUICK_START = Path(__file__).parents[4] / "docs" / "quickstart-vllm.md"
URL = "http://localhost:8000"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
START_UP_S = 240


@pytest.fixture(scope="module")
def command(model_folder):
    """The first command of the quick start that serves."""
    line = next(line for line in QUICK_START.read_text().splitlines() if line.startswith("vllm serve MODEL"))
    return [str(model_folder) if word == "MODEL" else word for word in shlex.split(line)]


@pytest.fixture(scope="module")
def log(command, tmp_path_factory, keep, wait_until, is_healthy):
    """What the server printed until it answered; it runs while this is in use."""
    path = tmp_path_factory.mktemp("serve") / "log.txt"
    with path.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            wait_until(lambda: is_healthy(URL), [(server, path)], START_UP_S)
            yield path.read_text()
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
            keep("serve.log", path.read_text())


def test_the_log_says_how_many_tokens_fit(log, command, figures):
    assert command[-2:] == ["--attention-backend", "CUSTOM"]
    (tokens,) = re.findall(r"KV cache size: ([\d,]+) tokens", log)
    figures(serve=shlex.join(command), served_kv_tokens=tokens)
    assert re.search(r"Using .*CUSTOM", log)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_an_answer(log, command):
    asked = json.dumps({"model": command[2], "messages": QUESTION, "temperature": 0, "max_tokens": 20})
    answer = subprocess.run(
        ["curl", "-sS", f"{URL}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", asked],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Paris" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_openais_client_gets_an_answer(log, command):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    asked = client.chat.completions.create(model=command[2], messages=QUESTION, temperature=0, max_tokens=20)
    assert "Paris" in asked.choices[0].message.content
