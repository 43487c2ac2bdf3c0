"""What `generate` and multi-turn use do to a cache, checked against one built afresh, on a tiny random model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM

from side_by_side.table import PASSES
from turboquant_hf._compat import with_cache
from turboquant_hf.tools.caches import WINDOW, NewCache

NUM_NEW_TOKENS = 24


@dataclass(frozen=True)
class _Bench:
    """Models and a prompt, int64 [2, 65]; the draft agrees with the model now and then."""

    model: LlamaForCausalLM
    draft: LlamaForCausalLM
    prompt: torch.Tensor

    def filled(self, new_cache: NewCache, prompt: torch.Tensor) -> Cache:
        """A cache that holds the prompt without its last token."""
        cache = new_cache(self.model.config)
        self.model(input_ids=prompt[:, :-1], **with_cache(cache))
        return cache

    def text(self, prompt: torch.Tensor, cache: Cache, **kwargs: object) -> torch.Tensor:
        """Greedy continuation of a prompt whose cache is filled."""
        arguments = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **kwargs}
        mask = torch.ones_like(prompt)
        output: torch.Tensor = self.model.generate(prompt, attention_mask=mask, **with_cache(cache), **arguments)
        return output


@torch.inference_mode()
def lifecycle(new_cache: NewCache) -> dict[str, str]:
    """Each row with "passes", or what went wrong."""
    bench = _new_bench()
    return {row: _outcome(check, bench, new_cache) for row, check in ROWS.items()}


@torch.inference_mode()
def failure(new_cache: NewCache) -> str | None:
    """What goes wrong when a cache decodes past its window; None when nothing does."""
    bench = _new_bench()
    prompt = bench.prompt[:1]
    try:
        bench.text(prompt, bench.filled(new_cache, prompt), max_new_tokens=WINDOW + 8)
    except Exception as error:
        return _named(error)
    return None


def _new_bench() -> _Bench:
    config = LlamaConfig(
        vocab_size=1500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(20260101)
    model, draft = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    draft.load_state_dict(model.state_dict())
    for weight in draft.parameters():
        weight.add_(0.1 * weight.std() * torch.randn_like(weight))
    return _Bench(model, draft, torch.randint(1500, (2, 65)))


def _outcome(
    check: Callable[[_Bench, NewCache], tuple[torch.Tensor, torch.Tensor]], bench: _Bench, new: NewCache
) -> str:
    try:
        found, expected = check(bench, new)
    # Whatever a cache of another project raises is its result.
    except Exception as error:
        return _named(error)
    return PASSES if torch.equal(found, expected) else "other text than from a fresh cache"


def _named(error: Exception) -> str:
    return type(error).__name__


def _crop(bench: _Bench, new_cache: NewCache) -> tuple[torch.Tensor, torch.Tensor]:
    cache = bench.filled(new_cache, bench.prompt)
    bench.model(input_ids=bench.prompt[:, :8], **with_cache(cache))
    cache.crop(-8)
    return bench.text(bench.prompt, cache), bench.text(bench.prompt, bench.filled(new_cache, bench.prompt))


def _reorder(bench: _Bench, new_cache: NewCache) -> tuple[torch.Tensor, torch.Tensor]:
    cache, swapped = bench.filled(new_cache, bench.prompt), bench.prompt.flip(0)
    cache.reorder_cache(torch.tensor([1, 0]))
    return bench.text(swapped, cache), bench.text(swapped, bench.filled(new_cache, swapped))


def _beams(bench: _Bench, new_cache: NewCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search twice: it runs, and depends on nothing but the cache's contents."""
    texts = [bench.text(bench.prompt[:, :64], new_cache(bench.model.config), num_beams=3) for _ in range(2)]
    return texts[0], texts[1]


def _assisted(bench: _Bench, new_cache: NewCache) -> tuple[torch.Tensor, torch.Tensor]:
    return _speculated(bench, new_cache, bench.prompt[:1, :64], assistant_model=bench.draft)


def _prompt_lookup(bench: _Bench, new_cache: NewCache) -> tuple[torch.Tensor, torch.Tensor]:
    return _speculated(bench, new_cache, bench.prompt[:1, :16].repeat(1, 4), prompt_lookup_num_tokens=3)


def _speculated(
    bench: _Bench, new_cache: NewCache, prompt: torch.Tensor, **how: object
) -> tuple[torch.Tensor, torch.Tensor]:
    config = bench.model.config
    return bench.text(prompt, new_cache(config), **how), bench.text(prompt, new_cache(config))


def _batch_repeat(bench: _Bench, new_cache: NewCache) -> tuple[torch.Tensor, torch.Tensor]:
    cache, repeated = bench.filled(new_cache, bench.prompt), bench.prompt.repeat_interleave(2, dim=0)
    cache.batch_repeat_interleave(2)
    return bench.text(repeated, cache), bench.text(repeated, bench.filled(new_cache, repeated))


ROWS: Mapping[str, Callable[[_Bench, NewCache], tuple[torch.Tensor, torch.Tensor]]] = MappingProxyType(
    {
        "crop": _crop,
        "reorder": _reorder,
        "beam search": _beams,
        "assisted": _assisted,
        "prompt lookup": _prompt_lookup,
        "batch repeat": _batch_repeat,
    }
)
