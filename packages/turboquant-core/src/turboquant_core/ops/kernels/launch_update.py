"""How the cache update is spread over a GPU."""

from dataclasses import dataclass

ELEMENT_BYTES = 2
# One program waits for its input or the tensor cores while the other quantizes; a third would find no shared memory at
# 128 channels, which take 64 KiB for the rotation and 32 for input.
MAX_PROGRAMS_PER_SM = 2


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
        num_programs: Programs, a multiple of 2 * num_kv_heads: each takes every so many-th tile of the keys, or of the
            values, of one head.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline over input channels.
        depth: Depth of the pipeline over tiles.
    """

    block_rows: int
    block_k: int
    num_programs: int
    num_warps: int
    num_stages: int
    depth: int


def update_launch(
    num_tokens: int, num_kv_heads: int, channels: int, num_parts: int, input_parts: int, processor: Processor
) -> UpdateLaunch:
    """The launch for keys and values of that many tokens.

    They are multiplied in input_parts halves, or whole, with a rotation of num_parts [channels, channels].
    """
    # 64 rows are one warpgroup's tensor-core tile; 16, the least that a product takes, waste less when decoding. On an
    # H200, 8,192 tokens of 8 heads take 30 us so; 37 with 8 warps that share the rows, 43 with 16.
    block_rows, num_warps = (64 if num_tokens > 16 else 16), 4
    block_k, num_stages, depth = channels, 1, 2
    # The rotation, and next to it the input of two tiles: the next one's comes while a tile is stored.
    resident_bytes = ELEMENT_BYTES * channels * (num_parts * channels + 2 * input_parts * block_rows)
    programs_per_sm = min(MAX_PROGRAMS_PER_SM, processor.shared_bytes // resident_bytes)
    if channels > 128 or not programs_per_sm:
        # The rotation is read in slices of 16 KiB; more warps hold the wider accumulators.
        num_warps = max(8, channels // 32)
        block_k, num_stages, depth, programs_per_sm = 8192 // channels, 2, 1, 1
    blocks = -(-num_tokens // block_rows)
    pairs_per_head = max(1, processor.num_sms * programs_per_sm // (2 * num_kv_heads))
    num_programs = 2 * num_kv_heads * min(blocks, pairs_per_head)
    return UpdateLaunch(block_rows, block_k, num_programs, num_warps, num_stages, depth)
