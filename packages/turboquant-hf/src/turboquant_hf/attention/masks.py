"""The masks of `attn_implementation="turboquant"`, and what they amount to."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from turboquant_hf._compat import sdpa_mask
from turboquant_hf.attention.dispatch import check_dispatch
from turboquant_hf.inference_mode import outside_inference_mode
from turboquant_hf.storage.tables import MAX_STEP_TOKENS
from turboquant_hf.storage.traced import operation

_FACTS = "turboquant_facts"


class Rows(NamedTuple):
    """What a mask amounts to: causal, within a window, from a first token of every row on.

    Attributes:
        starts: int32 [batch_size], the first token of every row that may be seen, counted from the row's very first;
            None for all of them.
        window: Tokens that a token sees, itself included; None for all.
        doubt: float [], what is added to the output: 0, and NaN where the mask was something else. None where that has
            been looked at.
    """

    starts: torch.Tensor | None
    window: int | None
    doubt: torch.Tensor | None = None


@dataclass
class _Facts:
    """What is known of a mask that nobody has written into since it was made.

    Attributes:
        rows: What it amounts to, of a few tokens that attend on stored ones; None if it is something else.
        hides_padding: Whether it was made from a mask of padding.
        is_of_prompt: Whether it is causal, of the first tokens, over keys that are more than these.
        version: torch's count of what was written into it. A graph does not know its tensors' counts: None there.
        starts: What `prompt_starts` gave the first layer of a call, for the others to share.
    """

    rows: Rows | None
    hides_padding: bool
    is_of_prompt: bool
    version: int | None
    starts: tuple[torch.Tensor | None] | None = None


# Only tensors that outlive inference mode count what is written into them.
@outside_inference_mode
def turboquant_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **kwargs: Any
) -> torch.Tensor | None:
    """The mask that SDPA takes, bool [batch_size, 1, q_length, kv_length].

    None is for a causal one of as many queries as keys: with more keys, queries are the last tokens of a layer that
    computes these alone, and the first of a static cache.

    Where a few tokens attend on stored ones, it is compared with causal attention from a first token of every row on,
    and what it amounts to is attached for `turboquant_attention`.

    Raises:
        ValueError: If the model attends by code of its own.
    """
    check_dispatch(kwargs.get("config"))
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    sizes |= {"q_offset": q_offset, "kv_offset": kv_offset}
    mask = sdpa_mask(**sizes, **kwargs)
    is_of_prompt = mask is None and 1 < q_length < kv_length and kwargs.get("allow_is_causal_skip", True)
    if is_of_prompt:
        mask = sdpa_mask(**sizes, **{**kwargs, "allow_is_causal_skip": False})
    if mask is None:
        return None
    rows = None
    if q_length <= MAX_STEP_TOKENS and q_length < kv_length:
        # `generate` makes masks contiguous for a compiled model, and a copy would know nothing.
        mask = mask.contiguous()
        rows = _rows_of_mask(mask, q_offset, kv_offset, kwargs.get("local_size"))
    setattr(mask, _FACTS, _Facts(rows, kwargs.get("attention_mask") is not None, is_of_prompt, _version(mask)))
    return mask


def rows_of(mask: torch.Tensor) -> Rows | None:
    """What a mask amounts to; None if it is something else, or somebody else's."""
    facts = _facts(mask)
    return None if facts is None else facts.rows


def is_of_prompt(mask: torch.Tensor) -> bool:
    """Whether a mask that `turboquant_mask` made is causal among the first tokens, and hides all other keys."""
    facts = _facts(mask)
    return facts is not None and facts.is_of_prompt


@outside_inference_mode
def prompt_starts(mask: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
    """The first token of every row of a prompt that is no padding, int32 [batch_size].

    Args:
        mask: [batch_size, 1, num_tokens, num_tokens or more]. A row of padding alone starts after it.
        num_tokens: Tokens of a row.

    Returns:
        None where no row begins with padding, or the mask is not made by `turboquant_mask`.
    """
    facts = _facts(mask)
    # Layers that share a cache may compute the last of the new tokens alone.
    if facts is None or not facts.hides_padding or facts.is_of_prompt or mask.shape[2] != num_tokens:
        return None
    is_compiling = torch.compiler.is_compiling()
    if facts.starts is not None and not is_compiling:
        return facts.starts[0]
    # Every token but padding sees itself, and nobody sees padding.
    sees_itself = mask[:, 0, :, :num_tokens].diagonal(dim1=-2, dim2=-1)
    starts = torch.where(sees_itself.any(-1), first_seen(sees_itself), num_tokens).int()
    # Looking at a tensor would break the graph.
    if is_compiling:
        return starts
    facts.starts = (starts if bool(starts.any()) else None,)
    return facts.starts[0]


def first_seen(mask: torch.Tensor) -> torch.Tensor:
    """The first token that is seen, int64 [batch_size], of a mask bool [batch_size, num_tokens]; 0 where none is."""
    first: torch.Tensor = _traced_first_seen(mask) if torch.compiler.is_compiling() else _first_seen(mask)
    return first


def check_mask(mask: object) -> None:
    """Raise TypeError if a mask is neither None nor a bool or additive tensor."""
    if mask is None or (isinstance(mask, torch.Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())):
        return
    kind = f"a tensor of {mask.dtype}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
    raise TypeError(
        f'attention_mask is {kind}; attn_implementation="turboquant" takes a tensor [batch_size, 1 or num_heads, '
        "query_len, num_tokens], bool with True for what is seen, or floating point to be added to logits"
    )


def mask_of_stored(
    mask: torch.Tensor | None, query: torch.Tensor, num_tokens: int, is_causal: bool, parts: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask over what is read of a layer that stores all tokens.

    Args:
        mask: Over all tokens, bool or additive; None for a causal one, or one that hides nothing.
        query: [batch_size, num_heads, query_len, head_dim] of the last tokens.
        num_tokens: All tokens.
        is_causal: Which of the two None is.
        parts: What `Store.dequantize_parts` gave; None where every token is read once.

    Returns:
        Of the same kind; None where nothing is hidden.

    Raises:
        ValueError: If the mask is over another number of tokens.
    """
    query_len = query.shape[2]
    if mask is None and is_causal and query_len > 1:
        ends = torch.arange(num_tokens - query_len, num_tokens, device=query.device)
        mask = (torch.arange(num_tokens, device=query.device) <= ends[:, None])[None, None]
    if parts is None:
        if mask is not None:
            check_length(mask, num_tokens)
        return mask
    if mask is None:
        return parts[:, None]
    mask = over_parts(mask, num_tokens, parts)
    if mask.dtype == torch.bool:
        return mask & parts[:, None]
    return mask.masked_fill(~parts[:, None], torch.finfo(mask.dtype).min)


def over_parts(states: torch.Tensor, num_tokens: int, parts: torch.Tensor) -> torch.Tensor:
    """What is said of all tokens in the last dimension, said of those of `Store.dequantize_parts`.

    Raises:
        ValueError: If it is said of another number of tokens.
    """
    check_length(states, num_tokens)
    states = states.expand(*states.shape[:-1], num_tokens)
    return torch.cat([states, states[..., 2 * num_tokens - parts.shape[-1] :]], dim=-1)


def check_length(states: torch.Tensor, num_tokens: int, room: int | None = None) -> None:
    """Raise ValueError if what is said of tokens is not of `num_tokens`, or of the `room` of a static cache."""
    if states.shape[-1] in (1, num_tokens, room):
        return
    or_room = "" if room in (None, num_tokens) else f", or {room} as the cache has room for"
    raise ValueError(
        f"attention_mask or position_bias is {list(states.shape)}, and {num_tokens} tokens are attended to; the last "
        f"dimension must be as long{or_room}"
    )


def _facts(mask: torch.Tensor) -> _Facts | None:
    facts: _Facts | None = getattr(mask, _FACTS, None)
    if facts is None or torch.compiler.is_compiling():
        return facts
    return facts if facts.version == _version(mask) else None


def _version(mask: torch.Tensor) -> int | None:
    return None if torch.compiler.is_compiling() else mask._version


def _rows_of_mask(mask: torch.Tensor, q_offset: int | torch.Tensor, kv_offset: int, window: int | None) -> Rows | None:
    """What a mask amounts to; None if it is something else."""
    query = torch.arange(mask.shape[2], device=mask.device)[:, None] + q_offset
    token = torch.arange(mask.shape[3], device=mask.device) + kv_offset
    seen = token <= query
    if window is not None:
        seen = seen & (token > query - window)
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and torch.equal(mask, seen.expand_as(mask)):
        return Rows(None, window)
    # The first query token sees the first token that any sees.
    starts = first_seen(mask[:, 0, 0]) + kv_offset
    seen = seen & (token >= starts[:, None, None, None])
    if is_compiling:
        # Looking at a tensor would break the graph.
        is_same = (mask == seen).all()
        return Rows(starts.int(), window, torch.where(is_same, 0.0, torch.nan))
    return Rows(starts.int(), window) if torch.equal(mask, seen) else None


def _first_seen(mask: torch.Tensor) -> torch.Tensor:
    return mask.byte().argmax(-1)


# Inductor on a GPU, as of torch 2.11, cannot schedule a reduction of what it computes from this one: it takes over this
# one's ranges, which are a single element for one row. An operation of its own is left alone.
_traced_first_seen = operation(
    "first_seen(Tensor mask) -> Tensor", _first_seen, lambda mask: mask.new_empty(len(mask), dtype=torch.int64)
)
