"""Launch the kernel of `merge_attention`."""

import torch

# Says what is missing where Triton is.
import turboquant_core.ops._triton  # noqa: F401
from turboquant_core.ops.merge_attention.kernel import merge_kernel

BLOCK_TOKENS = 32
# More than that rarely helps, and every number of warps is another kernel to compile.
NUM_WARPS = 4


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    codes: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `turboquant_core.ops.merge_attention`."""
    batch_size, num_heads, query_len, head_dim = query.shape
    output = torch.empty(batch_size, query_len, num_heads, head_dim, dtype=query.dtype, device=query.device)
    if query.stride(3) != 1:
        query = query.contiguous()
    codes_output, codes_lse = (None, None) if codes is None else codes
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        merge_kernel[(batch_size * query_len * num_heads,)](
            query=query,
            keys=keys,
            values=values,
            bias=bias,
            codes=codes_output,
            codes_lse=codes_lse,
            sinks=sinks,
            output=output,
            scale=head_dim**-0.5 if scale is None else scale,
            softcap=softcap or 0.0,
            num_heads=num_heads,
            query_len=query_len,
            num_dense=keys.shape[2],
            query_row_stride=query.stride(0),
            query_head_stride=query.stride(1),
            query_token_stride=query.stride(2),
            dense_row_stride=keys.stride(0),
            dense_head_stride=keys.stride(1),
            bias_row_stride=0 if len(bias) == 1 else bias.stride(0),
            has_softcap=bool(softcap),
            group=num_heads // keys.shape[1],
            head_dim=head_dim,
            # The next power of two; Triton's own function, one of its compiler, takes the host many times as long.
            block_dim=1 << (head_dim - 1).bit_length(),
            block_tokens=BLOCK_TOKENS,
            num_warps=NUM_WARPS,
        )
    return output
