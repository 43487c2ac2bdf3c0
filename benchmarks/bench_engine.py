"""Decode step, prefill, capacity and serving under load in vLLM: compressed pages against bf16 and fp8, on a GPU.

Needs vLLM, the plugin and pytest installed. Nothing is timed unless some of the tests of prefill and of decode
attention, those in `GATE`, pass on this GPU first. Each part has a file of results of its own, written anew after every
engine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gate import needs_gpu
from results_file import write_result

ROOT = Path(__file__).parent.parent
CACHES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "tq4": {"attention_backend": "CUSTOM"},
    "tq4, codes only": {
        "attention_backend": "CUSTOM",
        "additional_config": {"turboquant": {"sink_tokens": 0, "recent_tokens": 0}},
    },
    "tq4, calibration file": {"attention_backend": "CUSTOM"},
    "k8v4": {"attention_backend": "CUSTOM", "additional_config": {"turboquant": {"preset": "k8v4"}}},
}
CALIBRATED = ("tq4, calibration file",)
SHAPES = [(16, 16384), (1, 32768), (32, 4096), (64, 8192), (4, 65536)]
# 1,152,000 tokens of prefixes: more than an H200 holds beside this model in bf16, less than in the others.
LOAD = {"conversations": 72, "prefix": 16000, "question": 64, "answer": 64, "rounds": 2, "concurrency": 16}
# The names of results.
PARTS = {"steps": "engine", "serving": "engine_serving"}
MEMORY = {"gpu_memory_utilization": 0.88}
GATE = {
    "packages/turboquant-vllm/tests/test_prefill.py": "own_tokens and (mixed or context)",
    "packages/turboquant-core/tests/ops/test_raw_copies.py": "newest",
    "packages/turboquant-core/tests/ops/test_decode_attention.py": "every_option and fragment and (tile or mean)",
}


def run_gate() -> dict[str, str]:
    """Test on this GPU what is about to be timed.

    Raises:
        SystemExit: If a test fails.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    running = {
        path: subprocess.Popen(
            [*command, path, "-k", chosen], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for path, chosen in GATE.items()
    }
    passed = {}
    for path, process in running.items():
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"not timed: {path} fails\n{printed[-4000:]}")
        passed[path] = printed.strip().splitlines()[-1]
    return passed


def run_engine(cache: str, parts: list[str], shapes: list[tuple[int, int]], folder: Path) -> dict[str, Any] | None:
    """Measure one engine in a process of its own; what it printed, and what it measured till then, if it fails."""
    answer = folder / f"{cache}.json"
    answer.unlink(missing_ok=True)
    request = json.dumps(
        {
            "parts": parts,
            "shapes": shapes,
            "load": LOAD,
            "engine": {**CACHES[cache], **MEMORY},
            "calibrated": cache in CALIBRATED,
        }
    )
    script = str(Path(__file__).with_name("engine_run.py"))
    with (folder / f"{cache}.log").open("w+") as log:
        done = subprocess.run([sys.executable, script, request, str(answer)], stdout=log, stderr=log, check=False)
        if done.returncode:
            log.seek(0)
            print(f"{cache} failed:\n{log.read()[-4000:]}", flush=True)
    return json.loads(answer.read_text()) if answer.exists() else None


def describe(cache: str, measured: dict[str, Any]) -> str:
    """A line for the capacity, each shape and each round."""
    lines = [f"{cache}: {measured['kv_tokens']:,} KV tokens"]
    lines += [
        f"  {row['batch']} x {row['context']}: step {row['decode_step_ms']:.2f} ms, prefill {row['prefill_s']:.2f} s"
        for row in measured.get("steps", ())
    ]
    lines += [
        f"  round {index + 1}: {row['requests_per_s']:.2f} requests/s, TTFT {row['ttft_ms']['median']:.0f} ms, "
        f"TPOT {row['tpot_ms']['median']:.2f} ms, {row['cached_share_of_prompts']:.0%} of prompts cached"
        for index, row in enumerate(measured.get("serving", ()))
    ]
    return "\n".join(lines)


def write_part(part: str, suffix: str, gate: dict[str, str], caches: dict[str, Any]) -> None:
    """Write what was measured for one part, of the engines that have it."""
    name = PARTS[part] + suffix
    rows = {
        cache: {"kv_tokens": measured["kv_tokens"], part: measured[part]}
        for cache, measured in caches.items()
        if part in measured
    }
    measures = {"load": LOAD} if part == "serving" else {}
    write_result(name, {"gate": gate, **measures, "caches": rows})


def main() -> None:
    """Test, measure, print, and with --json keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["bf16", "fp8", "tq4"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/engine.json, engine_serving.json")
    parser.add_argument("--num-shapes", type=int, default=len(SHAPES), help="time steps of the first so many shapes")
    parser.add_argument("--suffix", default="", help="behind the names of results")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    arguments = parser.parse_args()
    needs_gpu("engines")
    gate = run_gate()
    print(gate, flush=True)
    caches: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.logs or Path(temporary)
        folder.mkdir(exist_ok=True)
        for cache in arguments.caches:
            measured = run_engine(cache, arguments.parts, SHAPES[: arguments.num_shapes], folder)
            if measured is not None:
                caches[cache] = measured
                print(describe(cache, measured), flush=True)
            for part in arguments.parts if arguments.json else ():
                write_part(part, arguments.suffix, gate, caches)


if __name__ == "__main__":
    main()
