"""The memory that a card has left for the cache."""

from turboquant_core.command_output import REFUSED, CommandError
from turboquant_hf.tools.doctor.capacity import kv_memory
from turboquant_hf.tools.doctor.cards import GIB, Card
from turboquant_hf.tools.doctor.checkpoint import Checkpoint


def left_for_cache(
    checkpoint: Checkpoint,
    card: Card | None,
    memory_gib: float | None,
    weights_gib: float | None,
    share: float,
    tensor_parallel: int,
    reserve_gib: float,
) -> tuple[int, str]:
    """Bytes for the cache on each card, and how they were worked out.

    Args:
        checkpoint: The model's files.
        card: The card; None where its memory is given.
        memory_gib: Memory of a card that is not named.
        weights_gib: All weights; None for what the files hold.
        share: Share of the memory that vLLM takes.
        tensor_parallel: Cards that share the weights.
        reserve_gib: What else needs memory.

    Raises:
        CommandError: If the bytes of the weights are not known, or nothing is left.
    """
    total = card.memory_gib if card else memory_gib or 0.0
    weights = _weights_bytes(checkpoint, weights_gib)
    parts = f" / {tensor_parallel} cards" if tensor_parallel > 1 else ""
    said = (
        f"{total:g} GiB{f' of {card.name}' if card else ''} x {share:g}, less {weights / GIB:.2f} GiB of weights"
        f"{parts} and {reserve_gib:g} GiB for activations, CUDA graphs and CUDA"
    )
    left = kv_memory(total, share, weights, tensor_parallel, reserve_gib)
    if left <= 0:
        raise CommandError(
            f"nothing is left for a cache: {said}. Give more cards with --tensor-parallel.", REFUSED, "refused"
        )
    return left, said


def _weights_bytes(checkpoint: Checkpoint, given_gib: float | None) -> int:
    if given_gib is not None:
        return int(given_gib * GIB)
    if checkpoint.weights_nbytes is None:
        raise CommandError(
            f"{checkpoint.name} has no safetensors files that tell the bytes of its weights. Give --weights GiB."
        )
    return checkpoint.weights_nbytes
