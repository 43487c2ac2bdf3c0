"""The command line of `turboquant plan`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from turboquant_core.command_options import (
    MAX_GIB,
    MAX_TOKENS,
    ForceOption,
    GpuOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    number,
)
from turboquant_core.command_output import REFUSED, STDOUT, CommandError, Output, check_outputs, json_output, write_json
from turboquant_core.vllm_limits import BATCHED_TOKENS, MEMORY_SHARE, MIN_CAPABILITY, RESERVE_GIB

MARKER = "turboquant plan --plot"
DEFAULT_LENGTH = 8192
MAX_CARDS = 1 << 16


def plan(
    model: ModelArgument = None,
    gpu: GpuOption = None,
    memory: MemoryOption = None,
    kv_memory_gib: Annotated[
        float | None,
        typer.Option(
            "--kv-memory",
            **number(0, MAX_GIB),
            help="GiB for the cache on a card, as vLLM's log gives it, instead of both.",
        ),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, max=MAX_CARDS, help="Cards that share the heads.")] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_TOKENS,
            help=f"Tokens of a request, prompt and answer. Default: {DEFAULT_LENGTH:,}, or the context if less.",
        ),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="Preset to plan, repeatable. Default: all vLLM serves.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File of `turboquant calibrate` that vLLM is given, by which keys are split.")
    ] = None,
    weights: Annotated[
        float | None,
        typer.Option(**number(0, MAX_GIB), help="GiB of all weights, instead of the files'."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(**number(0, 1), help="Share of the memory that vLLM takes.")
    ] = MEMORY_SHARE,
    reserve: Annotated[
        float,
        typer.Option(**number(0, MAX_GIB), help="GiB of that for activations, CUDA graphs and CUDA itself."),
    ] = RESERVE_GIB,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_TOKENS,
            help="vLLM's setting; layers with a window keep the tokens of two steps beside it.",
        ),
    ] = BATCHED_TOKENS,
    json_target: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw requests against their length to this SVG file.")] = None,
    force: ForceOption = False,
) -> None:
    """Say how many tokens and requests fit a card with every cache, counted as vLLM counts them.

    Exit status: 0 with a plan, 1 if vLLM does not serve the model compressed or its weights leave no room, 2 for what
    cannot be read.
    """
    if sum(given is not None for given in (gpu, memory, kv_memory_gib)) != 1:
        raise CommandError("give one of --gpu NAME, --memory GiB and --kv-memory GiB")
    _check_plot(plot)
    inputs = {"MODEL": model, "--calibration": calibration}
    check_outputs([Output("--plot", plot, MARKER), json_output("plan", json_target)], inputs, force=force)

    from turboquant_hf.tools.doctor.cards import GIB
    from turboquant_hf.tools.doctor.engines import GGUF_REFUSAL
    from turboquant_hf.tools.doctor.inputs import named_card, open_model
    from turboquant_hf.tools.plan.memory import left_for_cache
    from turboquant_hf.tools.plan.plan import caches_to_plan, make_plan, plotted_lengths, refusals, splits_keys
    from turboquant_hf.tools.plan.plot import write_plot
    from turboquant_hf.tools.plan.render import render
    from turboquant_hf.tools.terminal import consoles

    console, errors = consoles()
    card = named_card(gpu)
    try:
        caches = caches_to_plan(preset or [])
    except ValueError as error:
        raise CommandError(str(error)) from error
    checkpoint, attention = open_model(model, errors)
    if why := refusals(checkpoint, attention, card.capability if card else MIN_CAPABILITY):
        raise CommandError(f"vLLM does not serve {checkpoint.name} compressed: {'; '.join(why)}", REFUSED, "refused")
    try:
        split = calibration is not None and splits_keys(calibration, checkpoint)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    if attention.max_length and length and length > attention.max_length:
        raise CommandError(
            f"--length is {length:,}, and the context of {checkpoint.name} is {attention.max_length:,} tokens"
        )
    if kv_memory_gib is not None:
        kv_bytes, said = int(kv_memory_gib * GIB), "memory for the cache as given"
    else:
        kv_bytes, said = left_for_cache(
            checkpoint, card, memory, weights, gpu_memory_utilization, tensor_parallel, reserve
        )
    if length is None:
        length = min(DEFAULT_LENGTH, attention.max_length or DEFAULT_LENGTH)
        if length < DEFAULT_LENGTH:
            said += f"; requests are of the model's whole context, {length:,} tokens, and not of {DEFAULT_LENGTH:,}"
    try:
        planned = make_plan(
            checkpoint,
            attention,
            caches,
            kv_bytes=kv_bytes,
            tensor_parallel=tensor_parallel,
            length=length,
            batched_tokens=max_num_batched_tokens,
            split=split,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    if checkpoint.is_gguf:
        errors.print(f"counted for the same model in safetensors files of 16 bits: {GGUF_REFUSAL}", highlight=False)
    if plot is not None:
        write_plot(planned, plotted_lengths(attention.max_length), plot, MARKER)
    if json_target is not None:
        write_json("plan", planned.to_dict(), json_target)
    if json_target != STDOUT:
        render(planned, said, console)


def _check_plot(plot: Path | None) -> None:
    if plot is None:
        return
    if find_spec("matplotlib") is None:
        raise CommandError(
            "--plot needs matplotlib, which is not installed. Run `uv pip install matplotlib`, or leave --plot out."
        )
    if plot.suffix != ".svg":
        raise CommandError(f"--plot is {plot}; it writes SVG, so the name must end with .svg")
