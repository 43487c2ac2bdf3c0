"""Perplexity and KL in vLLM: keys centred by the texts that ship, by a calibration file, not at all; and codes only.

Needs vLLM, with or without a GPU, and the plugin. A text is prefilled in chunks, each of which reads the codes of those
before it; the calibration file is made from the text that follows.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from figure_text import nats, percent, perplexity, table
from results_file import read_result, write_result
from side_by_side.weights import file_stem, find_model
from turboquant_core.calibration import write_calibration
from turboquant_hf.scoring import kl_divergence
from turboquant_hf.tools.article import article
from turboquant_hf.tools.calibrate.measure import measure
from turboquant_hf.tools.calibrate.texts import split_tokens
from turboquant_hf.tools.models import load_model

CALIBRATION_TOKENS = 2048


def prepare(model: str, num_tokens: int, folder: Path) -> tuple[list[int], int]:
    """Write the model as vLLM loads it and its calibration into a folder.

    Returns:
        The tokens to score, and how many the calibration was measured on.
    """
    loaded = load_model(find_model(model), "cpu")
    input_ids = loaded.tokenizer(article(), return_tensors="pt")["input_ids"]
    calibration = measure(loaded, *split_tokens([input_ids[0, num_tokens:]], CALIBRATION_TOKENS)).calibration
    write_calibration(folder / "calibration.safetensors", calibration)
    if hasattr(loaded.model.config, "quantization_config"):
        del loaded.model.config.quantization_config
    loaded.model.save_pretrained(folder / "model")
    return input_ids[0, :num_tokens].tolist(), calibration.num_tokens


def engines(preset: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The engines to score with, uncompressed first."""

    def turboquant(**settings: Any) -> dict[str, Any]:
        return {"attention_backend": "CUSTOM", "additional_config": {"turboquant": {"preset": preset, **settings}}}

    calibration, codes_only = str(folder / "calibration.safetensors"), {"sink_tokens": 0, "recent_tokens": 0}
    return {
        "uncompressed": {},
        "means of the texts that ship": turboquant(),
        "means of a calibration file": turboquant(calibration=calibration),
        "not centred": turboquant(center_keys=False),
        "codes only, means of the texts that ship": turboquant(**codes_only),
        "codes only, means of a calibration file": turboquant(calibration=calibration, **codes_only),
    }


def logprobs(request: dict[str, Any], folder: Path) -> torch.Tensor:
    """The logprobs of every next token by an engine in a process of its own.

    Raises:
        SystemExit: With what it printed, if it fails.
    """
    answer = folder / "logprobs.safetensors"
    command = [sys.executable, str(Path(__file__).with_name("engine_score.py")), json.dumps(request), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return load_file(answer)["logprobs"]


LABELS = {
    "uncompressed": "uncompressed",
    "means of the texts that ship": "less the means of the texts that ship",
    "means of a calibration file": "less the means of a calibration file, from the text that follows",
    "not centred": "not centred",
    "codes only, means of the texts that ship": "codes only, less the means of the texts that ship",
    "codes only, means of a calibration file": "codes only, by a calibration file",
}


def scores_table(scores: Mapping[str, Any]) -> str:
    """What centring does to a model in vLLM."""
    rows = []
    for name, label in LABELS.items():
        if name not in scores:
            continue
        score = scores[name]
        compared = [nats(score["mean_kl"]), percent(score["top_1_agreement"])] if name != "uncompressed" else ["", ""]
        rows.append([label, perplexity(score), *compared])
    return table(("keys", "perplexity", "KL, nats per token", "same likeliest token"), rows)


def _scores(name: str) -> Callable[[], str]:
    return lambda: scores_table(read_result(f"engine_centring_{name}")["scores"])


def _kl(engine: str) -> Callable[[], str]:
    return lambda: nats(read_result("engine_centring_smollm2")["scores"][engine]["mean_kl"])


FIGURES = {
    "engine-centring": _scores("qwen2.5-coder-1.5b"),
    "engine-raw-tq4": _scores("smollm2"),
    "engine-raw-tq3": _scores("smollm2_tq3"),
    "engine-raw-kl": _kl("means of the texts that ship"),
    "engine-codes-kl": _kl("codes only, means of the texts that ship"),
}


def main() -> None:
    """Score, print, and write results/engine_centring_MODEL.json, with the preset behind the name if it is not tq4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen2.5-coder-1.5b, hub id, folder or GGUF file")
    parser.add_argument("--preset", default="tq4")
    parser.add_argument("--num-tokens", type=int, default=512)
    parser.add_argument("--chunk-size", type=int, default=64)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    scores: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens, calibration_tokens = prepare(arguments.model, arguments.num_tokens, folder)
        gc.collect()
        next_tokens = torch.tensor(tokens[1:])[:, None]
        expected = None
        for name, engine in engines(arguments.preset, folder).items():
            request = {
                "model": str(folder / "model"),
                "tokens": tokens,
                "chunk_size": arguments.chunk_size,
                "engine": {"dtype": dtype, **engine},
            }
            found = logprobs(request, folder)
            expected = found if expected is None else expected
            scores[name] = {
                "perplexity": (-found.gather(1, next_tokens).mean()).exp().item(),
                "mean_kl": kl_divergence(expected, found).mean().item(),
                "top_1_agreement": (expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
            }
            print(name, flush=True)
    print(scores_table(scores))
    data = {**vars(arguments), "dtype": dtype, "calibration_tokens": calibration_tokens, "scores": scores}
    preset = "" if arguments.preset == "tq4" else f"_{arguments.preset}"
    write_result(f"engine_centring_{file_stem(arguments.model)}{preset}", data)


if __name__ == "__main__":
    main()
