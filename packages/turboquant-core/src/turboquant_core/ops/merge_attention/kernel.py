"""`merge_attention` as one Triton kernel."""

import triton
import triton.language as tl


# The number of dense tokens is one for good; lengths, rows and strides of a query change from call to call.
@triton.jit(do_not_specialize=["num_heads", "query_len", "query_row_stride", "query_head_stride", "query_token_stride"])
def merge_kernel(
    query,  # [batch_size, num_heads, query_len, head_dim], last stride 1
    keys,  # [batch_size, num_kv_heads, num_dense, head_dim], the last two dimensions contiguous
    values,  # with the strides of keys
    bias,  # float32 [1 or batch_size, query_len, num_dense]
    codes,  # [batch_size, query_len, num_heads, head_dim], or None
    codes_lse,  # float32 [batch_size, query_len, num_heads], or None
    sinks,  # float32 [num_heads], or None
    output,  # out, [batch_size, query_len, num_heads, head_dim]
    scale,
    softcap,
    num_heads,
    query_len,
    num_dense,
    query_row_stride,
    query_head_stride,
    query_token_stride,
    dense_row_stride,
    dense_head_stride,
    bias_row_stride,  # 0 where all rows see the same
    has_softcap: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_tokens: tl.constexpr,
):
    """One program for a query head of a token of a row; what is dense is small, and read again by heads of a group."""
    place = tl.program_id(0).to(tl.int64)
    head = place % num_heads
    token = place // num_heads % query_len
    row = place // num_heads // query_len
    channel = tl.arange(0, block_dim)
    real = channel < head_dim
    source = query + row * query_row_stride + head * query_head_stride + token * query_token_stride
    q = tl.load(source + channel, mask=real, other=0.0).to(tl.float32) * scale
    first = row * dense_row_stride + head // group * dense_head_stride
    seen = bias + row * bias_row_stride + token * num_dense

    # The lowest that is finite: a block that is hidden altogether must not give minus infinity less itself.
    top = -3.0e38
    total = 0.0
    result = tl.zeros([block_dim], tl.float32)
    for base in range(0, num_dense, block_tokens):
        index = base + tl.arange(0, block_tokens)
        inside = index < num_dense
        at = first + index[:, None] * head_dim + channel[None, :]
        mask = inside[:, None] & real[None, :]
        key = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)
        logit = tl.sum(key * q[None, :], axis=1)
        if has_softcap:
            logit = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logit / softcap) + 1.0))
        logit += tl.load(seen + index, mask=inside, other=float("-inf"))
        highest = tl.maximum(top, tl.max(logit, axis=0))
        weight = tl.exp(logit - highest)
        rescale = tl.exp(top - highest)
        value = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        result = result * rescale + tl.sum(weight[:, None] * value, axis=0)
        total = total * rescale + tl.sum(weight, axis=0)
        top = highest
    if codes is not None:
        logit = tl.load(codes_lse + place)
        highest = tl.maximum(top, logit)
        weight = tl.exp(logit - highest)
        rescale = tl.exp(top - highest)
        value = tl.load(codes + place * head_dim + channel, mask=real, other=0.0).to(tl.float32)
        result = result * rescale + weight * value
        total = total * rescale + weight
        top = highest
    if sinks is not None:
        logit = tl.load(sinks + head)
        highest = tl.maximum(top, logit)
        rescale = tl.exp(top - highest)
        result *= rescale
        total = total * rescale + tl.exp(logit - highest)
    tl.store(output + place * head_dim + channel, (result / total).to(output.dtype.element_ty), mask=real)
