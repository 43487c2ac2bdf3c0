"""The command line of `turboquant eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turboquant_core.command_options import MAX_TOKENS, DeviceOption, ForceOption, JsonOption, ModelArgument, TextOption
from turboquant_core.command_output import STDOUT, CommandError, Output, check_outputs, json_output, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from turboquant_hf.tools.eval.evaluation import Evaluation
    from turboquant_hf.tools.run_files.run_file import RunFile

MEASUREMENTS = ("quality", "layers", "needle", "greedy", "speed")
CHUNK_SIZE = 128
"""Tokens of a forward when a text is scored."""

LAYER_TOKENS = 512


def evaluate(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="Run file. One that is there and not finished is continued.")] = Path(
        "turboquant-eval.json"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Refuse to begin: the run file has to be there.")] = False,
    cache: Annotated[
        list[str] | None,
        typer.Option(help="Cache to measure, repeatable: a preset, or another such as fp8; a name of none lists all."),
    ] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help=f"Measurement, repeatable: {', '.join(MEASUREMENTS)}. Default: all.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File of `turboquant calibrate` with which presets are measured.")
    ] = None,
    text: TextOption = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=2 * CHUNK_SIZE,
            max=MAX_TOKENS,
            help=f"First tokens of the text, for quality and speed; those after {CHUNK_SIZE} are scored.",
        ),
    ] = 9 * CHUNK_SIZE,
    needle_length: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of a prompt with a needle, repeatable.")
    ] = None,
    needle_depths: Annotated[int, typer.Option(min=2, max=1000, help="Depths at which a needle is hidden.")] = 5,
    greedy_tokens: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of a greedy continuation.")] = 48,
    seed: Annotated[int, typer.Option(help="Picks what the needles say.")] = 0,
    json_target: JsonOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
) -> None:
    """Measure what compressed caches do to a model, beside the uncompressed one and those of others.

    Exit status: 0 when everything is measured, 2 for what cannot be read or measured; 130 when interrupted, and the
    same command goes on from there.
    """
    outputs = [Output("--out", out, None), json_output("eval", json_target)]
    inputs = {"MODEL": model, "--text": text, "--calibration": calibration}
    check_outputs(outputs, inputs, force=force)
    measurements = _measurements(measure)

    from turboquant_hf.tools.eval.evaluation import Evaluation
    from turboquant_hf.tools.eval.render import render
    from turboquant_hf.tools.eval.settings import EVAL, EvalSettings
    from turboquant_hf.tools.eval.summary import summarise
    from turboquant_hf.tools.eval.units import missing_units
    from turboquant_hf.tools.inputs import chosen_device, load, read_text
    from turboquant_hf.tools.run_files.continuing import (
        begin,
        go_on,
        has_begun,
        keeping,
        refuse_differences,
        typed_command,
    )
    from turboquant_hf.tools.run_files.provenance import environment, file_digest, model_identity, text_digest
    from turboquant_hf.tools.terminal import consoles

    console, errors = consoles()
    content = read_text(text)
    device = chosen_device(device)
    settings = EvalSettings(
        caches=_caches(cache, errors),
        measurements=measurements,
        text_sha256=text_digest(content),
        num_tokens=tokens,
        chunk_size=CHUNK_SIZE,
        layer_tokens=LAYER_TOKENS,
        needle_lengths=tuple(dict.fromkeys(needle_length or (512, 1024, 2048))),
        needle_depths=tuple(number / (needle_depths - 1) for number in range(needle_depths)),
        greedy_tokens=greedy_tokens,
        seed=seed,
        calibration_sha256=None if calibration is None else file_digest(calibration),
    )
    header = {"settings": settings.to_dict(), "environment": environment(device)}
    begun = has_begun(out, EVAL, force=force) or resume
    run = go_on(out, EVAL, header, "--out", summarise) if begun else None
    loaded = load(model, device, errors)
    identity = model_identity(loaded)
    if run is None:
        whole = {"command": typed_command(), **header, "model": identity}
        run = begin(out, EVAL, whole, "--out", summarise, force=force)
    refuse_differences(run, {"model": identity}, "--out")
    with keeping(run, out, f"measure {loaded.name}"):
        evaluation = Evaluation(loaded, settings, content, calibration)
        _measure(evaluation, run, len(missing_units(settings, run.results)), errors)
    summary = summarise(run)
    # Another program may have written there meanwhile.
    check_outputs(outputs, inputs, force=force)
    if json_target is not None:
        write_json("eval", summary.to_dict(), json_target)
    if json_target != STDOUT:
        render(summary, console)
        console.print(f"{out}: for a page of this, turboquant report {out} --out report.html", highlight=False)


def _measure(evaluation: "Evaluation", run: "RunFile", num_missing: int, errors: "Console") -> None:
    from turboquant_hf.tools.terminal import Steps

    with Steps(errors, "measuring", num_missing) as steps:
        evaluation.measure_missing(run, before=lambda unit: steps.begin(unit.name), after=steps.done)


def _caches(names: list[str] | None, errors: "Console") -> tuple[str, ...]:
    """The caches that were named, or the default ones that can be made here."""
    from turboquant_hf.tools.caches import CACHES, DEFAULT_CACHES, UNCOMPRESSED, find_cache

    chosen = []
    for name in dict.fromkeys(names or DEFAULT_CACHES):
        if not names and CACHES[name].missing:
            errors.print(f"{name} is left out: it needs {CACHES[name].missing}", style="dim", highlight=False)
            continue
        try:
            chosen.append(find_cache(name).name)
        except ValueError as error:
            raise CommandError(str(error)) from error
    return tuple(name for name in chosen if name != UNCOMPRESSED)


def _measurements(names: list[str] | None) -> tuple[str, ...]:
    for name in names or ():
        if name not in MEASUREMENTS:
            raise CommandError(f"there is no measurement {name!r}; there are {', '.join(MEASUREMENTS)}")
    # In one order, whatever that of the options.
    return tuple(name for name in MEASUREMENTS if not names or name in names)
