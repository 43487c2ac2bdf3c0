"""Launch decode attention."""

from dataclasses import dataclass

import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._card import card_of
from turboquant_core.ops.decode_attention.call import AttendCall, AttendEnds, AttendTensors, AttendTransform
from turboquant_core.ops.decode_attention.path import Attend, DecodePath
from turboquant_core.ops.decode_attention.sizes import DecodeLaunch, DecodeShape


@dataclass(frozen=True)
class Attention:
    """What a call launches, planned before its data.

    Attributes:
        call: What is known of it.
        attend: Its launches.
    """

    call: AttendCall
    attend: Attend

    def __call__(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor | None,
        seq_lens: torch.Tensor,
        *,
        query_start_loc: torch.Tensor | None,
        seq_starts: torch.Tensor | None,
        seq_ends: torch.Tensor | None,
        sinks: torch.Tensor | None,
        key_transform: KeyTransform,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Attend and write `out` [num_tokens, num_heads, head_dim] and `lse` [num_tokens, num_heads] where given."""
        sizes, device, batch = self.call.sizes, self.call.device, self.call.counts.batch
        num_columns, num_kv_heads = sizes.num_columns, self.call.layout.num_kv_heads
        slots = self.call.launch.num_workers + batch
        columns = (batch, num_kv_heads, num_columns)
        tensors = AttendTensors(
            pages,
            block_table,
            seq_lens,
            seq_starts,
            seq_ends,
            query_start_loc,
            torch.empty(batch + 1, dtype=torch.int32, device=device),
            None if key_transform.mean is None else torch.empty(columns, dtype=torch.float32, device=device),
            torch.empty(slots, num_kv_heads, num_columns, sizes.num_positions, dtype=torch.float32, device=device),
            torch.empty(slots, num_kv_heads, 2, num_columns, dtype=torch.float32, device=device),
            *pages.stride()[:2],
        )
        self.attend(tensors, AttendEnds(query, AttendTransform.of(key_transform), sinks, out, lse))


def plan(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    layout: KVCacheLayout,
    path: DecodePath,
    launch: DecodeLaunch,
    *,
    batch: int,
    query_len: int,
    scale: float,
    window: int,
    softcap: float,
) -> Attention:
    """What calls with tensors like these launch; nothing of the tensors is kept."""
    call = AttendCall.of(
        query,
        pages,
        block_table,
        layout,
        launch,
        batch=batch,
        query_len=query_len,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    return Attention(call, path.plan(call))


def choose_launch(
    path: DecodePath,
    layout: KVCacheLayout,
    batch: int,
    num_columns: int,
    max_row_tokens: int,
    device: torch.device,
) -> DecodeLaunch:
    """The launch for a batch of rows of up to max_row_tokens stored tokens, with num_columns queries a KV head."""
    config = layout.config
    shape = DecodeShape(
        batch=batch,
        num_kv_heads=layout.num_kv_heads,
        head_dim=config.head_dim,
        key_bits=int(config.key_bits),
        value_bits=int(config.value_bits),
        num_columns=num_columns,
        max_tokens=batch * max_row_tokens,
    )
    return path.launch_of(shape, card_of(device))
