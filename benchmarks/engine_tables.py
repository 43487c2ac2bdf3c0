"""The results of bench_engine.py as tables."""

from collections.abc import Callable, Iterable
from typing import Any

from figure_text import bold_if, shape, table
from results_file import read_result

LABELS = {"bf16": "bf16, FlashAttention 3", "fp8": "fp8, FlashAttention 3", "tq4": "`tq4`"}
"""Cache to what it is called."""

FIDELITY = {
    "tq4, codes only": "codes alone",
    "tq4": "with raw tokens",
    "tq4, calibration file": "with raw tokens and a calibration file",
}
"""Cache to what it is called among `tq4`'s own."""

Shape = tuple[int, int]
BUSY: Shape = (64, 8192)
LONG: Shape = (16, 16_384)
LONGEST: Shape = (4, 65_536)


def overview() -> str:
    """Decode steps, prefill and tokens, a row for each cache."""
    shapes = shapes_of_all()[::-1]
    columns = [
        "KV cache",
        f"decode step, {shape(*shapes[0])}",
        *(shape(*at) for at in shapes[1:]),
        f"prefill, {shape(*LONG)}",
        "tokens that fit",
    ]
    rows = []
    for name, label in LABELS.items():
        steps = [bold_if(name == "tq4" and _is_fastest(name, at), _step_text(name, at)) for at in shapes]
        rows.append([label, *steps, f"{prefill(name, LONG):.2f} s", bold_if(name == "tq4", f"{tokens(name):,}")])
    return table(columns, rows)


def steps() -> str:
    """Decode steps, a row for each shape."""
    rows = []
    for at in shapes_of_all():
        bf16, fp8, ours = (_step_text(name, at) for name in LABELS)
        ratios = [f"{step(peer, at) / step('tq4', at):.2f}x" for peer in ("bf16", "fp8")]
        rows.append([shape(*at), bf16, fp8, bold_if(_is_fastest("tq4", at), ours), *ratios])
    columns = ("batch × context", "decode step: bf16", "fp8", "tq4", "tq4 against bf16", "against fp8")
    return table(columns, rows)


def prefills() -> str:
    """Prefill, a row for each shape."""
    rows = [[shape(*at), *(f"{prefill(name, at):.2f} s" for name in LABELS)] for at in shapes_of_all()]
    return table(("batch × context", "prefill: bf16", "fp8", "tq4"), rows)


def capacity() -> str:
    """KV tokens that vLLM reports."""
    counts = [f"{tokens(name):,}" for name in LABELS]
    ratios = [f"{tokens(name) / tokens('bf16'):.2f}x" for name in LABELS]
    return table(("", *LABELS), [["KV tokens that vLLM reports", *counts], ["against bf16", *ratios]])


def fidelity() -> str:
    """Decode steps with raw tokens and a calibration file, beside codes alone."""
    caches = read_result("engine_fidelity")["caches"]
    plain = {_at(row): row["decode_step_ms"] for row in caches["tq4, codes only"]["steps"]}
    rows = []
    for name, measured in caches.items():
        steps = {_at(row): row["decode_step_ms"] for row in measured["steps"]}
        rows.append([FIDELITY[name], *(f"{steps[at]:.2f} ms, {steps[at] / plain[at]:.2f}x" for at in plain)])
    return table(("`tq4`", *(f"decode step, {shape(*at)}" for at in plain)), rows)


def serving(name: str, caches: Iterable[str]) -> Callable[[], str]:
    """Conversations that come back, under load."""

    def text() -> str:
        rows = [
            [
                LABELS[cached] if number == 1 else "",
                str(number),
                f"{row['cached_share_of_prompts']:.0%}",
                f"{row['requests_per_s']:.1f}",
                f"{row['ttft_ms']['median']:,.0f} ms",
                f"{row['tpot_ms']['median']:.1f} ms",
            ]
            for cached in caches
            for number, row in enumerate(read_result(name)["caches"][cached]["serving"], 1)
        ]
        return table(("cache", "round", "of prompts cached", "requests/s", "TTFT, median", "TPOT, median"), rows)

    return text


def ratio(measure: Callable[[str], float], dividend: str, divisor: str) -> Callable[[], str]:
    """How many times as large a figure is in one cache as in another."""
    return lambda: f"{measure(dividend) / measure(divisor):.2f}"


def step(name: str, at: Shape) -> float:
    """Milliseconds of a decode step."""
    return float(_measured(name, at)["decode_step_ms"])


def prefill(name: str, at: Shape) -> float:
    """Seconds of prefill."""
    return float(_measured(name, at)["prefill_s"])


def tokens(name: str) -> int:
    """KV tokens that vLLM reports."""
    return int(read_result("engine")["caches"][name]["kv_tokens"])


def shapes_of_all() -> list[Shape]:
    """Those that every cache was measured at."""
    measured = [{_at(row) for row in read_result("engine")["caches"][name]["steps"]} for name in LABELS]
    return sorted(set.intersection(*measured), key=lambda at: step("tq4", at))


def _at(row: Any) -> Shape:
    return row["batch"], row["context"]


def _is_fastest(name: str, at: Shape) -> bool:
    return step(name, at) == min(step(other, at) for other in LABELS)


def _step_text(name: str, at: Shape) -> str:
    return f"{step(name, at):.2f} ms"


def _measured(name: str, at: Shape) -> Any:
    measured = read_result("engine")["caches"][name]["steps"]
    return next(step for step in measured if _at(step) == at)


FIGURES = {
    "engine": overview,
    "engine-steps": steps,
    "engine-prefill": prefills,
    "engine-fidelity": fidelity,
    "engine-tokens": capacity,
    "engine-serving": serving("engine_serving", LABELS),
    "engine-serving-tq4": serving("engine_serving_tq4", ["tq4"]),
    "tokens-ratio": ratio(tokens, "tq4", "bf16"),
    "fp8-tokens-ratio": ratio(tokens, "fp8", "bf16"),
    "step-bf16": ratio(lambda name: step(name, BUSY), "bf16", "tq4"),
    "step-fp8": ratio(lambda name: step(name, BUSY), "fp8", "tq4"),
    "longest-step": lambda: _step_text("tq4", LONGEST),
    "longest-step-fp8": ratio(lambda name: step(name, LONGEST), "fp8", "tq4"),
    "long-step-bf16": ratio(lambda name: step(name, LONG), "bf16", "tq4"),
    "prefill-bf16": ratio(lambda name: prefill(name, LONG), "bf16", "tq4"),
    "fp8-long-step-bf16": ratio(lambda name: step(name, LONG), "bf16", "fp8"),
    "fp8-prefill-bf16": ratio(lambda name: prefill(name, LONG), "bf16", "fp8"),
}
