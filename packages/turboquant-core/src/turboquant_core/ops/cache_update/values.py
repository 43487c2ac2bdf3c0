"""What `cache_update` refuses with TURBOQUANT_CHECK_VALUES=1."""

import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._values import check_key_values, refuse


def check_stored_values(
    slot_mapping: torch.Tensor, key_transform: KeyTransform, layout: KVCacheLayout, num_blocks: int
) -> None:
    """Raise ValueError for what `cache_update` cannot store as it is told to."""
    num_slots = num_blocks * layout.block_size
    refuse(
        "slot_mapping",
        slot_mapping,
        slot_mapping >= num_slots,
        f"{num_blocks} blocks of {layout.block_size} tokens have slots up to {num_slots - 1}",
        "Give a negative slot to a token that is not to be stored",
    )
    check_key_values(key_transform)
