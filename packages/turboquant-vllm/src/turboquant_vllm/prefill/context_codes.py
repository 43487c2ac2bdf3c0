"""Few new tokens over a long stored context: attention on the codes, without dequantising them into memory."""

import torch

from turboquant_core import KVCacheLayout
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import decode_attention
from turboquant_core.ops.merge_attention import merge_copies
from turboquant_vllm.batch.prefill_rows import TokenGroups
from turboquant_vllm.prefill.raw_context import RawContext


def attend_on_codes(
    query: torch.Tensor,
    pages: torch.Tensor,
    groups: TokenGroups,
    layout: KVCacheLayout,
    *,
    scale: float,
    softcap: float | None,
    key_transform: KeyTransform,
    raw: RawContext | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the groups' tokens on all of their context; nothing for tokens in no group.

    The tokens of a group count as query heads of one token: so each sees all of the context and none of the others.

    Args:
        query: [num_tokens, num_heads, head_dim].
        pages: uint8 [num_blocks, num_kv_heads, head_bytes].
        groups: Of the query's tokens.
        layout: Of the pages.
        scale: What logits are multiplied with.
        softcap: As in `decode_attention`.
        key_transform: As in `decode_attention`.
        raw: What is raw of the rows' contexts, or None.

    Returns:
        The output like `query`, and the natural log-sum-exp, float32 [num_heads, num_tokens].
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = layout.num_kv_heads
    kv_head = torch.arange(num_kv_heads, device=query.device)
    by_kv_head = query.view(num_tokens, num_kv_heads, -1, head_dim)
    # [groups, num_kv_heads, group_len, heads of a KV head, head_dim]
    gathered = by_kv_head[groups.token[:, None], kv_head[:, None]]
    gathered_query = gathered.view(len(gathered), -1, head_dim)
    of_groups = None if raw is None else raw.of_groups(groups)
    out, lse = decode_attention(
        gathered_query,
        pages,
        groups.block_table,
        groups.seq_lens,
        layout,
        scale=scale,
        seq_starts=None if of_groups is None else of_groups.codes.starts,
        seq_ends=None if of_groups is None else of_groups.codes.ends,
        softcap=softcap,
        key_transform=key_transform,
        return_lse=True,
    )
    if of_groups is not None:
        merge_copies(
            gathered_query,
            out,
            lse,
            of_groups.rows,
            of_groups.copies,
            of_groups.codes,
            scale=scale,
            softcap=softcap,
            key_mean=of_groups.key_mean,
            follows_attention=True,
        )
    token = (groups.group, slice(None), groups.place)
    lse = lse.view(gathered.shape[:-1])[token].reshape(num_tokens, num_heads).T.contiguous()
    return out.view(gathered.shape)[token].reshape(query.shape), lse
