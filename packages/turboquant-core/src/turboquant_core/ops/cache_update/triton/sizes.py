"""How the cache update is spread over a GPU."""

from dataclasses import dataclass

import torch

ELEMENT_BYTES = 2
# The least rows that a product takes: a tile's where there are no more tokens.
FEW_ROWS = 16
# Vectors that are multiplied in halves go through registers first: up to so many, small tiles side by side are faster.
# On an H200 64 scaled keys of 8 heads take 5.4 us, not 8.0.
FEW_IN_HALVES = 256
# One program waits for its input or the tensor cores while another quantizes. Three find room at 128 channels where one
# matrix is the rotation, if a thread keeps to 168 registers. On an H200 8,192 tokens of 8 heads then take 22.5 us, not
# 26.4; with one code path for keys and another for values those registers spill: 36 us, not 31.
MAX_PROGRAMS_PER_SM = 2
MAX_SMALL_PROGRAMS_PER_SM = 3
REGISTERS_OF_SMALL_PROGRAM = 168


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
        max_registers: Of a thread; None for as many as the compiler takes.
    """

    block_rows: int
    block_k: int
    num_programs: int
    num_warps: int
    num_stages: int
    depth: int
    max_registers: int | None

    @property
    def compiler_options(self) -> dict[str, int]:
        """Options that only NVIDIA's compiler takes."""
        return {} if self.max_registers is None else {"maxnreg": self.max_registers}


def num_input_parts(dtype: torch.dtype, *, only_centres: bool) -> int:
    """Parts of keys that are multiplied: halves of what no 16-bit type holds."""
    return 2 if dtype == torch.float32 or not only_centres else 1


def representative_tokens(dtype: torch.dtype, *, only_centres: bool) -> tuple[int, int]:
    """Numbers of tokens that between them launch the kernel of small tiles and that of large ones."""
    return 1, _few_tokens(num_input_parts(dtype, only_centres=only_centres)) + 1


def _few_tokens(input_parts: int) -> int:
    """Up to so many tokens tiles are small."""
    return FEW_ROWS if input_parts == 1 else FEW_IN_HALVES


def update_launch(
    num_tokens: int,
    num_kv_heads: int,
    channels: int,
    num_parts: int,
    input_parts: int,
    processor: Processor,
    *,
    one_path: bool,
) -> UpdateLaunch:
    """The launch for keys and values of that many tokens.

    They are multiplied in input_parts halves, or whole, with a rotation of num_parts [channels, channels]. With
    one_path keys and values have the same bits.
    """
    # 64 rows are one warpgroup's tensor-core tile; few waste less when decoding. More warps, 8 that share 64 rows
    # or have 128, take longer.
    block_rows, num_warps = (64 if num_tokens > _few_tokens(input_parts) else FEW_ROWS), 4
    block_k, num_stages, depth = channels, 1, 2
    # The rotation, and next to it the input of two tiles: the pipeline has a buffer for each of its stages.
    resident_bytes = ELEMENT_BYTES * channels * (num_parts * channels + 2 * input_parts * block_rows)
    small = one_path and channels <= 128 and num_parts * input_parts == 1
    most = MAX_SMALL_PROGRAMS_PER_SM if small else MAX_PROGRAMS_PER_SM
    programs_per_sm = min(most, processor.shared_bytes // resident_bytes)
    max_registers = REGISTERS_OF_SMALL_PROGRAM if programs_per_sm == MAX_SMALL_PROGRAMS_PER_SM else None
    if channels > 128 or not programs_per_sm:
        # The rotation is read in slices of 16 KiB; twice the warps, and half the rows at 512, hold the accumulators.
        num_warps, block_rows = 8, min(block_rows, 16384 // channels)
        block_k, num_stages, depth, programs_per_sm = 8192 // channels, 2, 1, 1
    blocks = -(-num_tokens // block_rows)
    pairs_per_head = max(1, processor.num_sms * programs_per_sm // (2 * num_kv_heads))
    num_programs = 2 * num_kv_heads * min(blocks, pairs_per_head)
    return UpdateLaunch(block_rows, block_k, num_programs, num_warps, num_stages, depth, max_registers)
