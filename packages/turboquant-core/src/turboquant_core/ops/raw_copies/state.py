"""What a table of copies remembers."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CopyState:
    """What a table remembers, all int32; each has one element more, for what is not to be written.

    Attributes:
        copy_of_slot: [num_slots + 1], the copy that a slot had last, or -1.
        slot_of_copy: [num_copies + 1], the slot of a copy, or -1: it says whether a slot still has it.
        used: [num_copies + 1], the last step that used a copy; 0 for none.
        free: [num_copies], scratch.
    """

    copy_of_slot: torch.Tensor
    slot_of_copy: torch.Tensor
    used: torch.Tensor
    free: torch.Tensor
