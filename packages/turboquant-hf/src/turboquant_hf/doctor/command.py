"""The command line of `turboquant doctor`."""

from typing import Annotated

import typer
from rich.console import Console

from turboquant_hf.command_line import ModelArgument, fail
from turboquant_hf.doctor.command_line import REFUSED, card_or_fail, open_or_fail
from turboquant_hf.doctor.diagnosis import diagnose
from turboquant_hf.doctor.fit import fit
from turboquant_hf.doctor.render import render
from turboquant_hf.json_output import STDOUT, JsonOption, check_json_target, write_json


def doctor(
    model: ModelArgument = None,
    gpu: Annotated[str | None, typer.Option(help="Card to serve on, such as H200.")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="Memory of a card in GiB, instead of --gpu.")] = None,
    json_target: JsonOption = None,
) -> None:
    """Say how a model's KV cache would be compressed, from its configuration and file headers alone.

    Exit status: 0 if vLLM or transformers serves it compressed, 1 if neither does, 2 for what cannot be read.
    """
    console, errors = Console(), Console(stderr=True)
    if gpu is not None and memory is not None:
        fail(errors, "--gpu and --memory both say how much memory there is; give one of them")
    check_json_target(json_target, errors)
    card = card_or_fail(gpu, errors)
    checkpoint, attention = open_or_fail(model, errors)
    try:
        diagnosis = diagnose(checkpoint, attention, card)
    except (OSError, ValueError) as error:
        fail(errors, f"cannot read {checkpoint.name}: {error}")
    fitting = fit(diagnosis, card.memory_gib if card else memory)
    if json_target is not None:
        write_json(diagnosis.to_dict() | {"fit": fitting and fitting.to_dict()}, json_target)
    if json_target != STDOUT:
        render(diagnosis, console)
        if fitting is not None:
            console.print(f"\n{fitting}")
    if not diagnosis.is_served:
        raise typer.Exit(REFUSED)
