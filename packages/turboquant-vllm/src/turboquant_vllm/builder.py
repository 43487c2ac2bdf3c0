"""Describes batches to the layers."""

from typing import Any, ClassVar

import torch

from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_core.raw_copies import CopyRows
from turboquant_vllm._compat.interface import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from turboquant_vllm._compat.worker import split_decodes_and_prefills
from turboquant_vllm.batch.metadata import DecodeRows, TurboQuantMetadata
from turboquant_vllm.batch.prefill_rows import PrefillRows
from turboquant_vllm.key_transforms.from_file import give_transforms
from turboquant_vllm.key_transforms.from_texts import give_text_means
from turboquant_vllm.raw_copies import GroupCopies, most_query_tokens
from turboquant_vllm.refusals import INSTEAD
from turboquant_vllm.settings import Settings
from turboquant_vllm.warm_up import warm_up
from turboquant_vllm.workspace import workspace_tokens


class TurboQuantMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Builds `TurboQuantMetadata` without waiting for the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # Longer drafts are verified as prefills.
        self.reorder_batch_threshold: int = self.reorder_batch_threshold or 1
        if self.reorder_batch_threshold > MAX_QUERY_LEN:
            self.reorder_batch_threshold = 1
        self._workspace_tokens = workspace_tokens(
            vllm_config.scheduler_config.max_num_batched_tokens,
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            vllm_config.model_config.dtype,
        )
        settings = Settings.of_engine(vllm_config)
        self._copies = GroupCopies(layer_names, vllm_config, settings, device) if settings.keeps_copies else None
        if settings.calibration is not None:
            give_transforms(settings.calibration, layer_names, vllm_config, codes_only=settings.reads_first_codes)
        elif settings.center_keys:
            give_text_means(layer_names, vllm_config, device)
        if device.type == "cuda" and vllm_config.kernel_config.enable_jit_warmup:
            warm_up(kv_cache_spec, layer_names, vllm_config, self.reorder_batch_threshold, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Graphs hold decode rows: one token each, or those of a draft that decode attention takes."""
        if most_query_tokens(vllm_config) > MAX_QUERY_LEN:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TurboQuantMetadata:
        """Split the batch."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(f"TurboQuant attends causally, and this batch does not. {INSTEAD}")
        num_decodes, num_prefills, num_decode_tokens, num_prefill_tokens = split_decodes_and_prefills(
            common, self.reorder_batch_threshold
        )
        decode = prefill = None
        copies = None if self._copies is None else self._copies.of_step(common)
        if num_decodes:
            lens = common.query_start_loc_cpu[: num_decodes + 1].diff()
            max_query_len = max(1, int(lens.max()))
            one_each = num_decode_tokens == num_decodes and max_query_len == 1
            decode = DecodeRows(
                num_tokens=num_decode_tokens,
                max_query_len=max_query_len,
                query_start_loc=None if one_each else common.query_start_loc[: num_decodes + 1],
                seq_lens=common.seq_lens[:num_decodes],
                block_table=common.block_table_tensor[:num_decodes],
                copies=None if copies is None else copies.decoding(num_decodes, max_query_len, one_each=one_each),
            )
        if num_prefills:
            prefill = self._prefill_rows(common, num_decodes, num_prefill_tokens, copies)
        return TurboQuantMetadata(decode, prefill)

    def _prefill_rows(
        self, common: CommonAttentionMetadata, first: int, num_tokens: int, copies: CopyRows | None
    ) -> PrefillRows:
        rows = slice(first, common.num_reqs)
        query_lens_cpu = common.query_start_loc_cpu[first : common.num_reqs + 1].diff()
        # Exact for rows that prefill.
        seq_lens_cpu = common.seq_lens_cpu_upper_bound
        if seq_lens_cpu is None:
            raise ValueError("vLLM gave no sequence lengths on the CPU, which prefill is planned with")
        starts = common.query_start_loc[first : common.num_reqs + 1]
        return PrefillRows(
            num_tokens=num_tokens,
            max_query_len=int(query_lens_cpu.max()),
            query_start_loc=starts - starts[0],
            context_lens=common.seq_lens[rows] - starts.diff(),
            context_lens_cpu=(seq_lens_cpu[rows] - query_lens_cpu).tolist(),
            query_lens_cpu=query_lens_cpu.tolist(),
            block_table=common.block_table_tensor[rows],
            copies=None if copies is None else copies.between(first, common.num_reqs),
            workspace_tokens=self._workspace_tokens,
        )
