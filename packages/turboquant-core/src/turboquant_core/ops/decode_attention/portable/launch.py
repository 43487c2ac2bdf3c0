"""Launch the portable kernel."""

from functools import partial

from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.centroids import MAX_PERMUTED_BITS
from turboquant_core.ops.decode_attention.portable.kernel import portable_kernel
from turboquant_core.ops.decode_attention.portable.lookup import entries, entry_unit, entry_words
from turboquant_core.ops.decode_attention.sizes import overlapped


def plan(call: AttendCall, *, key_product: str, assembly: bool) -> "partial[None]":
    """The kernel with its grid, tables and options: what `DecodePath.plan` gives.

    Args:
        call: What is known of a call.
        key_product: What queries and keys are multiplied in: "float16", "int8" or "fp8".
        assembly: Whether inline assembly looks centroids up where codes are narrow enough.
    """
    # The interpreter has no inline assembly: there every path looks the same entries up by gathering.
    assembly = assembly and not interpreting()
    layout, device, sizes = call.layout, call.device, call.launch
    head_dim, key_bits, value_bits = layout.head_dim, layout.stored_keys.bits, layout.stored_values.bits
    key_permute, value_permute = (assembly and bits <= MAX_PERMUTED_BITS for bits in (key_bits, value_bits))
    return partial(
        portable_kernel[call.grid],
        **call.arguments(),
        key_entries=(entry_words if key_permute else entries)(head_dim, key_bits, key_product, device),
        value_entries=(entry_words if value_permute else entries)(head_dim, value_bits, "float16", device),
        key_unit=entry_unit(head_dim, key_bits, key_product),
        padded_octet=padded_octet(head_dim),
        key_product=key_product,
        key_permute=key_permute,
        value_permute=value_permute,
        widen=interpreting(),
        num_warps=sizes.num_warps,
        **overlapped(sizes),
    )
