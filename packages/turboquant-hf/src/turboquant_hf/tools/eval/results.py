"""What an evaluation measures, as it stands in a run file."""

from dataclasses import dataclass

from turboquant_hf.tools.run_files.result import Result


@dataclass(frozen=True)
class Quality(Result):
    """Next-token distributions over a text, and bytes; see `CacheScore`.

    Attributes:
        num_tokens: Tokens scored.
        mean_kl: Mean KL(uncompressed ‖ cache) per token in nats.
        p99_kl: Its 99th percentile.
        top1_agreement: Share of tokens on which both put the same token first.
        perplexity: Perplexity of the text.
        bytes_per_token: Allocated bytes of the cache for each token of the text.
    """

    num_tokens: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    perplexity: float
    bytes_per_token: float


@dataclass(frozen=True)
class LayerError(Result):
    """Squared errors of one layer, relative to the squared norm of what they are errors of.

    Attributes:
        index: Layer index.
        key_error: Of keys as the token after them reads them, relative to what differs between the keys of a head.
        value_error: Of values, read alike.
        output_error: Of the attention's output, where every token reads the first and its newest as they are.
    """

    index: int
    key_error: float
    value_error: float
    output_error: float


@dataclass(frozen=True)
class NeedleScore(Result):
    """What came of a needle.

    Attributes:
        share: Share of the answer's tokens that the model puts first, given those before them.
        found: Whether it is all of them, and so what greedy decoding would answer.
    """

    share: float
    found: bool


@dataclass(frozen=True)
class Greedy(Result):
    """Greedy continuations.

    Attributes:
        tokens: Those of every prompt.
    """

    tokens: list[list[int]]


@dataclass(frozen=True)
class Speed(Result):
    """Decoding speed.

    Attributes:
        tokens_per_second: Of the cache.
        reference_tokens_per_second: Of the uncompressed one, measured in turns with it.
    """

    tokens_per_second: float
    reference_tokens_per_second: float


@dataclass(frozen=True)
class Failure(Result):
    """Why a cache has no result.

    Attributes:
        fails: What went wrong.
    """

    fails: str
