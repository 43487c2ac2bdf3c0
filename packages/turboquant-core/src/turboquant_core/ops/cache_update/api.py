"""Quantise new keys and values and write them into the paged cache."""

import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._dispatch import (
    KnownCalls,
    check_has_kernels,
    check_is_key_transform,
    check_key_transform,
    check_one_device,
    check_pages,
    check_rows,
    check_tensor,
    check_vector_dtype,
    not_traced,
)
from turboquant_core.ops._values import checks_values
from turboquant_core.ops.cache_update.path import VECTOR_ALIGNMENT, Launch
from turboquant_core.ops.cache_update.paths import choose_path
from turboquant_core.ops.cache_update.reference import cache_update as reference_cache_update
from turboquant_core.ops.cache_update.tensors import UpdateTensors
from turboquant_core.ops.cache_update.values import check_stored_values


@not_traced
def cache_update(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: KVCacheLayout,
    *,
    key_transform: KeyTransform = IDENTITY,
    path: str = "auto",
) -> None:
    """Store every token's key and value at its slot, as `MSEQuantizer` quantises them with the layout's settings.

    The kernel and the reference compute in float32 in different orders: a code may differ by one where a rotated
    coordinate is within about 1e-6 of a boundary (with a mean, times (‖key‖ + ‖mean‖) / ‖key - mean‖, for the kernel
    subtracts it after rotating), and a scale by one float16 step. Vectors whose stored scale is not finite have
    unspecified codes.

    Slots are not read back to be checked. A token whose slot is negative, or past the last block, is not stored, and
    nothing outside the pages is written. Of several tokens with one slot any may be stored, or parts of each. Set
    TURBOQUANT_CHECK_VALUES=1 to have slots past the last block and means that are not finite refused by name.

    Args:
        key: float16, bfloat16 or float32 [num_tokens, num_kv_heads, head_dim]; any strides with a last one of 1, such
            as a view of a fused QKV tensor.
        value: The same for values, of the same type.
        pages: uint8 [num_blocks, num_kv_heads, head_bytes], written in place. Dimensions 0 and 1 may be strided.
        slot_mapping: int64 [num_tokens], block * block_size + position; negative for tokens that are not to be stored.
        layout: Where a slot's bytes lie. Its bits must be whole.
        key_transform: What keys go through first, of tensors without rows.
        path: Which implementation, by name, or "auto" for the fastest that can run; see
            `turboquant_core.ops.cache_update.paths`.

    Raises:
        TypeError: If `key_transform` is none.
        ValueError: If a type, shape, stride or device does not fit, bits are fractional, or the path cannot run.
    """
    check_is_key_transform(key_transform)
    tensors = (key, value, pages, slot_mapping, *key_transform.parts)
    misaligned = tuple(x.data_ptr() % VECTOR_ALIGNMENT for x in (key, value, pages))
    launch = _launches.look_up(
        (layout, path, *misaligned),
        tensors,
        lambda: _plan(key, value, pages, slot_mapping, layout, key_transform, path),
    )
    num_tokens, num_pages = key.shape[0], pages.shape[0]
    if checks_values():
        check_stored_values(slot_mapping, key_transform, layout, num_pages)
    if num_tokens == 0:
        return
    if launch is None:
        reference_cache_update(key, value, pages, slot_mapping, layout, key_transform=key_transform)
        return
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(pages):  # type: ignore[no-untyped-call]
        launch(UpdateTensors.of(key, value, key_transform, slot_mapping, pages), num_tokens, num_pages)


_launches: KnownCalls[Launch | None] = KnownCalls()


def _plan(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: KVCacheLayout,
    key_transform: KeyTransform,
    path: str,
) -> Launch | None:
    """Check the arguments of a call, and plan it; None for the reference."""
    check_has_kernels(layout)
    check_vector_dtype("key", key.dtype)
    check_tensor("key", key, key.dtype, (-1, layout.num_kv_heads, layout.config.head_dim))
    check_tensor("value", value, key.dtype, tuple(key.shape))
    for name, x in (("key", key), ("value", value)):
        check_rows(name, x)
    check_pages(pages, layout)
    check_tensor("slot_mapping", slot_mapping, torch.int64, (key.shape[0],))
    transform = key_transform.tensors()
    check_key_transform(transform, layout)
    check_one_device({"key": key, "value": value, "pages": pages, "slot_mapping": slot_mapping, **transform})
    chosen = choose_path(path, layout, key_transform, key, value, pages)
    if chosen is None:
        return None
    return chosen.plan(layout, key.dtype, len(key), key.device, key_transform.only_centres)
