"""Which channels of keys a model's rotary embedding turns together, seen from what it does to keys.

Models pair channels in different ways, some turn a part of them alone, and some layers none. A token that is alone
attends to itself, so its keys in every layer are the same at every position but for the rotary embedding. Whatever
keeps the lengths of supposed pairs from position to position is right about them.
"""

import inspect
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from turboquant_core.model_identity import ModelIdentity
from turboquant_hf._compat import with_cache
from turboquant_hf.tools.calibrate.watch import WatchedCache

NUM_TOKENS = 32
# A far one too, where channels that turn slowly have moved. Models of long contexts change their embedding beyond.
POSITIONS = (0, 7, 4095)
# Of the length of a pair: 16-bit types, in which keys and the cosines are rounded, err by less than 0.01.
TOLERANCE = 0.05


@torch.inference_mode()
def rotary_pairs(
    model: PreTrainedModel, input_ids: torch.Tensor, identity: ModelIdentity
) -> dict[int, torch.Tensor | str]:
    """Which pair each channel of a layer's keys is of, as `pair_transform` takes it, or why that is not known.

    Args:
        model: The model.
        input_ids: int64 [1, num_tokens], some tokens of a text.
        identity: Of the model.
    """
    cache = WatchedCache(config=model.config)
    tokens = input_ids[0, :NUM_TOKENS].to(model.device)
    last = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(POSITIONS) + 1) - 1
    positions = torch.tensor(sorted({min(position, last) for position in POSITIONS}), device=model.device)
    is_told = "position_ids" in inspect.signature(model.forward).parameters
    rows = {"position_ids": positions.repeat_interleave(len(tokens))[:, None]} if is_told else {}
    model(input_ids=tokens.repeat(len(positions))[:, None], **rows, **with_cache(cache), logits_to_keep=1)
    if not is_told and identity.rope_theta:
        return dict.fromkeys(cache.new_keys, "the model takes no positions, which would show its rotary pairs")
    return {
        index: _pairs(states[:, :, 0].double().view(len(positions), -1, states.shape[-1]), bool(identity.rope_theta))
        for index, states in cache.new_keys.items()
    }


def _pairs(keys: torch.Tensor, is_rotary: bool) -> torch.Tensor | str:
    """The pairs of keys [num_positions, any, head_dim] that differ in nothing but the position."""
    energy = keys.square()
    for pairs in _guesses(keys.shape[-1]):
        lengths = energy.new_zeros(energy.shape).index_add_(-1, pairs.to(keys.device), energy)
        changes = (lengths - lengths[:1]).square().sum((0, 1)).sqrt()
        if bool((changes <= TOLERANCE * lengths.square().sum((0, 1)).sqrt()).all()):
            return pairs
    # Positions that are added to what layers read turn nothing.
    return "its rotary embedding turns channels in no pairs that are known" if is_rotary else _single(keys.shape[-1])


def _guesses(head_dim: int) -> Iterator[torch.Tensor]:
    """Numbers of pairs, int64 [head_dim] below head_dim, in the order in which the first that fits is right."""
    single = _single(head_dim)
    yield single
    for rotary_dim in range(2, head_dim + 1, 2):
        yield torch.cat([torch.arange(rotary_dim // 2).repeat(2), single[rotary_dim:]])
    # All of them: slow neighbours look like single ones, and what holds for pairs holds for single ones.
    yield torch.arange(head_dim // 2).repeat_interleave(2)


def _single(head_dim: int) -> torch.Tensor:
    return torch.arange(head_dim)
