"""Attention on dense keys and values of many rows in one call: FlashAttention, or PyTorch on CPUs."""

import math
from dataclasses import dataclass

import torch

from turboquant_vllm._compat.flash import flash_attention, merge_on_gpu


@dataclass(frozen=True)
class DenseAttention:
    """Attention of one layer.

    Attributes:
        scale: What logits are multiplied with.
        window: Positions that a token sees, itself included; None for all.
        softcap: Logits become softcap * tanh(logits / softcap); None for none.
        fa_version: FlashAttention's, or None for PyTorch.
    """

    scale: float
    window: int | None
    softcap: float | None
    fa_version: int | None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_start_loc: torch.Tensor,
        key_start_loc: torch.Tensor,
        max_query_len: int,
        max_key_len: int,
        *,
        causal: bool,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend row by row; a causal mask and the window are aligned to the rows' last tokens.

        Args:
            query: [num_query_tokens, num_heads, head_dim].
            key: [num_key_tokens, num_kv_heads, head_dim]; tokens past the last row are not read.
            value: The same for values.
            query_start_loc: int32 [rows + 1].
            key_start_loc: int32 [rows + 1].
            max_query_len: The most query tokens of a row.
            max_key_len: The most keys of a row.
            causal: Whether tokens see no later ones.
            sinks: [num_heads], a logit of each head that takes weight and gives no value.
            out: Like `query`, to write the output into.

        Returns:
            The output, like `query`, and the natural log-sum-exp, float32 [num_heads, num_query_tokens]; minus infinity
            where nothing is seen.
        """
        if self.fa_version is None:
            out = torch.empty_like(query) if out is None else out
            return out, self._eager(query, key, value, query_start_loc, key_start_loc, causal, sinks, out.zero_())
        out, lse = flash_attention(
            query,
            key,
            value,
            query_start_loc=query_start_loc,
            key_start_loc=key_start_loc,
            max_query_len=max_query_len,
            max_key_len=max_key_len,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=sinks,
            causal=causal,
            version=self.fa_version,
            out=out,
        )
        if self.fa_version == 2:
            # It says plus infinity where a row sees nothing.
            lse = torch.where(lse == math.inf, -math.inf, lse)
        return out, lse

    def _eager(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_start_loc: torch.Tensor,
        key_start_loc: torch.Tensor,
        causal: bool,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        num_tokens, num_heads, _ = query.shape
        group = num_heads // key.shape[1]
        lse = torch.full((num_heads, num_tokens), -math.inf, dtype=torch.float32, device=query.device)
        query_bounds, key_bounds = query_start_loc.tolist(), key_start_loc.tolist()
        for row in range(len(query_bounds) - 1):
            queries = slice(query_bounds[row], query_bounds[row + 1])
            keys = slice(key_bounds[row], key_bounds[row + 1])
            q = query[queries].float().transpose(0, 1)
            k, v = (x[keys].float().transpose(0, 1).repeat_interleave(group, dim=0) for x in (key, value))
            logits = q @ k.transpose(1, 2) * self.scale
            if self.softcap:
                logits = self.softcap * (logits / self.softcap).tanh()
            ahead = torch.arange(k.shape[1])[None, :] - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
            if causal:
                logits = logits.masked_fill(ahead > 0, -math.inf)
            if self.window is not None:
                logits = logits.masked_fill(ahead <= -self.window, -math.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks.float()[:, None, None].expand(-1, q.shape[1], 1)], dim=-1)
            row_lse = logits.logsumexp(-1)
            weights = (logits - row_lse.masked_fill(row_lse.isneginf(), 0)[..., None]).exp()
            out[queries] = (weights[..., : v.shape[1]] @ v).transpose(0, 1).to(out.dtype)
            lse[:, queries] = row_lse
        return lse


def merge(
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on two sets of keys from that on each: outputs [num_tokens, num_heads, head_dim] and log-sum-exps.

    The output is written into `out` if it is given.
    """
    (first_out, first_lse), (second_out, second_lse) = first, second
    out = torch.empty_like(first_out) if out is None else out
    if out.is_cuda:
        return out, merge_on_gpu(first, second, out)
    lse = torch.logaddexp(first_lse, second_lse)
    shift = lse.masked_fill(lse.isneginf(), 0)
    first_weight, second_weight = ((part - shift).exp().T[..., None] for part in (first_lse, second_lse))
    return out.copy_(first_out * first_weight + second_out * second_weight), lse
