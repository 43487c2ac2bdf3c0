"""Draw docs/assets/decode_attention.svg from benchmarks/results/decode_attention.json."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

from results_file import RESULTS

PLOT = Path(__file__).parent.parent / "docs" / "assets" / "decode_attention.svg"
BATCH = 32
SERIES = {
    "turboquant tq4": ("tq4", "o-", 132),
    "FlashAttention 3, bf16": ("fa3_bf16_ms", "s-", 512),
    "FlashAttention 3, fp8": ("fa3_fp8_ms", "^-", 256),
    "vLLM turboquant_4bit_nc": ("vllm_turboquant_4bit_nc_ms", "v:", 136),
}


def milliseconds(row: dict[str, Any], key: str) -> float:
    """The time of one series in a row."""
    return float(row[key]["ms"] if key == "tq4" else row[key])


def main() -> None:
    """Time, and share of copy bandwidth, against context length."""
    result = json.loads((RESULTS / "decode_attention.json").read_text(encoding="utf-8"))
    rows = sorted((row for row in result["contexts"] if row["batch"] == BATCH), key=lambda row: row["context"])
    contexts = [row["context"] for row in rows]
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "turboquant"
    from matplotlib import pyplot as plt

    figure, (time, share) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for label, (key, style, slot_bytes) in SERIES.items():
        times = [milliseconds(row, key) for row in rows]
        tokens = [row["batch"] * row["context"] * result["shape"]["num_kv_heads"] for row in rows]
        moved = [count * slot_bytes / (ms * 1e-3) for count, ms in zip(tokens, times, strict=True)]
        time.plot(contexts, times, style, label=label)
        share.plot(contexts, [100 * rate / result["copy_bytes_per_s"] for rate in moved], style, label=label)
    time.set(xscale="log", yscale="log", xlabel="tokens in each row", ylabel="milliseconds")
    share.set(xscale="log", xlabel="tokens in each row", ylabel="% of copy bandwidth over its own bytes", ylim=(0, 110))
    for axes in (time, share):
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.minorticks_off()
    time.legend(fontsize="small")
    figure.suptitle(f"Paged decode attention, {BATCH} rows, on {result['made_by']['device']}")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
