"""What a search for bits measures, as it stands in its run file."""

from dataclasses import dataclass

from turboquant_hf.tools.run_files.result import Result
from turboquant_hf.tools.run_files.run_file import RunFile


@dataclass(frozen=True)
class Sensitivity(Result):
    """Mean KL per token in nats when one layer alone has few bits.

    Attributes:
        keys: When its keys have.
        values: When its values have.
    """

    keys: float
    values: float


@dataclass(frozen=True)
class HeldOut(Result):
    """What bits give on the text that they were not chosen on; see `CacheScore`.

    Attributes:
        mean_kl: Mean KL(uncompressed ‖ cache) per token in nats.
        p99_kl: Its 99th percentile.
        top1_agreement: Share of tokens on which both put the same token first.
        perplexity: Perplexity of the text.
    """

    mean_kl: float
    p99_kl: float
    top1_agreement: float
    perplexity: float


def layer_unit(index: int, bits: int) -> str:
    """The name of a layer's sensitivity in the run file."""
    return f"layer/{index}/{bits}"


def check_results(run: RunFile) -> None:
    """Raise ValueError if a result is none."""
    for name, result in run.results.items():
        kind: type[Result] = Sensitivity if name.startswith("layer/") else HeldOut
        try:
            kind.from_dict(result)
        except ValueError as error:
            raise ValueError(f"{run.path} is a damaged run file: {name}: {error}") from None
