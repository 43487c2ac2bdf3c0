"""Write the figures of README.md and docs/ from benchmarks/results/; with --check, name those that differ.

What stands between `<!-- figure: NAME -->` and `<!-- end -->` is what the function NAME in FIGURES gives. A plot names
the files that it was drawn from and their checksums, so that one drawn from others is found too.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from side_by_side.table import figures, lifecycle_rows  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- figure: (\S+) -->)(.*?)(<!-- end -->)", re.DOTALL)
# Markdown takes a line that begins with a comment for HTML.
BEGINS_A_LINE = re.compile(r"^ *<!-- figure: (\S+) -->.", re.MULTILINE)
DRAWN_FROM = re.compile(r"<dc:source>(.*?)</dc:source>", re.DOTALL)

# The names that benchmarks/eval_side_by_side.py gives the presets.
PRESETS = {"k8v4": "k8v4", "k6v4": "k6v4", "tq4": "4", "tq3": "3", "tq2": "2"}
CODES_ONLY = "turboquant, codes only"
# The end of the names that benchmarks/bench_hf_decode.py gives what is compiled.
COMPILED = ", compiled"
ENGINE_CACHES = {"bf16": "bf16, FlashAttention 3", "fp8": "fp8, FlashAttention 3", "tq4": "`tq4`"}


@cache
def result(name: str) -> Any:
    """A file of benchmarks/results/."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table on lines of its own."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    lines.insert(1, "|---" * len(columns) + "|")
    return block(lines)


def block(lines: Iterable[str]) -> str:
    """Lines with an empty one before and after them."""
    return "\n\n" + "\n".join(lines) + "\n\n"


def nats(value: float) -> str:
    """A divergence."""
    return f"{value:.4f}" if value < 0.1 else f"{value:#.3g}"


def bold_if(condition: bool, text: str) -> str:
    """Bold where that holds."""
    return f"**{text}**" if condition else text


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{100 * share:.1f} %"


def demo() -> str:
    """SmolLM2 in every cache of the demo, the uncompressed one as bf16 would be."""
    runs = {run["cache"]: run for run in result("demo")["runs"]}
    plain = runs.pop("uncompressed")
    rows = [["uncompressed, bf16", f"{plain['bytes_per_token'] / 2:,.0f}", "1.00x", "0", "0", "100 %", _ppl(plain)]]
    for name in sorted(runs, key=lambda name: -float(runs[name]["bytes_per_token"])):
        run = runs[name]
        rows.append(
            [
                f"`{name}`{' (default)' if name == 'tq4' else ''}",
                f"{run['bytes_per_token']:,.0f}",
                f"{run['compression']:.2f}x",
                nats(run["mean_kl"]),
                nats(run["p99_kl"]),
                percent(run["top1_agreement"]),
                _ppl(run),
            ]
        )
    columns = ("cache", "bytes per token", "against bf16", "mean KL (nats)", "p99 KL", "top-1 agreement", "perplexity")
    return table(columns, rows)


def demo_speed() -> str:
    """Tokens per second on a CPU: compressed caches against the uncompressed one."""
    rates = {run["cache"]: float(run["tokens_per_second"]) for run in result("demo")["runs"]}
    plain = rates.pop("uncompressed")
    return f"{min(rates.values()):.1f} to {max(rates.values()):.1f} tokens/s against {plain:.1f}"


def demo_seconds() -> str:
    """Seconds that the demo takes on a CPU."""
    return f"{result('demo')['seconds']:.0f}"


def engine() -> str:
    """Decode steps, prefill and tokens in vLLM, a row for each cache."""
    shapes = _shapes()[::-1]
    columns = [
        "KV cache",
        f"decode step, {_shape(shapes[0])}",
        *map(_shape, shapes[1:]),
        f"prefill, {_shape(LONG)}",
        "tokens that fit",
    ]
    rows = []
    for name, label in ENGINE_CACHES.items():
        steps = [bold_if(name == "tq4" and _is_fastest(name, shape), _step_text(name, shape)) for shape in shapes]
        rows.append([label, *steps, f"{_prefill(name, LONG):.2f} s", bold_if(name == "tq4", f"{_tokens(name):,}")])
    return table(columns, rows)


def engine_steps() -> str:
    """Decode steps in vLLM, a row for each shape."""
    rows = []
    for shape in _shapes():
        bf16, fp8, ours = (_step_text(name, shape) for name in ENGINE_CACHES)
        ratios = [f"{_step(peer, shape) / _step('tq4', shape):.2f}x" for peer in ("bf16", "fp8")]
        rows.append([_shape(shape), bf16, fp8, bold_if(_is_fastest("tq4", shape), ours), *ratios])
    columns = ("batch × context", "decode step: bf16", "fp8", "tq4", "tq4 against bf16", "against fp8")
    return table(columns, rows)


def engine_prefill() -> str:
    """Prefill in vLLM, a row for each shape."""
    rows = [[_shape(shape), *(f"{_prefill(name, shape):.2f} s" for name in ENGINE_CACHES)] for shape in _shapes()]
    return table(("batch × context", "prefill: bf16", "fp8", "tq4"), rows)


def engine_tokens() -> str:
    """KV tokens that vLLM reports."""
    counts = [f"{_tokens(name):,}" for name in ENGINE_CACHES]
    ratios = [f"{_tokens(name) / _tokens('bf16'):.2f}x" for name in ENGINE_CACHES]
    rows = [["KV tokens that vLLM reports", *counts], ["against bf16", *ratios]]
    return table(("", *ENGINE_CACHES), rows)


def engine_ratio(measure: Callable[[str], float], dividend: str, divisor: str) -> Callable[[], str]:
    """How many times as large a figure is in one cache as in another."""
    return lambda: f"{measure(dividend) / measure(divisor):.2f}"


def kernel_ratio(batch: int, context: int, peer: str, kernel: str = "tq4") -> Callable[[], str]:
    """How many times as long a peer's kernel takes as another."""

    def time(row: Any, name: str) -> float:
        return float(row["tq4"]["ms"] if name == "tq4" else row[f"{name}_ms"])

    def ratio() -> str:
        (row,) = (
            row for row in result("decode_attention")["contexts"] if (row["batch"], row["context"]) == (batch, context)
        )
        return f"{time(row, peer) / time(row, kernel):.2f}"

    return ratio


def update_share() -> str:
    """Share of copy bandwidth that writing a cache reaches."""
    return f"{100 * result('cache_update')['presets']['tq4']['plain']['share_of_copy']:.0f}"


def perplexity_increase(keys: str) -> Callable[[], str]:
    """How many per cent higher the perplexity of Qwen2.5-Coder-1.5B is at 4 bits, with keys "centred" or not."""

    def figure() -> str:
        scores = result("centring_qwen2.5-coder-1.5b")["scores"]
        increase = 100 * (scores[keys]["perplexity"] / scores["reference"]["perplexity"] - 1)
        return f"{increase:+.2f}" if increase < 100 else f"{increase:+,.0f}"

    return figure


def measured_families(name: str) -> dict[str, Any]:
    """Families of caches in a file of benchmarks/eval_side_by_side.py."""
    families: dict[str, Any] = dict(result(name)["families"])
    # Before caches kept sinks and recent tokens, all that they held was codes.
    if CODES_ONLY not in families:
        families[CODES_ONLY] = families.pop("turboquant")
    return families


def presets(name: str) -> Callable[[], str]:
    """What every preset costs a model, with the first and newest tokens kept and without."""

    def rows() -> str:
        families = measured_families(name)
        kinds = {"first and newest tokens kept": ("turboquant", ""), "codes only": (CODES_ONLY, ", codes only")}
        columns = ["preset"]
        for kind in kinds:
            columns += [f"{kind}: KL (nats)", "top-1", "perplexity"]
        lines = [[f"`{preset}`"] for preset in PRESETS]
        for family, suffix in kinds.values():
            caches = families.get(family, {"caches": {}})["caches"]
            for line, label in zip(lines, PRESETS.values(), strict=True):
                score = caches.get(f"turboquant {label}{suffix}") or caches.get(f"turboquant {label}")
                line += [nats(score["mean_kl"]), percent(score["top1_agreement"]), _ppl(score)] if score else ["–"] * 3
        return table(columns, lines)

    return rows


def peers() -> str:
    """The caches of transformers on both models, where ours is at 4 bits."""
    shown = {
        "`tq4`": ("turboquant", "turboquant 4"),
        "`k6v4`": ("turboquant", "turboquant k6v4"),
        "`tq4`, codes only": (CODES_ONLY, "turboquant 4"),
        "`k6v4`, codes only": (CODES_ONLY, "turboquant k6v4"),
        "quanto, 4 bits": ("quanto", "quanto 4"),
        "quanto, 4 bits, keys by channel": ("quanto, keys by channel", "quanto 4, keys by channel"),
        "hqq, 4 bits": ("hqq", "hqq 4"),
        "fp8": ("fp8", "fp8"),
    }
    models = [measured_families(name) for name in ("side_by_side_smollm2", "side_by_side_qwen2.5-coder-1.5b")]
    rows = []
    for label, (family, name) in shown.items():
        cells = [label]
        for families in models:
            caches = families.get(family, {"caches": {}})["caches"]
            score = caches.get(name) or caches.get(f"{name}, codes only")
            cells += [f"{score['bytes_per_token']:,.0f}", nats(score["mean_kl"])] if score else ["–"] * 2
        rows.append(cells)
    columns = ("cache", "SmolLM2-135M: bytes / token", "KL (nats)", "Qwen2.5-Coder-1.5B: bytes / token", "KL (nats)")
    return table(columns, rows)


def side_by_side(name: str) -> Callable[[], str]:
    """Every cache of a file of benchmarks/eval_side_by_side.py."""

    def rows() -> str:
        found = result(name)
        return block(figures(found["families"], with_speed=found["decode_tokens"] >= found["chunk_size"]))

    return rows


def of_cache(name: str) -> str:
    """A figure KIND:MODEL:CACHE of a cache of benchmarks/eval_side_by_side.py, _ for blanks.

    KIND is "kl", "bytes", "ppl", by how many per cent the perplexity is above DynamicCache's, or "fewer", by how many
    per cent a token takes fewer bytes than in the cache that follows after another colon.
    """
    kind, model, *caches = name.replace("_", " ").split(":")
    families = result(f"side_by_side_{model}")["families"].values()
    known = {cache: score for family in families for cache, score in family["caches"].items()}
    score, other = known[caches[0]], known[caches[-1] if kind == "fewer" else "DynamicCache"]
    figures_of_kind = {
        "kl": nats(score["mean_kl"]),
        "bytes": f"{score['bytes_per_token']:,.0f}",
        "ppl": f"{100 * (score['perplexity'] / other['perplexity'] - 1):.1f}",
        "fewer": f"{100 * (1 - score['bytes_per_token'] / other['bytes_per_token']):.0f}",
    }
    return figures_of_kind[kind]


def kept_tokens() -> str:
    """Numbers of first and newest tokens that are kept, at 4 and at 2 bits."""
    scores = result("kept_tokens_smollm2")["scores"]
    rows = []
    for name in scores:
        preset, *kept = name.split(", ")
        if preset == "tq4":
            sinks, recent = (number.partition("=")[2] for number in kept)
            cells = [sinks, recent, *(nats(scores[", ".join([width, *kept])]["mean_kl"]) for width in ("tq4", "tq2"))]
            rows.append([bold_if((sinks, recent) == ("1", "8"), cell) for cell in cells])
    return table(("`sink_tokens`", "`recent_tokens`", "`tq4`: KL (nats)", "`tq2`: KL (nats)"), rows)


def left_padding() -> str:
    """What padding before a row costs it."""
    found = result("left_padding_smollm2")["mean_kl"]
    rows = [[f"`tq4` under `{attention}`: KL (nats)", *map(nats, kl.values())] for attention, kl in found.items()]
    return table(("padded tokens before a row", *found["turboquant"]), rows)


def lifecycle() -> str:
    """What the first cache of each family passes."""
    return block(lifecycle_rows(result("side_by_side_smollm2")["families"]))


def centring() -> str:
    """Qwen2.5-Coder-1.5B at 4 bits, with keys centred and not."""
    scores = result("centring_qwen2.5-coder-1.5b")["scores"]
    plain = scores["reference"]["perplexity"]
    rows = [["uncompressed", f"{plain:.3f}", "", ""]]
    for label, name in (("`tq4`, keys centred (default)", "centred"), ("`tq4`, not centred", "not centred")):
        score = scores[name]
        perplexity = f"{score['perplexity']:.3f}" if score["perplexity"] < 100 else f"{score['perplexity']:,.0f}"
        rows.append([label, perplexity, f"{perplexity_increase(name)()} %", nats(score["mean_kl"])])
    return table(("cache", "perplexity", "against uncompressed", "mean KL"), rows)


def scale_rules() -> str:
    """Rules for the stored scale of keys and values."""
    scores = result("cache_options")["scores"]
    shown = {"norm": "norm", "unbiased": "unbiased", "least_squares": "least squares"}
    rules = [("norm", "norm"), ("norm", "least_squares"), ("unbiased", "norm"), ("unbiased", "least_squares")]
    rules += [("least_squares", "norm"), ("least_squares", "least_squares")]
    widths = ("tq4", "tq3", "tq2")
    rows = []
    for keys, values in rules:
        is_default = (keys, values) == ("unbiased", "least_squares")
        names = [width if is_default else f"{width}, key scale {keys}, value scale {values}" for width in widths]
        cells = [f"{shown[keys]}, {shown[values]}", *(nats(scores[name]["mean_kl"]) for name in names)]
        rows.append([bold_if(is_default, cell) for cell in cells])
        rows[-1][0] += " (default)" if is_default else ""
    rows.append(["default, keys not centred", *(nats(scores[f"{width}, not centred"]["mean_kl"]) for width in widths)])
    return table(("keys, values", *(f"`{width}`" for width in widths)), rows)


def left_out() -> str:
    """What the caches leave out, beside what they do."""
    scores, widths = result("left_out_smollm2")["scores"], ("tq4", "tq3", "tq2")
    kinds = {"keys by `Prod`": ", keys by Prod", "values centred": ", values centred", "**neither** (default)": ""}
    rows = [[label, *(nats(scores[f"{width}{kind}"]["mean_kl"]) for width in widths)] for label, kind in kinds.items()]
    return table(("", *(f"`{width}`" for width in widths)), rows)


def engine_serving(name: str, caches: Iterable[str]) -> Callable[[], str]:
    """Conversations that come back, under load."""

    def figure() -> str:
        rows = [
            [
                ENGINE_CACHES[cached] if number == 1 else "",
                str(number),
                f"{row['cached_share_of_prompts']:.0%}",
                f"{row['requests_per_s']:.1f}",
                f"{row['ttft_ms']['median']:,.0f} ms",
                f"{row['tpot_ms']['median']:.1f} ms",
            ]
            for cached in caches
            for number, row in enumerate(result(name)["caches"][cached]["serving"], 1)
        ]
        return table(("cache", "round", "of prompts cached", "requests/s", "TTFT, median", "TPOT, median"), rows)

    return figure


def hf_decode(*, compiled: bool) -> Callable[[], str]:
    """Decoding with transformers, the caches that are compiled or those that are not."""

    def figure() -> str:
        rows = [
            [
                _shape((row["batch_size"], row["context"])),
                row["cache"].removesuffix(COMPILED).replace("tq4", "`tq4`").replace(", fused", ""),
                f"{row['tokens_per_second']:.1f}",
                f"{row['fastest_step_milliseconds']:.1f} ms",
                f"{row['kv_nbytes'] / 2**30:.2f} GiB",
                f"{row['step_peak_nbytes'] / 2**30:.2f} GiB",
            ]
            for row in result("hf_decode")["rows"]
            if row["cache"].endswith(COMPILED) == compiled
        ]
        columns = ("batch × context", "cache", "tokens/s", "fastest step", "KV", "peak of a step, less weights")
        return table(columns, rows)

    return figure


def hf_ratio(cache: str, peer: str) -> Callable[[], str]:
    """How many times as fast as another a cache decodes, over all sizes."""

    def figure() -> str:
        rates: dict[str, list[float]] = {}
        for row in result("hf_decode")["rows"]:
            rates.setdefault(row["cache"], []).append(row["tokens_per_second"])
        ratios = [ours / theirs for ours, theirs in zip(rates[cache], rates[peer], strict=True)]
        return f"{min(ratios):.1f} to {max(ratios):.1f}"

    return figure


def decode_attention() -> str:
    """Times of decode attention beside the peers'."""
    peers = ("fa3_bf16", "fa3_fp8", "vllm_turboquant_4bit_nc")
    rows = []
    for row in sorted(result("decode_attention")["contexts"], key=lambda row: (row["batch"], row["context"])):
        ours = row["tq4"]["ms"]
        times = [f"{1000 * row[f'{peer}_ms']:,.0f} µs ({row[f'{peer}_ms'] / ours:.2f}x)" for peer in peers]
        rows.append([_shape((row["batch"], row["context"])), f"**{1000 * ours:,.0f} µs**", *times])
    columns = ("rows × tokens", "tq4", "FlashAttention 3, bf16", "FlashAttention 3, fp8", "vLLM's own 4-bit kernel")
    return table(columns, rows)


def cache_update() -> str:
    """Times of writing a cache."""
    rows = []
    for name, kinds in result("cache_update")["presets"].items():
        cells = [name]
        for kind in ("plain", "with_mean"):
            cells += [f"{1000 * kinds[kind]['ms']:.1f} µs", f"{kinds[kind]['share_of_copy']:.0%}"]
        rows.append(cells)
    return table(("preset", "time", "share of copy", "with a key mean", "share of copy"), rows)


def printed(kind: str, name: str) -> Callable[[], str]:
    """What a command prints of a file; `kind` is a function of outputs.py, which needs turboquant-hf."""

    def shown() -> str:
        import outputs

        return str(getattr(outputs, kind)(RESULTS / f"{name}.json"))

    return shown


def tune_spread() -> str:
    """How many times as much 3 bits in the keys of one layer cost as in those of another."""
    units = result("tune_run_smollm2")["results"].items()
    costs = [layer["keys"] for name, layer in units if re.fullmatch(r"layer/\d+/3", name)]
    return f"{max(costs) / min(costs):.0f}"


def engine_centring() -> str:
    """What centring does to Qwen2.5-Coder-1.5B in vLLM."""
    scores = result("engine_centring_qwen2.5-coder-1.5b")["scores"]
    shown = {
        "uncompressed": "uncompressed",
        "means of the texts that ship": "less the means of the texts that ship",
        "means of a calibration file": "less the means of a calibration file, from the text that follows",
        "not centred": "not centred",
    }
    rows = []
    for name, label in shown.items():
        if name not in scores:
            continue
        score = scores[name]
        compared = [nats(score["mean_kl"]), percent(score["top_1_agreement"])] if name != "uncompressed" else ["", ""]
        rows.append([label, _ppl(score), *compared])
    return table(("keys", "perplexity", "KL, nats per token", "same likeliest token"), rows)


def tune() -> str:
    """What bits that were chosen layer by layer give beside uniform ones."""
    rows = []
    for name, model in (("smollm2", "SmolLM2-135M"), ("qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B")):
        files = [result(path.stem) for path in RESULTS.glob(f"tune_{name}_*.json")]
        for found in sorted(files, key=lambda found: float(found["target_bits"])):
            tuned, *uniform = found["held_out"]
            best = uniform[0]
            rows.append(
                [
                    model,
                    f"{found['target_bits']:g}",
                    f"{tuned['token_nbytes']:,}",
                    bold_if(found["is_better"], nats(tuned["mean_kl"])),
                    f"{nats(best['mean_kl'])} ({best['bits']})",
                    f"{tuned['mean_kl'] / best['mean_kl'] - 1:+.0%}",
                    f"{percent(tuned['top1_agreement'])}, {percent(best['top1_agreement'])}",
                ]
            )
    columns = ("model", "target", "bytes / token", "tuned: KL (nats)", "best uniform: KL (bits)", "", "top-1, both")
    return table(columns, rows)


def output_error() -> str:
    """What bits give that were chosen by the error of each layer's attention output."""
    rows = [
        [
            f"{row['target_bits']:g}",
            nats(row["mean_kl"]),
            "{} ({}/{})".format(nats(row["uniform_mean_kl"]), *row["uniform_bits"]),
        ]
        for row in result("output_error_smollm2")["targets"]
    ]
    return table(("target", "chosen by output error: KL (nats)", "uniform: KL (bits)"), rows)


def _shapes() -> list[tuple[int, int]]:
    return sorted(((batch, context) for batch, context in result("engine")["shapes"]), key=lambda at: _step("tq4", at))


def _is_fastest(name: str, shape: Sequence[int]) -> bool:
    return _step(name, shape) == min(_step(other, shape) for other in ENGINE_CACHES)


def _step_text(name: str, shape: Sequence[int]) -> str:
    return f"{_step(name, shape):.2f} ms"


def _step(name: str, shape: Sequence[int]) -> float:
    return float(_measured(name, shape)["decode_step_ms"])


def _prefill(name: str, shape: Sequence[int]) -> float:
    return float(_measured(name, shape)["prefill_s"])


def _measured(name: str, shape: Sequence[int]) -> Any:
    steps = result("engine")["caches"][name]["steps"]
    return next(step for step in steps if [step["batch"], step["context"]] == list(shape))


def _tokens(name: str) -> int:
    return int(result("engine")["caches"][name]["kv_tokens"])


def _shape(shape: Sequence[int]) -> str:
    return f"{shape[0]} × {shape[1]:,}"


def _ppl(score: Any) -> str:
    return f"{score['perplexity']:.2f}"


BUSY, LONG = (64, 8192), (16, 16_384)
FIGURES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "demo-speed": demo_speed,
    "demo-seconds": demo_seconds,
    "engine": engine,
    "engine-steps": engine_steps,
    "engine-prefill": engine_prefill,
    "engine-tokens": engine_tokens,
    "tokens-ratio": engine_ratio(_tokens, "tq4", "bf16"),
    "fp8-tokens-ratio": engine_ratio(_tokens, "fp8", "bf16"),
    "step-bf16": engine_ratio(lambda name: _step(name, BUSY), "bf16", "tq4"),
    "step-fp8": engine_ratio(lambda name: _step(name, BUSY), "fp8", "tq4"),
    "long-step-bf16": engine_ratio(lambda name: _step(name, LONG), "bf16", "tq4"),
    "prefill-bf16": engine_ratio(lambda name: _prefill(name, LONG), "bf16", "tq4"),
    "fp8-long-step-bf16": engine_ratio(lambda name: _step(name, LONG), "bf16", "fp8"),
    "fp8-prefill-bf16": engine_ratio(lambda name: _prefill(name, LONG), "bf16", "fp8"),
    "kernel-bf16": kernel_ratio(32, 32_768, "fa3_bf16"),
    "kernel-fp8": kernel_ratio(32, 32_768, "fa3_fp8"),
    "kernel-alone-bf16": kernel_ratio(1, 32_768, "fa3_bf16"),
    "fp8-kernel-bf16": kernel_ratio(32, 32_768, "fa3_bf16", "fa3_fp8"),
    "fp8-kernel-alone-bf16": kernel_ratio(1, 32_768, "fa3_bf16", "fa3_fp8"),
    "update-share": update_share,
    "qwen-ppl": perplexity_increase("centred"),
    "qwen-ppl-plain": perplexity_increase("not centred"),
    "presets-64": presets("side_by_side_smollm2"),
    "presets-128": presets("side_by_side_qwen2.5-coder-1.5b"),
    "peers": peers,
    "caches-64": side_by_side("side_by_side_smollm2"),
    "caches-128": side_by_side("side_by_side_qwen2.5-coder-1.5b"),
    "lifecycle": lifecycle,
    "kept-tokens": kept_tokens,
    "left-padding": left_padding,
    "engine-centring": engine_centring,
    "eval": printed("evaluation", "eval_smollm2"),
    "eval-card": printed("card_table", "eval_smollm2"),
    "tune-output": printed("tuning", "tune_smollm2_3.5"),
    "tune-spread": tune_spread,
    "tune": tune,
    "output-error": output_error,
    "centring": centring,
    "scale-rules": scale_rules,
    "left-out": left_out,
    "decode-attention": decode_attention,
    "cache-update": cache_update,
    "engine-serving": engine_serving("engine_serving", ENGINE_CACHES),
    "engine-serving-tq4": engine_serving("engine_serving_tq4", ["tq4"]),
    "hf-decode": hf_decode(compiled=False),
    "hf-decode-compiled": hf_decode(compiled=True),
    "hf-compiled-static": hf_ratio("tq4, static, compiled", "StaticCache, sdpa, compiled"),
    "hf-compiled-flash": hf_ratio("tq4, static, compiled", "DynamicCache, sdpa's flash"),
    "hf-eager-sdpa": hf_ratio("TurboQuantCache tq4, fused", "DynamicCache, sdpa"),
    "hf-eager-flash": hf_ratio("TurboQuantCache tq4, fused", "DynamicCache, sdpa's flash"),
}


def filled(text: str) -> str:
    """A page with the figures of now."""

    def figure(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if ":" in name:
            return f"{begin}{of_cache(name)}{end}"
        if name not in FIGURES:
            raise SystemExit(f"there is no figure {name}; there are {', '.join(FIGURES)}")
        return f"{begin}{FIGURES[name]()}{end}"

    if misplaced := BEGINS_A_LINE.search(text):
        raise SystemExit(f"the figure {misplaced[1]} begins a line of text; put a word before it")
    return PLACE.sub(figure, text)


def checksum(name: str) -> str:
    """What a plot carries of a file it was drawn from."""
    return f"{name} {sha256((RESULTS / name).read_bytes()).hexdigest()[:12]}"


def stale_plots() -> Iterator[Path]:
    """Plots that were drawn from other files than those that are there."""
    for plot in sorted((ROOT / "docs" / "assets").glob("*.svg")):
        source = DRAWN_FROM.search(plot.read_text(encoding="utf-8"))
        entries = [entry.strip() for entry in source[1].split(",")] if source else []
        if any(entry != checksum(entry.split()[0]) for entry in entries):
            yield plot


def main() -> None:
    """Write the figures, or check them."""
    is_check = sys.argv[1:] == ["--check"]
    stale = list(stale_plots())
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        now = filled(text)
        if now != text and is_check:
            stale.append(page)
        elif now != text:
            page.write_text(now, encoding="utf-8")
    if stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        raise SystemExit(f"not of benchmarks/results as it is: {names}. Run `nox -s figures`.")


if __name__ == "__main__":
    main()
