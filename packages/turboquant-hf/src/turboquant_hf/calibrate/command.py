"""The command line of `turboquant calibrate`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from turboquant_core.calibration import write_key_means
from turboquant_hf.calibrate.run import mean_keys, num_chunks
from turboquant_hf.command_line import (
    DeviceOption,
    ModelArgument,
    TextOption,
    check_target,
    chosen_device,
    fail,
    load_or_fail,
    progress_bar,
    text_or_fail,
)
from turboquant_hf.json_output import STDOUT, JsonOption, check_json_target, write_json
from turboquant_hf.models import LoadedModel

# A mean of fewer says little about the next text.
MIN_TOKENS = 256


def calibrate(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("turboquant.safetensors"),
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(min=MIN_TOKENS, help="Tokens to take from the text at most.")] = 4096,
    json_target: JsonOption = None,
    device: DeviceOption = None,
) -> None:
    """Write the mean key of every layer to a file that vLLM loads, so that all processes centre keys alike."""
    console, errors = Console(), Console(stderr=True)
    check_target(out, errors)
    check_json_target(json_target, errors)
    content = text_or_fail(text, errors)
    loaded = load_or_fail(model, chosen_device(device), errors)
    input_ids = _encode(loaded, content, tokens, errors)
    with progress_bar(errors) as progress:
        task = progress.add_task("running the model", total=num_chunks(input_ids.shape[1]))
        key_means = mean_keys(loaded, input_ids, on_forward=lambda: progress.advance(task))
    write_key_means(out, key_means)
    if json_target is not None:
        layers = {str(index): list(mean.shape) for index, mean in key_means.means.items()}
        found = {"file": str(out), "model": loaded.name, "num_tokens": key_means.num_tokens, "layers": layers}
        write_json(found, json_target)
    if json_target != STDOUT:
        console.print(
            f"{out}: key means of {len(key_means.means)} layers of {loaded.name}, over {key_means.num_tokens:,} tokens",
            highlight=False,
            soft_wrap=True,
        )


def _encode(loaded: LoadedModel, text: str, tokens: int, errors: Console) -> torch.Tensor:
    """The first tokens of a text that fit into the model's context, int64 [1, num_tokens]."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or tokens
    input_ids: torch.Tensor = loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, : min(tokens, limit)]
    if input_ids.shape[1] < MIN_TOKENS:
        fail(
            errors,
            f"the text has {input_ids.shape[1]} tokens that {loaded.name} can take; means need {MIN_TOKENS}. Pass "
            "--text with a longer one.",
        )
    return input_ids
