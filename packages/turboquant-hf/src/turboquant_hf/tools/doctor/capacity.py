"""How many tokens and requests fit, counted in blocks as vLLM counts them (its `v1/core/kv_cache_utils.py`)."""

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any

from turboquant_core.vllm_limits import BATCHED_TOKENS, BLOCK_SIZE_MULTIPLE, LARGEST_HEAD_DIM
from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.support import LayerAttention
from turboquant_hf.tools.doctor.attention import ModelAttention
from turboquant_hf.tools.doctor.cards import GIB
from turboquant_hf.tools.doctor.engines import REFUSED_BY_VLLM
from turboquant_hf.tools.doctor.sizes import UNCOMPRESSED_ITEMSIZES, token_bytes

BLOCK_SIZE = BLOCK_SIZE_MULTIPLE
# With asynchronous scheduling.
BATCHES_IN_FLIGHT = 2

STATE_ITEMSIZE = 2


@dataclass(frozen=True)
class Pages:
    """What one layer stores in a block.

    Attributes:
        tokens: Tokens of a block; None for a state of fixed size, which takes one block of a request.
        nbytes: Bytes.
        window: Tokens that a token sees; None for all.
    """

    tokens: int | None
    nbytes: int
    window: int | None = None

    def blocks_of(self, length: int, batched_tokens: int) -> int:
        """Blocks that a request of that many tokens takes at most."""
        if self.tokens is None:
            return 1
        if self.window is None:
            return _ceil(length, self.tokens)
        # While a prompt is prefilled, the tokens in flight are kept beside the window, which may start inside a block.
        held = min(self.window - 1 + BATCHES_IN_FLIGHT * batched_tokens, length)
        return _ceil(held, self.tokens) + 1


@dataclass(frozen=True)
class Blocks:
    """How a model's cache is cut into blocks, which all groups of layers take from one pool.

    Attributes:
        nbytes: Bytes of a block: one page of every layer of a group.
        groups: The pages of each group.
    """

    nbytes: int
    groups: tuple[Pages, ...]

    def capacity(self, kv_bytes: int, length: int, batched_tokens: int = BATCHED_TOKENS) -> "Capacity":
        """What fits into that many bytes of each card, for requests of that many tokens."""
        num_blocks = max(0, kv_bytes) // self.nbytes
        per_request = sum(pages.blocks_of(length, batched_tokens) for pages in self.groups)
        return Capacity(num_blocks, num_blocks / per_request, int(num_blocks / per_request * length))


@dataclass(frozen=True)
class Capacity:
    """What fits.

    Attributes:
        num_blocks: Blocks of the pool.
        requests: Requests of the given length at once, as vLLM reports its maximum concurrency.
        tokens: Tokens of those, as vLLM reports the size of its cache.
    """

    num_blocks: int
    requests: float
    tokens: int


def cut_into_blocks(
    config: PreTrainedConfig, attention: ModelAttention, cache: str, tensor_parallel: int = 1, split: bool = False
) -> Blocks:
    """The blocks of a model's cache on each of `tensor_parallel` cards.

    Args:
        config: The model's configuration.
        attention: What `model_attention` read from it.
        cache: "bf16", "fp8" or a preset.
        tensor_parallel: Cards that share the heads.
        split: Whether keys are split where they can be.

    Raises:
        ValueError: If heads cannot be shared like that, or a layer's size is not known.
    """
    _check_parallel(attention, tensor_parallel)
    pages = [_pages(layer, cache, tensor_parallel, split) for layer in attention.layers if layer.has_heads]
    unknown = [layer for layer in attention.layers if layer.kind in REFUSED_BY_VLLM]
    if unknown or not pages:
        kind = unknown[0].kind if unknown else "a model without attention layers"
        raise ValueError(f"the cache of {kind} is not planned: TurboQuant for vLLM does not serve it")
    num_states = sum(layer.has_state for layer in attention.layers)
    if num_states:
        pages = _beside_states(pages, num_states, _state_bytes(config, tensor_parallel))
    if len({(page.tokens, page.window) for page in pages}) == 1:
        return Blocks(sum(page.nbytes for page in pages), (pages[0],))
    return _grouped(_equally_large(pages))


def kv_memory(memory_gib: float, share: float, weights_bytes: int, tensor_parallel: int, reserve_gib: float) -> int:
    """Bytes that are left for the cache on each card."""
    return int((memory_gib * share - reserve_gib) * GIB) - weights_bytes // tensor_parallel


def _pages(layer: LayerAttention, cache: str, tensor_parallel: int, split: bool) -> Pages:
    heads = max(1, layer.num_kv_heads // tensor_parallel)
    parts = 2 if layer.head_dim == LARGEST_HEAD_DIM and cache not in UNCOMPRESSED_ITEMSIZES else 1
    nbytes = BLOCK_SIZE * token_bytes(cache, parts * heads, layer.head_dim // parts, split)
    return Pages(BLOCK_SIZE, nbytes, layer.window)


def _beside_states(pages: list[Pages], num_states: int, state_bytes: int) -> list[Pages]:
    """Attention pages lengthened to hold a state, and the states padded to them: vLLM's pool has one page size."""
    largest = max(page.nbytes for page in pages)
    factor = _ceil(state_bytes, largest)
    longer = [Pages((page.tokens or 0) * factor, page.nbytes * factor, page.window) for page in pages]
    return longer + [Pages(None, largest * factor)] * num_states


def _equally_large(pages: list[Pages]) -> list[Pages]:
    """Smaller pages lengthened to the size of the largest, as vLLM does with layers of smaller heads."""
    largest = max(page.nbytes for page in pages)
    if any(largest % page.nbytes for page in pages):
        raise ValueError("layers whose sizes are no multiples of each other, beside windows, are not planned")
    factors = [largest // page.nbytes for page in pages]
    return [
        Pages(page.tokens and page.tokens * factor, largest, page.window)
        for page, factor in zip(pages, factors, strict=True)
    ]


def _grouped(pages: list[Pages]) -> Blocks:
    """Groups of equally many layers of one sort, as many as the rarest sort has."""
    counts = Counter(pages)
    smallest, largest = min(counts.values()), max(counts.values())
    size = largest if largest < 1.5 * smallest else smallest
    groups = chain.from_iterable([page] * _ceil(count, size) for page, count in counts.items())
    return Blocks(size * pages[0].nbytes, tuple(groups))


def _state_bytes(config: PreTrainedConfig, tensor_parallel: int) -> int:
    """Bytes of one layer's state, of the gated delta rule (Qwen3-Next and its successors)."""
    text: Any = config.get_text_config(decoder=True)
    try:
        key_width = text.linear_num_key_heads * text.linear_key_head_dim
        value_width = text.linear_num_value_heads * text.linear_value_head_dim
        convolution = (2 * key_width + value_width) * (text.linear_conv_kernel_dim - 1) * STATE_ITEMSIZE
        itemsize = 4 if getattr(text, "mamba_ssm_dtype", None) == "float32" else STATE_ITEMSIZE
        recurrent = value_width * text.linear_key_head_dim * itemsize
    except AttributeError as error:
        raise ValueError(
            f"the size of the linear attention's state in {text.model_type} is not known: {error}"
        ) from None
    return (convolution + recurrent) // tensor_parallel


def _check_parallel(attention: ModelAttention, tensor_parallel: int) -> None:
    for layer, _ in attention.groups():
        if layer.num_heads % tensor_parallel:
            raise ValueError(
                f"tensor_parallel is {tensor_parallel}; it must divide the {layer.num_heads} query heads of this model"
            )
        if layer.has_heads and max(layer.num_kv_heads, tensor_parallel) % min(layer.num_kv_heads, tensor_parallel):
            raise ValueError(
                f"tensor_parallel is {tensor_parallel}; it must divide the {layer.num_kv_heads} KV heads of layer "
                f"{layer.index}, or be a multiple of them"
            )


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
