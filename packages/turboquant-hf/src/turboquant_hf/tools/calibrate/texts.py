"""The texts that keys are measured on, and the parts of them that are held out."""

from collections.abc import Sequence
from importlib.resources import files

import torch


def shipped_texts() -> tuple[str, ...]:
    """Texts of several kinds, in an order that never changes; none of them is one that other commands score."""
    paths = sorted((files(__package__) / "texts").iterdir(), key=lambda path: path.name)
    return tuple(path.read_text(encoding="utf-8") for path in paths)


def split_tokens(texts: Sequence[torch.Tensor], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens to measure, and a quarter as many again of the same texts to try on, which follow after all of them.

    Args:
        texts: int64 [any], the tokens of every text.
        num_tokens: The most of all of them; each text has an equal share, and what a short one leaves goes to others.

    Returns:
        Two int64 [1, any].
    """
    shares, room = {}, num_tokens
    for waiting, index in enumerate(sorted(range(len(texts)), key=lambda index: len(texts[index]))):
        shares[index] = min(len(texts[index]), room // (len(texts) - waiting))
        room -= shares[index]
    measured = [text[: shares[index] - shares[index] // 5] for index, text in enumerate(texts)]
    held_out = [text[shares[index] - shares[index] // 5 : shares[index]] for index, text in enumerate(texts)]
    return torch.cat(measured)[None], torch.cat(held_out)[None]
