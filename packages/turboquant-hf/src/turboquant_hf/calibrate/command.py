"""The command line of `turboquant calibrate`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from turboquant_core.calibration import write_key_means
from turboquant_hf.calibrate.run import mean_keys
from turboquant_hf.command_line import check_target, fail, load_or_fail, read_text_or_fail
from turboquant_hf.demo.run import long_text
from turboquant_hf.models import LoadedModel

# A mean of fewer says little about the next text.
MIN_TOKENS = 256


def calibrate(
    model: Annotated[str, typer.Argument(help="Hub id, folder or GGUF file.")],
    out: Annotated[Path, typer.Option(help="File to write, such as turboquant.safetensors.")],
    text: Annotated[
        Path | None, typer.Option(help="Text file, UTF-8. Default: an encyclopaedia article of 3,000 tokens.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=MIN_TOKENS, help="Tokens to take from the text at most.")] = 4096,
    device: Annotated[
        str | None, typer.Option(help="torch device. Default: cuda where there is one, else cpu.")
    ] = None,
) -> None:
    """Write the mean key of every layer to a file that vLLM loads, so that all processes centre keys alike."""
    console, errors = Console(), Console(stderr=True)
    check_target(out, errors)
    content = long_text() if text is None else read_text_or_fail(text, errors)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_or_fail(model, device, errors, argument="MODEL")
    input_ids = _encode(loaded, content, tokens, errors)
    with errors.status("running the model"):
        key_means = mean_keys(loaded, input_ids)
    write_key_means(out, key_means)
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
