"""Attend on dense tokens, merged with what attention on codes gave."""

import torch

from turboquant_core.ops.merge_attention.reference import merge_attention as reference_merge_attention


def merge_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    codes: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One softmax over dense tokens and codes, in float32; one kernel on a GPU.

    The codes take part as one more token of each query head: its logit is their log-sum-exp, its value their output.
    Arguments are not checked.

    Args:
        query: [batch_size, num_heads, query_len, head_dim].
        keys: [batch_size, num_kv_heads, num_dense, head_dim], the last two dimensions contiguous.
        values: The same, with the strides of keys.
        bias: float32 [1 or batch_size, query_len, num_dense], added to logits; minus infinity for what is not seen.
        codes: The output [batch_size, query_len, num_heads, head_dim] of attention on the codes without sinks, and its
            log-sum-exp float32 [batch_size, query_len, num_heads]; None where no token sees any.
        scale: What logits are multiplied with; None is 1 / sqrt(head_dim).
        softcap: Logits of dense tokens become softcap * tanh(logits / softcap).
        sinks: float32 [num_heads], a logit of each head that takes weight and gives no value.

    Returns:
        [batch_size, query_len, num_heads, head_dim], of the query's type, contiguous.
    """
    # What torch.compile traces it fuses by itself.
    if query.is_cuda and not torch.compiler.is_compiling():
        from turboquant_core.ops.merge_attention.launch import launch

        return launch(query, keys, values, bias, codes, scale=scale, softcap=softcap, sinks=sinks)
    return reference_merge_attention(query, keys, values, bias, codes, scale=scale, softcap=softcap, sinks=sinks)
