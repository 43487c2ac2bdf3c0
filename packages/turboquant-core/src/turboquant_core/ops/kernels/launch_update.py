"""How the cache update is spread over a GPU."""

from dataclasses import dataclass

ELEMENT_BYTES = 2
MAX_PROGRAMS_PER_SM = 4


@dataclass(frozen=True)
class Processor:
    """What a launch depends on.

    Attributes:
        num_sms: Streaming multiprocessors.
        shared_bytes: Shared memory that one program may use.
    """

    num_sms: int
    shared_bytes: int


# Programs run in turn; more than one still shares tiles. The memory is an H200's.
INTERPRETER = Processor(num_sms=4, shared_bytes=227 * 1024)


@dataclass(frozen=True)
class UpdateLaunch:
    """A launch of the update kernel.

    Attributes:
        block_rows: Tokens of one head in a tile.
        block_k: Input channels of one tensor-core product; all of them keep the rotation on chip across tiles.
        num_programs: Programs, a multiple of num_kv_heads: each takes every num_programs-th tile, all of one head.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline over input channels.
    """

    block_rows: int
    block_k: int
    num_programs: int
    num_warps: int
    num_stages: int


def update_launch(
    num_tokens: int, num_kv_heads: int, channels: int, num_parts: int, processor: Processor
) -> UpdateLaunch:
    """The launch for keys and values of that many tokens, with a rotation of num_parts [channels, channels]."""
    # 64 rows are one warpgroup's tensor-core tile; 16, the least that a product takes, waste less when decoding.
    block_rows = 64 if num_tokens > 16 else 16
    # The rotation, and next to it the input in two halves, which the output takes the place of.
    resident_bytes = ELEMENT_BYTES * channels * (num_parts * channels + 2 * block_rows)
    programs_per_sm = min(MAX_PROGRAMS_PER_SM, processor.shared_bytes // resident_bytes)
    if channels <= 128 and programs_per_sm:
        block_k, num_warps, num_stages = channels, 4, 1
    else:
        # The rotation is read in slices of 16 KiB; more warps hold the wider accumulators.
        block_k, num_warps, num_stages, programs_per_sm = 8192 // channels, max(8, channels // 32), 2, 1
    tiles_per_head = 2 * -(-num_tokens // block_rows)
    programs_per_head = max(1, processor.num_sms * programs_per_sm // num_kv_heads)
    num_programs = num_kv_heads * min(tiles_per_head, programs_per_head)
    return UpdateLaunch(block_rows, block_k, num_programs, num_warps, num_stages)
