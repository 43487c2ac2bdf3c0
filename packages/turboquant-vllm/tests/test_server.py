"""The OpenAI-compatible server as a process, asked by OpenAI's client.

What it says at one time is compared with what it says at another along the text of the first: see `forced.py`.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

import forced
import processes
from serve import serve as serve_openai

pytestmark = pytest.mark.real_weights

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# In another batch sums are rounded otherwise, which takes some coordinates over a boundary between codes of 4 bits.
NEAR_AT_FOUR_BITS = {"largest": 1.5, "mean": 0.15}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log.txt"


@pytest.fixture(scope="module")
def serve(model_folder, log, free_ports):
    """Starts a server in a process of its own, and waits until it serves or ends."""
    openai = pytest.importorskip("openai")

    @contextmanager
    def start(*options):
        (port,) = free_ports(1)
        arguments = [
            "--model", str(model_folder), "--attention-backend", "CUSTOM", "--served-model-name", "smollm2",
            "--dtype", str(processes.DTYPE).removeprefix("torch."), "--enforce-eager", "--max-model-len", "1024",
            "--gpu-memory-utilization", "0.3",
            "--logits-processors", f"forced:{forced.processor().__name__}", "--port", str(port), *options,
        ]  # fmt: skip
        log.write_text("")
        server = processes.start(serve_openai, arguments, log)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            deadline = time.monotonic() + 300
            while server.is_alive() and not _serves(client):
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.2)
            yield server, client
        finally:
            server.terminate()
            server.join()

    return start


def _serves(client):
    import openai

    try:
        return bool(client.models.list())
    except openai.APIConnectionError:
        return False


@pytest.fixture(scope="module")
def client(serve, log):
    with serve() as (server, client):
        assert server.is_alive(), log.read_text()[-4000:]
        yield client


def ask(client, messages=QUESTION, **options):
    asked = client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, **{"max_tokens": 20, **options}
    )
    return asked.choices[0]


def answer(client, messages=QUESTION, **options):
    return ask(client, messages, **options).message.content


def said(client, text=None):
    """The tokens of an answer of 60, and their logprobs; of a text given as tokens, or of the model's own."""
    extra = {"return_token_ids": True, **({} if text is None else {"vllm_xargs": {"forced": text}})}
    choice = ask(client, max_tokens=60, logprobs=True, extra_body={**extra, "ignore_eos": True})
    return choice.token_ids, [token.logprob for token in choice.logprobs.content]


@pytest.fixture
def says_again(assert_near):
    """Whether a client's server says of a text what was said before."""

    def check(client, before):
        now = said(client, before[0])
        assert_near(*(as_of_an_engine(*answer) for answer in (now, before)), **NEAR_AT_FOUR_BITS)

    return check


def as_of_an_engine(tokens, logprobs):
    """As the engines of the other tests answer."""
    steps = [{str(token): logprob} for token, logprob in zip(tokens, logprobs, strict=True)]
    return {"tokens": [[tokens]], "logprobs": [[steps]]}


def test_a_question_is_answered(client):
    assert "Paris" in answer(client)


def test_sixteen_clients_at_once(client):
    questions = [[{"role": "user", "content": f"Count from {n} to {n + 5}."}] for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda question: answer(client, question), questions))
    assert all(answers)
    assert len(set(answers)) > 8


def test_a_client_that_leaves_does_no_harm(client, says_again):
    before = said(client)
    stream = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "Tell me a long story."}], max_tokens=300, stream=True
    )
    for _, _ in zip(range(5), stream, strict=False):
        pass
    stream.close()
    says_again(client, before)


def test_requests_that_fail_leave_others_as_they_are(client, says_again):
    import openai

    def refused(messages, **options):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, messages, **options)
        return str(error.value)

    before = said(client)
    with ThreadPoolExecutor(9) as pool:
        fine = [pool.submit(says_again, client, before) for _ in range(3)]
        too_long = [pool.submit(refused, [{"role": "user", "content": "word " * 3000}]) for _ in range(3)]
        nonsense = [pool.submit(refused, QUESTION, top_p=7) for _ in range(3)]
    for request in fine:
        request.result()
    assert all("1024" in request.result() for request in too_long)
    assert all("top_p" in request.result() for request in nonsense)
    says_again(client, before)


def test_a_restart_says_the_same(client, serve, says_again):
    before = said(client)
    with serve() as (_, restarted):
        says_again(restarted, before)


def test_a_server_that_is_refused_says_why(serve, log):
    with serve("--additional-config", '{"turboquant": {"preset": "tq9"}}') as (server, _):
        assert server.exitcode
    assert "preset is 'tq9'; it must be one of tq4" in log.read_text()
