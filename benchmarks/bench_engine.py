"""Decode step, prefill, capacity and serving under load in vLLM: compressed pages against bf16 and fp8, on a GPU.

Needs vLLM and the plugin installed. Nothing is timed unless the plugin's own tests of prefill and of decode attention
pass on this GPU first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from results_file import write_result

ROOT = Path(__file__).parent.parent
CACHES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "tq4": {"attention_backend": "CUSTOM"},
    "k8v4": {"attention_backend": "CUSTOM", "additional_config": {"turboquant": {"preset": "k8v4"}}},
}
SHAPES = [(16, 16384), (1, 32768), (32, 4096), (64, 8192)]
MEMORY = {"gpu_memory_utilization": 0.88}
# 576,000 tokens of prefixes: more than 24 GiB hold in bf16 (196,608) and fp8 (393,216), less than in tq4 (762,600).
LOAD = {"conversations": 36, "prefix": 16000, "question": 64, "answer": 64, "rounds": 3, "concurrency": 16}
LOAD_MEMORY = {"kv_cache_memory_bytes": 24 * 2**30}
GATE = {
    "packages/turboquant-vllm/tests/test_prefill.py": "stored_context_and_own_tokens",
    "packages/turboquant-core/tests/ops/test_decode_attention.py": "test_every_option_is_more_accurate and fragment",
}


def run_gate() -> dict[str, str]:
    """Test on this GPU what is about to be timed.

    Raises:
        SystemExit: If a test fails.
    """
    passed = {}
    for path, chosen in GATE.items():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, "-k", chosen]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"not timed: {path} fails\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
        passed[path] = done.stdout.strip().splitlines()[-1]
    return passed


def run_engine(cache: str, measure: str, load: object, memory: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Measure one engine in a process of its own; None, and what it printed, if it fails."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    request = json.dumps({"measure": measure, "load": load, "engine": {**CACHES[cache], **memory}})
    script = str(Path(__file__).with_name("engine_run.py"))
    with (folder / f"{measure}-{cache}.log").open("w+") as log:
        subprocess.run([sys.executable, script, request, str(answer)], stdout=log, stderr=log, check=False)
        if answer.exists():
            measured: dict[str, Any] = json.loads(answer.read_text())
            return measured
        log.seek(0)
        print(f"{measure} {cache} failed:\n{log.read()[-4000:]}", flush=True)
    return None


def describe_steps(caches: dict[str, Any]) -> list[str]:
    """The table, a line for each batch x context."""
    lines = [f"{cache}: {measured['kv_tokens']:,} KV tokens" for cache, measured in caches.items()]
    for index, (batch, context) in enumerate(SHAPES):
        rows = {cache: measured["rows"][index] for cache, measured in caches.items()}
        parts = [f"{cache} {row['decode_step_ms']:.2f} ms, {row['prefill_s']:.2f} s" for cache, row in rows.items()]
        lines.append(f"{batch} x {context}: {'; '.join(parts)}")
    return lines


def describe_serving(caches: dict[str, Any]) -> list[str]:
    """A line for each round of each cache."""
    return [
        f"{cache}, round {index + 1}: {row['requests_per_s']:.2f} requests/s, TTFT {row['ttft_ms']['median']:.0f} ms, "
        f"TPOT {row['tpot_ms']['median']:.2f} ms, {row['cached_share_of_prompts']:.0%} of prompts cached"
        for cache, measured in caches.items()
        for index, row in enumerate(measured["rounds"])
    ]


def main() -> None:
    """Test, measure, print, and with --json keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["steps", "serving"])
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["bf16", "fp8", "tq4"])
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/engine_MEASURE.json")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: this benchmark times engines on one")
    gate = run_gate()
    print(gate, flush=True)
    load, memory = (SHAPES, MEMORY) if arguments.measure == "steps" else (LOAD, LOAD_MEMORY)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.logs or Path(temporary)
        folder.mkdir(exist_ok=True)
        caches = {}
        for cache in arguments.caches:
            measured = run_engine(cache, arguments.measure, load, memory, folder)
            if measured is not None:
                caches[cache] = measured
                describe = describe_steps if arguments.measure == "steps" else describe_serving
                print("\n".join(describe({cache: measured})), flush=True)
    if arguments.json:
        print(write_result(f"engine_{arguments.measure}", {"gate": gate, "load": load, "caches": caches}))


if __name__ == "__main__":
    main()
