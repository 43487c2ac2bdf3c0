"""Random lives of a cache at 8 bits: all that may be done to one, in any order, beside forwards without a cache."""

import copy
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import CACHE_ARGUMENT

VOCAB, LAYERS, WINDOW, MAX_LENGTH, MAX_ROWS = 64, 3, 16, 90, 4
# Rounding at 8 bits gives up to 0.03 here.
BOUND = 0.08
KEPT = [
    {},
    {"sink_tokens": 0, "recent_tokens": 0},
    {"sink_tokens": 3, "recent_tokens": 2},
    {"sink_tokens": 2, "recent_tokens": 0},
    {"sink_tokens": 0, "recent_tokens": 12},
]
PRESETS = [{"center_keys": False}, {"key_scale": "least_squares"}, {}]


class Interrupted(KeyboardInterrupt):
    """What ends a forward pass between two layers."""


def make_model(model_class, config_class, **options):
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        # Attention has its say: what a token sees decides what it gives.
        initializer_range=0.2,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(11)
    return model_class(config).eval()


MODELS = {
    "growing": make_model(LlamaForCausalLM, LlamaConfig),
    "static": make_model(LlamaForCausalLM, LlamaConfig),
    "sliding": make_model(MistralForCausalLM, MistralConfig, sliding_window=WINDOW),
}


class Lives(RuleBasedStateMachine):
    """A cache, and the tokens and the mask that it stands for."""

    @initialize(
        kind=st.sampled_from(sorted(MODELS)),
        attention=st.sampled_from(["sdpa", "turboquant"]),
        kept=st.sampled_from(KEPT),
        preset=st.sampled_from(PRESETS),
        rows=st.integers(1, 2),
    )
    def begin(self, kind, attention, kept, preset, rows):
        self.kind, self.rows, self.interrupted = kind, rows, 0
        self.model, self.attention = MODELS[kind], attention
        # A cache that was pickled goes on with how the model attended then.
        self.model.set_attn_implementation(attention)
        options = {"key_bits": 8, "value_bits": 8, **preset, **kept}
        if kind == "static":
            options["max_length"] = MAX_LENGTH
        self.cache = TurboQuantCache(self.model.config, **options)
        # Windows can be taken back as far as they are recorded.
        self.cache.activate_past_recording()
        self.history = torch.zeros(rows, 0, dtype=torch.int64)
        self.mask = torch.ones(rows, 0, dtype=torch.int64)

    @property
    def length(self):
        return self.mask.shape[1]

    @property
    def padding(self):
        """The most tokens of padding that a row begins with."""
        return int((1 - self.mask).sum(-1).max())

    def forward(self, cache, tokens, mask):
        arguments = {
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            CACHE_ARGUMENT: cache,
            "use_cache": cache is not None,
        }
        with torch.no_grad():
            return self.model(tokens, **arguments).logits

    def tokens(self, num_tokens, seed):
        return torch.randint(1, VOCAB, (self.rows, num_tokens), generator=torch.Generator().manual_seed(seed))

    @precondition(lambda self: not self.interrupted)
    @rule(num_tokens=st.integers(1, 24), seed=st.integers(0, 99), padding=st.lists(st.integers(0, 6), min_size=4))
    def call(self, num_tokens, seed, padding):
        new = torch.ones(self.rows, num_tokens, dtype=torch.int64)
        if not self.length:
            # The last token of a row is none of padding.
            starts = torch.tensor(padding[: self.rows]).clamp(max=num_tokens - 1)
            new = (torch.arange(num_tokens) >= starts[:, None]).long()
        mask, tokens = torch.cat([self.mask, new], dim=1), self.tokens(num_tokens, seed)
        if self.kind == "static" and mask.shape[1] > MAX_LENGTH:
            with pytest.raises(IndexError, match="max_length"):
                self.forward(self.cache, tokens, mask)
            return
        self.mask, self.history = mask, torch.cat([self.history, tokens], dim=1)
        actual = self.forward(self.cache, tokens, mask)
        self.model.set_attn_implementation("sdpa")
        expected = self.forward(None, self.history, mask)[:, -num_tokens:]
        self.model.set_attn_implementation(self.attention)
        # Every row by itself: an error of one is not hidden by the others. What padding sees is nobody's business.
        of_tokens = new.bool()[..., None]
        error, scale = (x.where(of_tokens, 0.0).norm(dim=(1, 2)) for x in (actual - expected, expected))
        assert (error / scale).max() < BOUND

    @precondition(lambda self: not self.interrupted and self.length > self.padding + 1)
    @rule(data=st.data())
    def crop(self, data):
        num_tokens = data.draw(st.integers(0, self.length - self.padding - 1))
        try:
            self.cache.crop(-num_tokens)
        except RuntimeError as error:
            if self.kind == "sliding" and "have left the window" in str(error):
                return
            raise
        remaining = self.length - num_tokens
        self.mask, self.history = self.mask[:, :remaining], self.history[:, :remaining]

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def reorder(self, data):
        rows = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=self.rows, max_size=self.rows))
        self.cache.reorder_cache(torch.tensor(rows))
        self.pick(rows)

    @precondition(lambda self: self.length and self.kind != "static")
    @rule(data=st.data())
    def select(self, data):
        rows = data.draw(st.lists(st.integers(-self.rows, self.rows - 1), min_size=1, max_size=self.rows))
        self.cache.batch_select_indices(rows)
        self.pick(rows)

    @precondition(lambda self: self.length and self.kind != "static" and 2 * self.rows <= MAX_ROWS)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.pick(torch.arange(self.rows).repeat_interleave(2))

    def pick(self, rows):
        self.mask, self.history, self.rows = self.mask[rows], self.history[rows], len(rows)

    @rule()
    def reset(self):
        self.cache.reset()
        self.mask, self.history, self.interrupted = self.mask[:, :0], self.history[:, :0], 0

    @rule(duplicate=st.sampled_from([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def go_on_with_a_copy(self, duplicate):
        first, self.cache = self.cache, duplicate(self.cache)
        # What becomes of the first is nothing to its copy.
        first.reset()

    @precondition(lambda self: self.length and self.kind == "growing")
    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            if self.interrupted:
                with pytest.raises(RuntimeError, match="hold"):
                    self.cache.save(path)
                return
            self.cache.save(path)
            self.cache = TurboQuantCache.load(path, self.model.config)

    @precondition(lambda self: not self.interrupted and self.length < MAX_LENGTH - 24)
    @rule(num_tokens=st.integers(1, 24), seed=st.integers(0, 99), layer=st.integers(1, LAYERS - 1))
    def interrupt(self, num_tokens, seed, layer):
        def stop(*_):
            raise Interrupted

        mask = torch.cat([self.mask, torch.ones(self.rows, num_tokens, dtype=torch.int64)], dim=1)
        hook = self.model.model.layers[layer].register_forward_pre_hook(stop)
        with pytest.raises(Interrupted):
            self.forward(self.cache, self.tokens(num_tokens, seed), mask)
        hook.remove()
        self.interrupted = num_tokens

    @precondition(lambda self: self.interrupted)
    @rule(num_tokens=st.integers(1, 24), seed=st.integers(0, 99))
    def call_after_an_interrupted_one(self, num_tokens, seed):
        mask = torch.ones(self.rows, self.length + num_tokens, dtype=torch.int64)
        before = self.lengths()
        if self.length:
            with pytest.raises((RuntimeError, IndexError)):
                self.forward(self.cache, self.tokens(num_tokens, seed), mask)
            assert self.lengths() == before

    @precondition(lambda self: self.interrupted)
    @rule()
    def take_the_interrupted_call_back(self):
        self.cache.crop(-self.interrupted)
        self.interrupted = 0

    def lengths(self):
        return [int(layer.get_seq_length()) for layer in self.cache.layers]

    @invariant()
    def layers_agree(self):
        if hasattr(self, "mask") and not self.interrupted:
            assert self.lengths() == [self.length] * LAYERS


Lives.TestCase.settings = settings(max_examples=200, stateful_step_count=12, deadline=None)
TestLives = Lives.TestCase
