"""What doctor says of a card's memory: the recommended preset against bf16; `turboquant plan` says more."""

from dataclasses import asdict, dataclass
from typing import Any

from turboquant_core.vllm_limits import MEMORY_SHARE, RESERVE_GIB
from turboquant_hf.tools.doctor.capacity import cut_into_blocks, kv_memory
from turboquant_hf.tools.doctor.cards import GIB
from turboquant_hf.tools.doctor.diagnosis import Diagnosis

REQUEST_LENGTH = 8192


@dataclass(frozen=True)
class Fit:
    """KV tokens of the recommended preset and of bf16 on one card.

    Attributes:
        memory_gib: Memory of the card.
        kv_bytes: What is left of it for the cache; negative where weights do not fit. None where they are not known.
        length: Tokens of a request.
        tokens: Cache name to KV tokens.
        problem: Why there are none; None if there are.
    """

    memory_gib: float
    kv_bytes: int | None
    length: int
    tokens: dict[str, int]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.problem:
            return f"memory: {self.problem}"
        counts = ", ".join(f"{count:,} with {cache}" for cache, count in self.tokens.items())
        return (
            f"memory: of {self.memory_gib:g} GiB vLLM has about {(self.kv_bytes or 0) / GIB:.1f} GiB for the cache, "
            f"which holds in tokens: {counts}. More with `turboquant plan`."
        )


def fit(diagnosis: Diagnosis, memory_gib: float | None) -> Fit | None:
    """What fits into the memory of a card; None where none is given or vLLM does not serve the model."""
    if memory_gib is None or not diagnosis.verdicts["vllm"].is_served:
        return None
    length = min(REQUEST_LENGTH, diagnosis.attention.max_length or REQUEST_LENGTH)
    weights = diagnosis.checkpoint.weights_nbytes
    if weights is None:
        return Fit(memory_gib, None, length, {}, "the bytes of the weights are not known; see `turboquant plan`")
    kv_bytes = kv_memory(memory_gib, MEMORY_SHARE, weights, 1, RESERVE_GIB)
    if kv_bytes <= 0:
        problem = f"weights of {weights / GIB:.1f} GiB leave nothing of {memory_gib:g} GiB for a cache"
        return Fit(memory_gib, kv_bytes, length, {}, problem)
    try:
        tokens = {
            cache: cut_into_blocks(diagnosis.checkpoint.config, diagnosis.attention, cache)
            .capacity(kv_bytes, length)
            .tokens
            for cache in ("bf16", diagnosis.preset)
        }
    except ValueError as error:
        return Fit(memory_gib, kv_bytes, length, {}, str(error))
    return Fit(memory_gib, kv_bytes, length, tokens, None)
