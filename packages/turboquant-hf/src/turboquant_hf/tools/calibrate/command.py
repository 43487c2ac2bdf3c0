"""The command line of `turboquant calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant_core.command_options import MAX_TOKENS, DeviceOption, ForceOption, JsonOption, ModelArgument
from turboquant_core.command_output import STDOUT, CommandError, Output, check_outputs, json_output, write_json

if TYPE_CHECKING:
    import torch

    from turboquant_hf.tools.models import LoadedModel

# Fewer say little about the next text.
MIN_TOKENS = 256


def calibrate(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("turboquant.safetensors"),
    text: Annotated[
        Path | None, typer.Option(help="Text file, UTF-8. Default: texts of several kinds that come with the command.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=MIN_TOKENS, max=MAX_TOKENS, help="Tokens to take at most; a fifth of them is held out.")
    ] = 4096,
    force: ForceOption = False,
    json_target: JsonOption = None,
    device: DeviceOption = None,
) -> None:
    """Write how keys are stored best to a file that vLLM and TurboQuantCache load: their mean, scale and order."""
    from turboquant_core.calibration import FORMAT, write_calibration
    from turboquant_hf.tools.caches import check_heads
    from turboquant_hf.tools.calibrate.measure import measure, num_forwards
    from turboquant_hf.tools.calibrate.render import summary, to_dict
    from turboquant_hf.tools.calibrate.texts import shipped_texts
    from turboquant_hf.tools.inputs import chosen_device, load, read_text
    from turboquant_hf.tools.terminal import Steps, consoles

    console, errors = consoles()
    outputs = [Output("--out", out, f'"format":"{FORMAT}"'), json_output("calibrate", json_target)]
    check_outputs(outputs, {"MODEL": model, "--text": text}, force=force)
    texts = shipped_texts() if text is None else (read_text(text),)
    loaded = load(model, chosen_device(device), errors)
    check_heads(loaded.model.config, "calibrate", "TurboQuantCache needs no file for it.")
    measured, held_out = _encode(loaded, texts, tokens)
    with Steps(errors, "running the model", num_forwards(measured.shape[1], held_out.shape[1])) as steps:
        found = measure(loaded, measured, held_out, on_forward=steps.done)
    # Another program may have written there meanwhile.
    check_outputs(outputs, {"MODEL": model, "--text": text}, force=force)
    write_calibration(out, found.calibration)
    num_tokens = {"num_tokens": measured.shape[1], "num_held_out": held_out.shape[1]}
    if json_target is not None:
        content = {"file": str(out), "model": loaded.name, **num_tokens, "layers": to_dict(found.layers)}
        write_json("calibrate", content, json_target)
    if json_target != STDOUT:
        for line in summary(str(out), loaded.name, found.layers, **num_tokens):
            console.print(line, highlight=False, soft_wrap=True)


def _encode(loaded: "LoadedModel", texts: tuple[str, ...], tokens: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """The tokens to measure and those held out, as many as fit into the model's context together."""
    from turboquant_hf.tools.calibrate.texts import split_tokens

    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or tokens
    encoded = [loaded.tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
    measured, held_out = split_tokens(encoded, min(tokens, limit))
    count = measured.shape[1] + held_out.shape[1]
    if count < MIN_TOKENS:
        raise CommandError(
            f"the text has {count} tokens that {loaded.name} can take; a calibration needs {MIN_TOKENS}. Pass --text "
            "with a longer one."
        )
    return measured, held_out
