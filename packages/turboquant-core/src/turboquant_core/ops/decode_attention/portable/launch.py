"""Launch the portable kernel."""

from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.centroids import MAX_PERMUTED_BITS
from turboquant_core.ops.decode_attention.portable.kernel import portable_kernel
from turboquant_core.ops.decode_attention.portable.lookup import entries, entry_unit, entry_words
from turboquant_core.ops.decode_attention.sizes import overlapped


def launch(call: AttendCall, *, key_product: str, assembly: bool) -> None:
    """Write the partial results of a call.

    Args:
        call: A prepared query.
        key_product: What queries and keys are multiplied in: "float16", "int8" or "fp8".
        assembly: Whether inline assembly looks centroids up where codes are narrow enough.
    """
    # The interpreter has no inline assembly: there every path looks the same entries up by gathering.
    assembly = assembly and not interpreting()
    config, device, sizes = call.layout.config, call.operand.device, call.launch
    key_bits, value_bits = int(config.key_bits), int(config.value_bits)
    key_permute, value_permute = (assembly and bits <= MAX_PERMUTED_BITS for bits in (key_bits, value_bits))
    portable_kernel[call.grid](
        **call.arguments(call.layout.views(call.pages)),
        key_entries=(entry_words if key_permute else entries)(config.head_dim, key_bits, key_product, device),
        value_entries=(entry_words if value_permute else entries)(config.head_dim, value_bits, "float16", device),
        key_unit=entry_unit(config.head_dim, key_bits, key_product),
        padded_octet=padded_octet(config.head_dim),
        tile=sizes.tile,
        key_product=key_product,
        key_permute=key_permute,
        value_permute=value_permute,
        widen=interpreting(),
        num_warps=sizes.num_warps,
        **overlapped(sizes),
    )
