"""The command line of `turboquant calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant_core.command_options import MAX_TOKENS, DeviceOption, ForceOption, JsonOption, ModelArgument, TextOption
from turboquant_core.command_output import STDOUT, CommandError, Output, check_outputs, json_output, write_json

if TYPE_CHECKING:
    import torch

    from turboquant_hf.tools.models import LoadedModel

# A mean of fewer says little about the next text.
MIN_TOKENS = 256


def calibrate(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("turboquant.safetensors"),
    text: TextOption = None,
    tokens: Annotated[
        int, typer.Option(min=MIN_TOKENS, max=MAX_TOKENS, help="Tokens to take from the text at most.")
    ] = 4096,
    force: ForceOption = False,
    json_target: JsonOption = None,
    device: DeviceOption = None,
) -> None:
    """Write the mean key of every layer to a file that vLLM loads, so that all processes centre keys alike."""
    from turboquant_core.calibration import FORMAT, write_calibration
    from turboquant_hf.tools.calibrate.mean_keys import mean_keys, num_chunks
    from turboquant_hf.tools.inputs import chosen_device, load, read_text
    from turboquant_hf.tools.terminal import Steps, consoles

    console, errors = consoles()
    outputs = [Output("--out", out, f'"format":"{FORMAT}"'), json_output("calibrate", json_target)]
    check_outputs(outputs, {"MODEL": model, "--text": text}, force=force)
    content = read_text(text)
    loaded = load(model, chosen_device(device), errors)
    input_ids = _encode(loaded, content, tokens)
    with Steps(errors, "running the model", num_chunks(input_ids.shape[1])) as steps:
        calibration = mean_keys(loaded, input_ids, on_forward=steps.done)
    # Another program may have written there meanwhile.
    check_outputs(outputs, {"MODEL": model, "--text": text}, force=force)
    write_calibration(out, calibration)
    means = {index: transform.tensors()["key_mean"] for index, transform in calibration.layers.items()}
    layers = {str(index): list(mean.shape) for index, mean in means.items()}
    if json_target is not None:
        found = {"file": str(out), "model": loaded.name, "num_tokens": calibration.num_tokens, "layers": layers}
        write_json("calibrate", found, json_target)
    if json_target != STDOUT:
        console.print(
            f"{out}: key means of {len(layers)} layers of {loaded.name}, over {calibration.num_tokens:,} tokens",
            highlight=False,
            soft_wrap=True,
        )


def _encode(loaded: "LoadedModel", text: str, tokens: int) -> "torch.Tensor":
    """The first tokens of a text that fit into the model's context, int64 [1, num_tokens]."""
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or tokens
    input_ids: torch.Tensor = loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, : min(tokens, limit)]
    if input_ids.shape[1] < MIN_TOKENS:
        raise CommandError(
            f"the text has {input_ids.shape[1]} tokens that {loaded.name} can take; means need {MIN_TOKENS}. Pass "
            "--text with a longer one."
        )
    return input_ids
