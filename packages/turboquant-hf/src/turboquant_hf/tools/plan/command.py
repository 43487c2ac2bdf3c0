"""The command line of `turboquant plan`."""

from pathlib import Path
from typing import Annotated

import typer

from turboquant_core.command_output import (
    REFUSED,
    STDOUT,
    CommandError,
    Output,
    check_outputs,
    json_output,
    write_json,
)
from turboquant_core.vllm_limits import MIN_CAPABILITY
from turboquant_hf.tools.doctor.capacity import BATCHED_TOKENS, MEMORY_SHARE, RESERVE_GIB, kv_memory
from turboquant_hf.tools.doctor.cards import GIB, Card
from turboquant_hf.tools.doctor.checkpoint import Checkpoint
from turboquant_hf.tools.doctor.engines import GGUF_REFUSAL
from turboquant_hf.tools.doctor.inputs import MAX_GIB, GpuOption, MemoryOption, named_card, open_model
from turboquant_hf.tools.options import MAX_TOKENS, ForceOption, JsonOption, ModelArgument, number
from turboquant_hf.tools.plan.plan import caches_to_plan, make_plan, plotted_lengths, refusals
from turboquant_hf.tools.plan.plot import MARKER, can_plot, write_plot
from turboquant_hf.tools.plan.render import render
from turboquant_hf.tools.terminal import consoles

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
    console, errors = consoles()
    if sum(given is not None for given in (gpu, memory, kv_memory_gib)) != 1:
        raise CommandError("give one of --gpu NAME, --memory GiB and --kv-memory GiB")
    _check_plot(plot)
    check_outputs([Output("--plot", plot, MARKER), json_output("plan", json_target)], {"MODEL": model}, force=force)
    card = named_card(gpu)
    try:
        caches = caches_to_plan(preset or [])
    except ValueError as error:
        raise CommandError(str(error)) from error
    checkpoint, attention = open_model(model, errors)
    if why := refusals(checkpoint, attention, card.capability if card else MIN_CAPABILITY):
        raise _refused(f"vLLM does not serve {checkpoint.name} compressed: {'; '.join(why)}")
    if attention.max_length and length and length > attention.max_length:
        raise CommandError(
            f"--length is {length:,}, and the context of {checkpoint.name} is {attention.max_length:,} tokens"
        )
    if kv_memory_gib is not None:
        kv_bytes, said = int(kv_memory_gib * GIB), "memory for the cache as given"
    else:
        total = card.memory_gib if card else memory or 0.0
        weights_bytes = _weights_bytes(checkpoint, weights)
        kv_bytes = kv_memory(total, gpu_memory_utilization, weights_bytes, tensor_parallel, reserve)
        said = _explain(total, card, gpu_memory_utilization, weights_bytes, tensor_parallel, reserve)
        if kv_bytes <= 0:
            raise _refused(f"nothing is left for a cache: {said}. Give more cards with --tensor-parallel.")
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
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    if checkpoint.is_gguf:
        errors.print(f"counted for the same model in safetensors files of 16 bits: {GGUF_REFUSAL}", highlight=False)
    if plot is not None:
        write_plot(planned, plotted_lengths(attention.max_length), plot)
    if json_target is not None:
        write_json("plan", planned.to_dict(), json_target)
    if json_target != STDOUT:
        render(planned, said, console)


def _refused(message: str) -> CommandError:
    return CommandError(message, REFUSED, "refused")


def _check_plot(plot: Path | None) -> None:
    if plot is None:
        return
    if not can_plot():
        raise CommandError("--plot needs matplotlib, which is not installed here. Install it, or leave --plot out.")
    if plot.suffix != ".svg":
        raise CommandError(f"--plot is {plot}; it writes SVG, so the name must end with .svg")


def _weights_bytes(checkpoint: Checkpoint, given_gib: float | None) -> int:
    if given_gib is not None:
        return int(given_gib * GIB)
    if checkpoint.weights_nbytes is None:
        raise CommandError(
            f"{checkpoint.name} has no safetensors files that tell the bytes of its weights. Give --weights GiB."
        )
    return checkpoint.weights_nbytes


def _explain(
    total: float, card: Card | None, share: float, weights_bytes: int, tensor_parallel: int, reserve: float
) -> str:
    parts = f" / {tensor_parallel} cards" if tensor_parallel > 1 else ""
    return (
        f"{total:g} GiB{f' of {card.name}' if card else ''} x {share:g}, less {weights_bytes / GIB:.2f} GiB of weights"
        f"{parts} and {reserve:g} GiB for activations, CUDA graphs and CUDA"
    )
