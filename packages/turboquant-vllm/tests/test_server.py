"""The OpenAI-compatible server as a process, asked by OpenAI's client."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.real_weights

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(model_folder, tmp_path_factory):
    openai = pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        # `vllm serve`, but for a look at the metadata of a package called vllm, which the build for CPUs is not.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder),
        "--attention-backend", "CUSTOM", "--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "1024", "--port", str(port),
    ]  # fmt: skip
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=os.environ) as server:
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            deadline = time.monotonic() + 300
            while True:
                assert server.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    time.sleep(1)
            yield client
        finally:
            server.terminate()


def answer(client, messages=QUESTION, **options):
    asked = client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, **{"max_tokens": 20, **options}
    )
    return asked.choices[0].message.content


def test_a_question_is_answered(client):
    assert "Paris" in answer(client)


def test_sixteen_clients_at_once(client):
    questions = [[{"role": "user", "content": f"Count from {n} to {n + 5}."}] for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda question: answer(client, question), questions))
    assert all(answers)
    assert len(set(answers)) > 8


def test_a_client_that_leaves_does_no_harm(client):
    before = answer(client)
    stream = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "Tell me a long story."}], max_tokens=300, stream=True
    )
    for _, _ in zip(range(5), stream, strict=False):
        pass
    stream.close()
    assert answer(client) == before


def test_a_request_that_is_too_long_is_refused_and_the_next_is_served(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="1024"):
        answer(client, [{"role": "user", "content": "word " * 3000}])
    assert "Paris" in answer(client)
