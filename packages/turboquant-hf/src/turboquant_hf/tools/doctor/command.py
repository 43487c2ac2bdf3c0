"""The command line of `turboquant doctor`."""

import typer

from turboquant_core.command_options import ForceOption, GpuOption, JsonOption, MemoryOption, ModelArgument
from turboquant_core.command_output import REFUSED, STDOUT, CommandError, check_outputs, json_output, write_json


def doctor(
    model: ModelArgument = None,
    gpu: GpuOption = None,
    memory: MemoryOption = None,
    json_target: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Say how a model's KV cache would be compressed, from its configuration and file headers alone.

    Exit status: 0 if vLLM or transformers serves it compressed, 1 if neither does, 2 for what cannot be read.
    """
    if gpu is not None and memory is not None:
        raise CommandError("--gpu and --memory both say how much memory there is; give one of them")
    check_outputs([json_output("doctor", json_target)], {"MODEL": model}, force=force)

    from turboquant_hf.tools.doctor.diagnosis import diagnose
    from turboquant_hf.tools.doctor.fit import fit
    from turboquant_hf.tools.doctor.inputs import named_card, open_model
    from turboquant_hf.tools.doctor.render import render
    from turboquant_hf.tools.terminal import consoles

    console, errors = consoles()
    card = named_card(gpu)
    checkpoint, attention = open_model(model, errors)
    try:
        diagnosis = diagnose(checkpoint, attention, card)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {checkpoint.name}: {error}") from error
    fitting = fit(diagnosis, card.memory_gib if card else memory)
    if json_target is not None:
        write_json("doctor", diagnosis.to_dict() | {"fit": fitting and fitting.to_dict()}, json_target)
    if json_target != STDOUT:
        render(diagnosis, console)
        if fitting is not None:
            console.print(f"\n{fitting}")
    if not diagnosis.is_served:
        raise typer.Exit(REFUSED)
