"""Decoding with transformers on a GPU: tokens/s and memory of TurboQuantCache beside DynamicCache and StaticCache.

A model of Llama-3.1-8B's shape decodes greedily after a context whose keys and values are random. Before a compressed
cache is timed, its attention is compared with float32 on what it holds.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from figure_text import shape, table
from gate import needs_gpu
from llama_8b import ROPE_THETA, SIZES
from results_file import read_result, write_result
from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import Cache, with_cache
from turboquant_hf.memory import memory_report

MODEL = "Llama-3.1-8B's shape, random weights, bfloat16"
# What bfloat16 attention makes on the same values.
MAX_GATE_ERROR = 0.008
WARM_UP_STEPS = 8
PROFILED_STEPS = 2
RECENT_TOKENS = 32


@dataclass(frozen=True)
class Contestant:
    """A cache and how the model attends on it.

    Attributes:
        name: In the table.
        attention: The model's attn_implementation.
        new_cache: Makes an empty cache for so many tokens.
        compiled: Decode through torch.compile with CUDA graphs.
        backend: What SDPA is held to; None for what it takes by itself.
    """

    name: str
    attention: str
    new_cache: Callable[[LlamaConfig, int], Cache]
    compiled: bool = False
    backend: SDPBackend | None = None


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        cache: The contestant.
        batch_size: Sequences.
        context: Tokens in the cache before decoding.
        tokens_per_second: Decoded tokens per second, all sequences together.
        milliseconds_per_step: Median time of a step.
        fastest_step_milliseconds: The shortest, when nothing else wanted the host.
        kv_nbytes: Allocated bytes of the cache, from its storage.
        step_peak_nbytes: torch.cuda.max_memory_allocated of a decode step, less what the model's weights take.
    """

    cache: str
    batch_size: int
    context: int
    tokens_per_second: float
    milliseconds_per_step: float
    fastest_step_milliseconds: float
    kv_nbytes: int
    step_peak_nbytes: int


def dynamic(config: LlamaConfig, num_tokens: int) -> Cache:
    """What transformers uses by default."""
    return DynamicCache(config=config)


def static(config: LlamaConfig, num_tokens: int) -> Cache:
    """What transformers has for compiled decoding."""
    return StaticCache(config=config, max_cache_len=num_tokens)


def turboquant(preset: str, *, is_static: bool = False, **options: Any) -> Callable[[LlamaConfig, int], Cache]:
    """Ours."""
    return lambda config, num_tokens: TurboQuantCache(
        config, preset, max_length=num_tokens if is_static else None, **options
    )


CONTESTANTS = (
    Contestant("DynamicCache, sdpa", "sdpa", dynamic),
    # By itself SDPA takes cuDNN on Hopper, which plans anew for every length that it has not seen.
    Contestant("DynamicCache, sdpa's flash", "sdpa", dynamic, backend=SDPBackend.FLASH_ATTENTION),
    *([Contestant("DynamicCache, flash", "flash_attention_2", dynamic)] if find_spec("flash_attn") else []),
    Contestant("TurboQuantCache tq4, fused", "turboquant", turboquant("tq4")),
    Contestant("tq4, codes only, fused", "turboquant", turboquant("tq4", sink_tokens=0, recent_tokens=0)),
    Contestant(
        f"tq4, {RECENT_TOKENS} recent tokens, fused", "turboquant", turboquant("tq4", recent_tokens=RECENT_TOKENS)
    ),
)
COMPILED = (
    Contestant("StaticCache, sdpa, compiled", "sdpa", static, compiled=True),
    Contestant("tq4, static, compiled", "turboquant", turboquant("tq4", is_static=True), compiled=True),
)


def llama_8b() -> LlamaForCausalLM:
    """A model of Llama-3.1-8B's shape with random weights, made on the GPU."""
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA})
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def fill(cache: Cache, config: LlamaConfig, batch_size: int, context: int) -> None:
    """Put random keys and values into every layer, as a prompt of that length and its first new token do."""
    shape = (batch_size, config.num_key_value_heads, context, config.head_dim)
    generator = torch.Generator("cuda").manual_seed(0)
    for layer_idx in range(config.num_hidden_layers):
        states = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(2)]
        for tokens in (slice(0, context - 1), slice(context - 1, context)):
            # Of a layer: a call of the cache would have to reach all of them.
            cache.layers[layer_idx].update(*(x[:, :, tokens] for x in states))


def gate(cache: TurboQuantCache, num_heads: int) -> float:
    """The largest relative error, over layers, of a token's attention against float32 on what the cache holds."""
    errors = []
    for layer in cache.layers:
        states = layer.store
        query = torch.randn(
            states.batch_size, num_heads, 1, states.config.head_dim, device="cuda", dtype=torch.bfloat16
        )
        actual = states.attend(query, scale=None)
        keys, values = (x[:1, :, : states.num_tokens] for x in states.dequantize(torch.float32))
        expected = torch.nn.functional.scaled_dot_product_attention(query[:1].float(), keys, values, enable_gqa=True)
        errors.append((actual[:1].transpose(1, 2) - expected).norm() / expected.norm())
    return float(torch.stack(errors).max())


def measure(
    model: LlamaForCausalLM,
    contestant: Contestant,
    batch_size: int,
    context: int,
    num_steps: int,
    weights_nbytes: int,
    profile: bool,
) -> Row:
    """Fill a cache, check it, and time greedy decoding."""
    config = model.config
    cache = contestant.new_cache(config, context + num_steps + WARM_UP_STEPS + PROFILED_STEPS + 2)
    model.set_attn_implementation(contestant.attention)
    fill(cache, config, batch_size, context)
    tokens = torch.randint(config.vocab_size, (batch_size, 1), device="cuda")
    if contestant.attention == "turboquant":
        error = gate(cache, config.num_attention_heads)
        print(f"  {contestant.name}: attention {error:.4f} from float32 on the same codes", flush=True)
        if not error <= MAX_GATE_ERROR:
            raise SystemExit(f"{contestant.name}: attention is {error:.4f} from float32 on the same codes: no timing")
    forward = model.forward
    if contestant.compiled:
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
    position = context

    def step() -> None:
        nonlocal tokens, position
        position_ids = torch.full((1, 1), position, device="cuda") if contestant.compiled else None
        with nullcontext() if contestant.backend is None else sdpa_kernel(contestant.backend):
            logits = forward(tokens, position_ids=position_ids, **with_cache(cache)).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True).clone()
        position += 1

    for _ in range(WARM_UP_STEPS):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - weights_nbytes
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = sorted(times)[len(times) // 2]
    if profile:
        with cProfile.Profile() as profiler:
            for _ in range(PROFILED_STEPS):
                step()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
    return Row(
        cache=contestant.name,
        batch_size=batch_size,
        context=context,
        tokens_per_second=batch_size / seconds,
        milliseconds_per_step=1000 * seconds,
        fastest_step_milliseconds=1000 * min(times),
        kv_nbytes=memory_report(cache.layers).nbytes,
        step_peak_nbytes=peak,
    )


def rows_of(*, compiled: bool) -> Callable[[], str]:
    """The caches that are compiled, or those that are not."""
    compiled_names = [contestant.name for contestant in COMPILED]

    def text() -> str:
        rows = [
            [
                shape(row["batch_size"], row["context"]),
                row["cache"].removesuffix(", compiled").replace("tq4", "`tq4`").replace(", fused", ""),
                f"{row['tokens_per_second']:.1f}",
                f"{row['fastest_step_milliseconds']:.1f} ms",
                f"{row['kv_nbytes'] / 2**30:.2f} GiB",
                f"{row['step_peak_nbytes'] / 2**30:.2f} GiB",
            ]
            for row in read_result("hf_decode")["rows"]
            if (row["cache"] in compiled_names) == compiled
        ]
        columns = ("batch × context", "cache", "tokens/s", "fastest step", "KV", "peak of a step, less weights")
        return table(columns, rows)

    return text


def ratios(cache: str, peer: str) -> Callable[[], str]:
    """How many times as fast as another a cache decodes, over all sizes."""

    def text() -> str:
        rates: dict[str, list[float]] = {}
        for row in read_result("hf_decode")["rows"]:
            rates.setdefault(row["cache"], []).append(row["tokens_per_second"])
        found = [ours / theirs for ours, theirs in zip(rates[cache], rates[peer], strict=True)]
        return f"{min(found):.1f} to {max(found):.1f}"

    return text


FIGURES = {
    "hf-decode": rows_of(compiled=False),
    "hf-decode-compiled": rows_of(compiled=True),
    "hf-compiled-static": ratios("tq4, static, compiled", "StaticCache, sdpa, compiled"),
    "hf-compiled-flash": ratios("tq4, static, compiled", "DynamicCache, sdpa's flash"),
    "hf-eager-sdpa": ratios("TurboQuantCache tq4, fused", "DynamicCache, sdpa"),
    "hf-eager-flash": ratios("TurboQuantCache tq4, fused", "DynamicCache, sdpa's flash"),
}


@torch.no_grad()
def main() -> None:
    """Measure every contestant and write results/hf_decode.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=[(1, 8192), (1, 32768), (8, 8192)], metavar="BxCONTEXT"
    )
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument(
        "--compiled", action="store_true", help="the static caches with torch.compile too: minutes more"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="contestants whose name contains one of these")
    parser.add_argument("--profile", action="store_true", help="print where the host spends its time")
    arguments = parser.parse_args()
    known = CONTESTANTS + COMPILED if arguments.compiled else CONTESTANTS
    contestants = [c for c in known if any(part in c.name for part in arguments.only)]
    if not contestants:
        parser.error(f"no contestant is named like {arguments.only}: {', '.join(c.name for c in known)}")
    needs_gpu("decoding")

    model = llama_8b()
    weights_nbytes = torch.cuda.memory_allocated()
    rows = []
    for batch_size, context in arguments.sizes:
        for contestant in contestants:
            row = measure(model, contestant, batch_size, context, arguments.steps, weights_nbytes, arguments.profile)
            print(
                f"{row.cache:32s} {batch_size} x {context:6,d}: {row.tokens_per_second:7.1f} tokens/s, "
                f"{row.milliseconds_per_step:6.2f} ms (fastest {row.fastest_step_milliseconds:6.2f}), "
                f"KV {row.kv_nbytes / 2**30:5.2f} GiB, step's peak {row.step_peak_nbytes / 2**30:5.2f} GiB",
                flush=True,
            )
            rows.append(asdict(row))
            # Each row is kept, whatever happens to the next.
            path = write_result("hf_decode", {"model": MODEL, "steps": arguments.steps, "rows": rows})
            torch.compiler.reset()
            torch.cuda.empty_cache()
    print(path)


def _size(text: str) -> tuple[int, int]:
    """Sequences and context of "8x8192"."""
    batch_size, _, context = text.partition("x")
    if not (batch_size.isdecimal() and context.isdecimal() and int(batch_size) and int(context) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write sequences x context, such as 8x8192")
    return int(batch_size), int(context)


if __name__ == "__main__":
    main()
