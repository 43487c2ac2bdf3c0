"""The command line of `turboquant tune`."""

from pathlib import Path
from typing import Annotated

import typer

from turboquant_core.command_options import (
    MAX_TOKENS,
    DeviceOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    TextOption,
    number,
)
from turboquant_core.command_output import STDOUT, Output, check_outputs, json_output, write_json

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that are chosen from: those that kernels read."""

PROBE_BITS = (3, 2)
"""Bits that are measured unless others are asked for: few enough for errors to be seen, and 2 cost more than 3 say."""

CHUNK_SIZE = 256
"""Tokens of a forward."""


def tune(
    model: ModelArgument = None,
    target_bits: Annotated[
        float,
        typer.Option(
            **number(min(WIDTHS), max(WIDTHS)),
            help="Bits per coordinate at most, the mean of all layers.",
        ),
    ] = 3.5,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("turboquant.json"),
    run_file: Annotated[
        Path | None,
        typer.Option("--run", help="Run file of what was measured; one that is there is used. Default: OUT.run.json."),
    ] = None,
    text: TextOption = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=2 * CHUNK_SIZE, max=MAX_TOKENS, help="First tokens of the text, on which layers are measured."
        ),
    ] = 4 * CHUNK_SIZE,
    held_out_tokens: Annotated[
        int,
        typer.Option(min=2 * CHUNK_SIZE, max=MAX_TOKENS, help="Tokens after those, on which bits are compared."),
    ] = 6 * CHUNK_SIZE,
    probe_bits: Annotated[
        list[int] | None,
        typer.Option(
            min=min(WIDTHS),
            max=max(WIDTHS),
            help="Bits of the layer that is measured, repeatable; what is not measured follows from the nearest. "
            f"Default: {' and '.join(map(str, PROBE_BITS))}.",
        ),
    ] = None,
    json_target: JsonOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
) -> None:
    """Choose the bits of every layer under a budget of bytes, and write them to a file that both integrations load.

    Exit status: 0 when the bits are better than uniform ones on text that they were not chosen on, 1 when they are not,
    2 for what cannot be read or measured; 130 when interrupted, and the same command goes on from there.
    """
    from turboquant_core.layer_bits import FORMAT, write_layer_bits
    from turboquant_hf.tools.caches import check_heads
    from turboquant_hf.tools.inputs import chosen_device, load, read_text
    from turboquant_hf.tools.run_files.continuing import (
        begin,
        go_on,
        has_begun,
        keeping,
        refuse_differences,
        typed_command,
    )
    from turboquant_hf.tools.run_files.provenance import environment, model_identity, text_digest
    from turboquant_hf.tools.terminal import Steps, consoles
    from turboquant_hf.tools.tune.render import render, verdict
    from turboquant_hf.tools.tune.results import check_results
    from turboquant_hf.tools.tune.search import Search, new_settings
    from turboquant_hf.tools.tune.settings import TUNE

    console, errors = consoles()
    run_path = run_file or Path(f"{out}.run.json")
    outputs = [
        Output("--out", out, f'"format": "{FORMAT}"'),
        Output("--run", run_path, None),
        json_output("tune", json_target),
    ]
    check_outputs(outputs, {"MODEL": model, "--text": text}, force=force)
    content = read_text(text)
    device = chosen_device(device)
    settings = new_settings(text_digest(content), tokens, held_out_tokens, probe_bits)
    header = {"settings": settings.to_dict(), "environment": environment(device)}
    begun = has_begun(run_path, TUNE, force=force)
    run = go_on(run_path, TUNE, header, "--run", check_results) if begun else None
    loaded = load(model, device, errors)
    check_heads(loaded.model.config, "tune", "Use a preset for all layers.")
    identity = model_identity(loaded)
    if run is None:
        whole = {"command": typed_command(), **header, "model": identity}
        run = begin(run_path, TUNE, whole, "--run", check_results, force=force)
    refuse_differences(run, {"model": identity}, "--run")
    with keeping(run, run_path, f"tune {loaded.name}"):
        search = Search(loaded, settings, content, target_bits)
        with Steps(errors, "measuring", search.num_steps(run)) as steps:
            found = search.find(run, on_forward=steps.done)
    bits = search.layer_bits(found)
    # Another program may have written there meanwhile.
    check_outputs(outputs, {"MODEL": model, "--text": text}, force=force)
    write_layer_bits(out, bits)
    if json_target is not None:
        result = {
            "command": typed_command(),
            "model": identity,
            "environment": header["environment"],
            "layer_bits": {str(index): list(pair) for index, pair in bits.layer_bits.items()},
            **bits.measured,
            "is_better": found.is_better,
            "verdict": verdict(found),
        }
        write_json("tune", result, json_target)
    if json_target != STDOUT:
        render(found, loaded.name, held_out_tokens, console)
        console.print(f'{out}: TurboQuantCache(model.config, layer_bits="{out}")', highlight=False, soft_wrap=True)
    if not found.is_better:
        raise typer.Exit(1)
