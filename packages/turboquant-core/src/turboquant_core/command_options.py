"""Arguments and options that several subcommands have."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

MAX_TOKENS = 1 << 40
"""More tokens than any option takes."""

MAX_GIB = 1 << 20
"""More memory than any machine has."""

ModelArgument = Annotated[
    str | None, typer.Argument(help="Hub id, folder or GGUF file. Default: SmolLM2-135M-Instruct.")
]
TextOption = Annotated[
    Path | None, typer.Option(help="Text file, UTF-8. Default: an encyclopaedia article of 3,000 tokens.")
]
DeviceOption = Annotated[str | None, typer.Option(help="torch device. Default: cuda where there is one, else cpu.")]
JsonOption = Annotated[
    str | None, typer.Option("--json", help="Write what was found to this file too; - for the output, alone.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that this command did not write.")]


def number(least: float, most: float) -> dict[str, Any]:
    """Keywords of `typer.Option` for a number within bounds, which NaN is not."""

    def parse(given: str | float) -> float:
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise typer.BadParameter(f"{given!s:.40} is no number from {least:,} to {most:,}.")
        return value

    return {"parser": parse, "metavar": f"<{least:,} to {most:,}>"}


GpuOption = Annotated[str | None, typer.Option(help="Card to serve on, such as H200.")]
MemoryOption = Annotated[
    float | None,
    typer.Option(**number(0, MAX_GIB), help="Memory of a card in GiB, instead of --gpu."),
]
