"""What `turboquant plan` works out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turboquant_core import PRESETS
from turboquant_core.calibration import read_calibration
from turboquant_core.config import preset_bits
from turboquant_core.model_identity import ModelIdentity, architecture_of
from turboquant_hf.tools.doctor.attention import ModelAttention
from turboquant_hf.tools.doctor.capacity import Blocks, Capacity, cut_into_blocks
from turboquant_hf.tools.doctor.checkpoint import Checkpoint
from turboquant_hf.tools.doctor.engines import GGUF_REFUSAL, by_vllm
from turboquant_hf.tools.doctor.sizes import UNCOMPRESSED_ITEMSIZES, has_whole_bits

SHORTEST_PLOTTED = 1024
LONGEST_PLOTTED = 131_072


@dataclass(frozen=True)
class Row:
    """One cache.

    Attributes:
        cache: "bf16", "fp8" or a preset.
        block_bytes: Bytes of a block on each card.
        capacity: What fits.
        against_bf16: Tokens over those of bf16; None where none of those fit.
    """

    cache: str
    block_bytes: int
    capacity: Capacity
    against_bf16: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "cache": self.cache,
            "block_bytes": self.block_bytes,
            **asdict(self.capacity),
            "against_bf16": self.against_bf16,
        }


@dataclass(frozen=True)
class Plan:
    """What fits into some memory for requests of one length.

    Attributes:
        model: Hub id or folder.
        kv_bytes: Memory for the cache on each card.
        tensor_parallel: Cards that share the heads.
        length: Tokens of a request, prompt and answer.
        batched_tokens: Tokens of a step at most, vLLM's `--max-num-batched-tokens`.
        blocks: Cache name to how it is cut.
    """

    model: str
    kv_bytes: int
    tensor_parallel: int
    length: int
    batched_tokens: int
    blocks: dict[str, Blocks]

    def rows(self) -> list[Row]:
        """One for each cache."""
        fits = {cache: self.capacity(cache, self.length) for cache in self.blocks}
        plain = fits["bf16"].tokens
        return [
            Row(cache, self.blocks[cache].nbytes, capacity, capacity.tokens / plain if plain else None)
            for cache, capacity in fits.items()
        ]

    def capacity(self, cache: str, length: int) -> Capacity:
        """What fits of requests of a length."""
        return self.blocks[cache].capacity(self.kv_bytes, length, self.batched_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": self.model,
            "kv_bytes_per_card": self.kv_bytes,
            "tensor_parallel": self.tensor_parallel,
            "request_tokens": self.length,
            "max_num_batched_tokens": self.batched_tokens,
            "caches": [row.to_dict() for row in self.rows()],
        }


def refusals(checkpoint: Checkpoint, attention: ModelAttention, capability: tuple[int, int]) -> tuple[str, ...]:
    """Why vLLM does not serve the model compressed; empty if it does, from safetensors files at least."""
    found = by_vllm(checkpoint, attention, next(iter(PRESETS)), capability).refusals
    return tuple(refusal for refusal in found if refusal != GGUF_REFUSAL)


def caches_to_plan(presets: Sequence[str]) -> list[str]:
    """bf16, fp8 and these presets, or without any all that vLLM serves.

    Raises:
        ValueError: If a preset does not exist or vLLM does not serve it.
    """
    served = [preset for preset in PRESETS if has_whole_bits(preset)]
    for preset in presets:
        preset_bits(preset)
        if preset not in served:
            raise ValueError(
                f"preset {preset} has fractional bits, which vLLM does not serve; served are {', '.join(served)}"
            )
    return [*UNCOMPRESSED_ITEMSIZES, *(dict.fromkeys(presets) or served)]


def make_plan(
    checkpoint: Checkpoint,
    attention: ModelAttention,
    caches: Sequence[str],
    *,
    kv_bytes: int,
    tensor_parallel: int,
    length: int,
    batched_tokens: int,
    split: bool = False,
) -> Plan:
    """See `Plan`; `split` says whether keys are where they can be.

    Raises:
        ValueError: If the cards cannot share the heads, or the size of a layer is not known.
    """
    blocks = {cache: cut_into_blocks(checkpoint.config, attention, cache, tensor_parallel, split) for cache in caches}
    return Plan(checkpoint.name, kv_bytes, tensor_parallel, length, batched_tokens, blocks)


def splits_keys(calibration: Path, checkpoint: Checkpoint) -> bool:
    """Whether vLLM splits keys with a calibration file: pages are of one size, so all layers have to be ordered.

    As by default: the first token is raw.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, or belongs to another model.
    """
    text_config = checkpoint.config.get_text_config(decoder=True)
    model = ModelIdentity.of(text_config, architecture_of(checkpoint.config))
    return read_calibration(calibration, model).orders_every_layer(codes_only=False)


def plotted_lengths(max_length: int | None) -> list[int]:
    """Powers of two up to the model's context."""
    longest = min(max_length or LONGEST_PLOTTED, LONGEST_PLOTTED)
    lengths = []
    length = SHORTEST_PLOTTED
    while length <= longest:
        lengths.append(length)
        length *= 2
    return lengths or [longest]
