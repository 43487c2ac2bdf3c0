"""A layout as kernels take it."""

from turboquant_core.layout import KVCacheLayout


def layout_constants(layout: KVCacheLayout) -> dict[str, int]:
    """Sizes of a layout, and offsets and strides of its planes in bytes, by the names that kernels have for them."""
    config = layout.config
    return {
        "num_kv_heads": layout.num_kv_heads,
        "block_size": layout.block_size,
        "head_dim": config.head_dim,
        "key_bits": int(config.key_bits),
        "value_bits": int(config.value_bits),
        "key_codes": layout.key_codes.offset,
        "value_codes": layout.value_codes.offset,
        "key_scales": layout.key_scales.offset,
        "value_scales": layout.value_scales.offset,
        "key_code_stride": layout.key_codes.slot_stride,
        "value_code_stride": layout.value_codes.slot_stride,
        "key_scale_stride": layout.key_scales.slot_stride,
        "value_scale_stride": layout.value_scales.slot_stride,
    }
