"""`cache_update` in plain PyTorch."""

import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.split import quantizer_of


@torch.no_grad()
def cache_update(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: KVCacheLayout,
    *,
    key_transform: KeyTransform = IDENTITY,
) -> None:
    """See `turboquant_core.ops.cache_update`."""
    config = layout.config
    views = layout.views(pages)
    kept = (slot_mapping >= 0) & (slot_mapping < len(pages) * layout.block_size)
    slots = slot_mapping[kept]
    block, position = slots // layout.block_size, slots % layout.block_size
    key, value = key_transform.of_keys(key[kept]), value[kept]
    stored_key = quantizer_of(config.key_format, config.key_scale).quantize(key)
    stored_value = quantizer_of(config.value_format, config.value_scale).quantize(value)
    views.key_codes[block, :, position] = stored_key.codes
    views.key_scales[block, :, position] = stored_key.scales
    views.value_codes[block, :, position] = stored_value.codes
    views.value_scales[block, :, position] = stored_value.scales
