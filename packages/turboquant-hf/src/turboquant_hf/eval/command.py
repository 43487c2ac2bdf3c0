"""The command line of `turboquant eval`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
from turboquant_hf.demo.run import CHUNK_SIZE, UNCOMPRESSED
from turboquant_hf.eval.caches import CACHES, DEFAULTS, find_cache
from turboquant_hf.eval.render import render
from turboquant_hf.eval.run import Evaluation
from turboquant_hf.eval.run_file import RunFile, read_run_file
from turboquant_hf.eval.settings import MEASUREMENTS, Settings, environment, model_identity, text_digest
from turboquant_hf.eval.summary import summarise
from turboquant_hf.eval.units import missing_units
from turboquant_hf.json_output import STDOUT, JsonOption, check_json_target, write_json

LAYER_TOKENS = 512
SECTION_NAMES = {"settings": "settings", "environment": "versions or on another machine", "model": "weights"}


def evaluate(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="Run file. One that is there and not finished is continued.")] = Path(
        "turboquant-eval.json"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Refuse to begin: the run file has to be there.")] = False,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Cache to measure, repeatable: {', '.join(name for name in CACHES if name != UNCOMPRESSED)}."
        ),
    ] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help=f"Measurement, repeatable: {', '.join(MEASUREMENTS)}. Default: all.")
    ] = None,
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(min=2 * CHUNK_SIZE, help="Tokens of the text for quality and speed.")] = 9
    * CHUNK_SIZE,
    needle_length: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a prompt with a needle, repeatable.")
    ] = None,
    needle_depths: Annotated[int, typer.Option(min=2, help="Depths at which a needle is hidden.")] = 5,
    greedy_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a greedy continuation.")] = 48,
    seed: Annotated[int, typer.Option(help="Picks what the needles say.")] = 0,
    json_target: JsonOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure what compressed caches do to a model, beside the uncompressed one and those of others.

    Exit status: 0 when everything is measured, 2 for what cannot be read or measured; 130 when interrupted, and the
    same command goes on from there.
    """
    console, errors = Console(), Console(stderr=True)
    check_target(out, errors)
    check_json_target(json_target, errors)
    content = text_or_fail(text, errors)
    device = chosen_device(device)
    settings = Settings(
        caches=_caches(cache, errors),
        measurements=_measurements(measure, errors),
        text_sha256=text_digest(content),
        num_tokens=tokens,
        chunk_size=CHUNK_SIZE,
        layer_tokens=LAYER_TOKENS,
        needle_lengths=tuple(dict.fromkeys(needle_length or (512, 1024, 2048))),
        needle_depths=tuple(number / (needle_depths - 1) for number in range(needle_depths)),
        greedy_tokens=greedy_tokens,
        seed=seed,
    )
    header = {"settings": settings.to_dict(), "environment": _environment(device, errors)}
    run = _continued(out, header, errors) if resume or out.exists() else None
    loaded = load_or_fail(model, device, errors)
    identity = model_identity(loaded)
    if run is None:
        run = RunFile(out, {"command": _command(), **header, "model": identity})
    _refuse_differences(run, {"model": identity}, errors)
    try:
        evaluation = Evaluation(loaded, settings, content)
        _measure(evaluation, run, len(missing_units(settings, run.results)), errors)
    except KeyboardInterrupt:
        errors.print(f"interrupted; the same command goes on from {out}")
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError) as error:
        kept = f" What was measured is in {out}; the same command goes on from there." if run.results else ""
        fail(errors, f"cannot measure {loaded.name}: {error}{kept}")
    summary = summarise(run)
    if json_target is not None:
        write_json(summary.to_dict(), json_target)
    if json_target != STDOUT:
        render(summary, console)
        console.print(f"{out}: for a page of this, turboquant report {out} --out report.html", highlight=False)


def _measure(evaluation: Evaluation, run: RunFile, num_missing: int, errors: Console) -> None:
    with progress_bar(errors) as progress:
        task = progress.add_task("measuring", total=num_missing)
        evaluation.measure_missing(
            run,
            before=lambda unit: progress.update(task, description=unit.name),
            after=lambda: progress.advance(task),
        )


def _caches(names: list[str] | None, errors: Console) -> tuple[str, ...]:
    """The caches that were named, or the default ones that can be made here."""
    chosen = []
    for name in dict.fromkeys(names or DEFAULTS):
        if not names and CACHES[name].missing:
            errors.print(f"{name} is left out: it needs {CACHES[name].missing}", style="dim", highlight=False)
            continue
        try:
            chosen.append(find_cache(name).name)
        except ValueError as error:
            fail(errors, str(error))
    return tuple(name for name in chosen if name != UNCOMPRESSED)


def _measurements(names: list[str] | None, errors: Console) -> tuple[str, ...]:
    for name in names or ():
        if name not in MEASUREMENTS:
            fail(errors, f"there is no measurement {name!r}; there are {', '.join(MEASUREMENTS)}")
    # In one order, whatever that of the options.
    return tuple(name for name in MEASUREMENTS if not names or name in names)


def _environment(device: str, errors: Console) -> dict[str, Any]:
    try:
        return environment(device)
    except (RuntimeError, AssertionError) as error:
        fail(errors, f"there is no device {device}: {error}")


def _continued(out: Path, header: dict[str, Any], errors: Console) -> RunFile:
    """The run that is to go on."""
    try:
        run = read_run_file(out)
        summarise(run)
    except FileNotFoundError:
        fail(errors, f"there is no run file {out} to go on from; leave --resume out to begin one")
    except (OSError, ValueError) as error:
        fail(errors, f"{error}. Pass --out with another name, or remove the file.")
    _refuse_differences(run, header, errors)
    return run


def _refuse_differences(run: RunFile, sections: dict[str, dict[str, Any]], errors: Console) -> None:
    for section, expected in sections.items():
        if differences := list(run.differences(section, expected)):
            fail(
                errors,
                f"{run.path} was begun with other {SECTION_NAMES[section]}: {'; '.join(differences)}. Go on with the "
                "same, or pass --out with another name.",
            )


def _command() -> str:
    return shlex.join(["turboquant", *sys.argv[1:]])
