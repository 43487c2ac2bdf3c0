import json

import pytest
import torch

from turboquant_hf import TurboQuantCache
from turboquant_hf.scoring import CHUNK_SIZE
from turboquant_hf.tools.article import article

lm_eval = pytest.importorskip("lm_eval", reason="needs turboquant-hf[lm-eval]")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from turboquant_hf.tools.eval.harness import MODEL, TurboQuantLM  # noqa: E402

QUESTION = " ".join(article().split()[:60])
LONG = " ".join(article().split()[60:360])
PAIRS = [
    (QUESTION, " born at Stratford"),
    (QUESTION, " the poet"),
    (QUESTION, " and"),
    ("William", " Shakespeare"),
    ("William", " Shakespeare was born"),
    (QUESTION, " " + LONG),
    ("William", " " + LONG),
]


def requests(kind, arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


@pytest.fixture(scope="module")
def served(tiny_model_folder):
    return lambda cache: TurboQuantLM(str(tiny_model_folder), cache=cache, device="cpu")


@pytest.fixture(scope="module")
def plain(tiny_model, served):
    return HFLM(pretrained=tiny_model, tokenizer=served("uncompressed").tokenizer, batch_size=1)


def test_dtype_and_attention_are_obeyed(tiny_model_folder):
    lm = TurboQuantLM(str(tiny_model_folder), device="cpu", dtype="bfloat16", attn_implementation="eager")
    assert (lm.model.dtype, lm.model.config._attn_implementation) == (torch.bfloat16, "eager")
    for wrong in ({"dtype": "bfloat17"}, {"attn_implementation": "eagre"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            TurboQuantLM(str(tiny_model_folder), device="cpu", **wrong)


def test_uncompressed_it_says_what_the_harness_says(served, plain):
    lm = served("uncompressed")
    for kind, arguments in (("loglikelihood", PAIRS), ("loglikelihood_rolling", [(LONG,), ("William",)])):
        actual, expected = (getattr(each, kind)(requests(kind, arguments), disable_tqdm=True) for each in (lm, plain))
        if kind == "loglikelihood":
            assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
            actual, expected = ([score for score, _ in answers] for answers in (actual, expected))
        assert actual == pytest.approx(expected, rel=1e-4)


def test_a_continuation_reads_the_cache_token_by_token(served, tiny_model):
    lm = served("tq2")
    answers = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(PAIRS[:3], answers, strict=False):
        prompt, scored = lm._encode_pair(context, continuation)
        cache = TurboQuantCache(tiny_model.config, "tq2")
        expected, chosen = 0.0, []
        with torch.no_grad():
            tiny_model(torch.tensor([prompt[:-1]]), past_key_values=cache)
            for token, target in zip([prompt[-1], *scored[:-1]], scored, strict=True):
                logits = tiny_model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
                expected += float(logits.log_softmax(-1)[target])
                chosen.append(int(logits.argmax()))
        assert score == pytest.approx(expected, rel=1e-5)
        assert is_greedy == (chosen == scored)


def test_fewer_bits_say_something_else(served, plain):
    kind, words = "loglikelihood_rolling", LONG.split()
    arguments = [(" ".join(words[start : start + 60]),) for start in range(0, 300, 30)]

    def scores(model):
        return torch.tensor(model.loglikelihood_rolling(requests(kind, arguments), disable_tqdm=True))

    # Of one text alone, what tokens gain and lose may cancel out.
    moved = [(scores(served(cache)) - scores(plain)).abs().mean() for cache in ("tq2", "k8v4")]
    assert moved[0] > moved[1] > 1e-4


def test_generation_reads_the_cache(served, tiny_model):
    lm = served("tq2")
    asked = {"until": ["[END]"], "max_gen_toks": 12, "do_sample": False}
    (answer,) = lm.generate_until(requests("generate_until", [(QUESTION, asked)]), disable_tqdm=True)
    ids = lm.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    output = tiny_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=TurboQuantCache(tiny_model.config, "tq2"),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    assert answer == lm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_task_of_ones_own(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": QUESTION, "choices": [" born", " the poet"], "answer": number % 2} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    common = {**data, "test_split": "test", "doc_to_text": "{{question}}"}
    tasks = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
        },
        "tiny_answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        },
    }
    for name, task in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    found = lm_eval.simple_evaluate(
        model=MODEL,
        model_args={"pretrained": str(tiny_model_folder), "cache": "tq3", "device": "cpu"},
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["tiny_choice"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert "exact_match,none" in found["results"]["tiny_answer"]


def test_a_cache_that_is_not_there(served):
    with pytest.raises(ValueError, match="no cache 'tq5'"):
        served("tq5")


def test_the_long_ones_are_longer_than_a_chunk(served):
    assert len(served("tq4").tok_encode(LONG)) > CHUNK_SIZE + 1
