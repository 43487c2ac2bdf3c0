"""The command line of the demo."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from turboquant_hf.command_line import check_target, fail, load_or_fail
from turboquant_hf.demo.render import render
from turboquant_hf.demo.run import CHUNK_SIZE, encode_long_prompt, num_steps, run_demo
from turboquant_hf.models import LoadedModel, default_model


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or GGUF file. Default: SmolLM2-135M-Instruct."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write answers and figures to this file too.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device. Default: cuda where there is one, else cpu.")
    ] = None,
) -> None:
    """Generate from compressed caches, beside the uncompressed one, and measure the difference."""
    console, errors = Console(), Console(stderr=True)
    if json_file is not None:
        check_target(json_file, errors)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_or_fail(model or default_model(), device, errors, argument="--model")
    long_ids = encode_long_prompt(loaded)
    _check_fits(loaded, long_ids.shape[1], errors)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("generating and scoring", total=num_steps(long_ids.shape[1]))
        result = run_demo(loaded, long_ids, on_step=lambda: progress.advance(task))
    render(result, console)
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")


def _check_fits(loaded: LoadedModel, num_tokens: int, errors: Console) -> None:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if num_tokens <= CHUNK_SIZE + 2:
        fail(errors, f"the prompt has only {num_tokens} tokens with this tokenizer")
    if limit is not None and limit < num_tokens:
        fail(
            errors,
            f"{loaded.name} takes {limit} tokens and the demo's long prompt has {num_tokens}. Pass a model with a "
            "longer context.",
        )
