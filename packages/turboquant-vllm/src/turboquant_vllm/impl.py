"""Attention of one layer."""

from functools import cache
from typing import Any

import torch

from turboquant_core import KVCacheLayout
from turboquant_core.ops import cache_update, decode_attention
from turboquant_core.ops.merge_attention import merge_copies
from turboquant_core.ops.raw_copies import copy_update
from turboquant_core.raw_copies import RawCopies
from turboquant_vllm._compat.engine import all_layers, current_config, use_config
from turboquant_vllm._compat.flash import flash_version
from turboquant_vllm._compat.interface import AttentionImpl, AttentionType, current_platform
from turboquant_vllm._compat.registry import own_backend
from turboquant_vllm.artifacts import calibration_of
from turboquant_vllm.batch.metadata import DecodeRows, TurboQuantMetadata
from turboquant_vllm.dense_attention import DenseAttention
from turboquant_vllm.layer_pages import LayerPages, leave_to
from turboquant_vllm.layer_transform import LayerTransform
from turboquant_vllm.prefill.attention import Prefill
from turboquant_vllm.prefill.raw_context import RawContext
from turboquant_vllm.raw_copies import num_copies
from turboquant_vllm.refusals import INSTEAD, check_layer, engine_problems
from turboquant_vllm.settings import process_settings
from turboquant_vllm.workspace import take_workspace, workspace_tokens


class TurboQuantImpl(AttentionImpl[Any]):
    """Stores keys and values as codes and attends on them."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        config, settings = current_config(), process_settings()
        if problems := engine_problems(config, settings):
            raise ValueError(" ".join(problems))
        check_layer(
            head_size=head_size,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
            alibi_slopes=alibi_slopes,
            extra=extra,
        )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.softcap = logits_soft_cap or None
        self.sinks = sinks
        self._shares_with = kv_sharing_target_layer_name
        self.config = settings.cache_config(head_size)
        self._settings = settings
        # Which layer this is shows once the model is built; a file that does not fit is refused here.
        self._layer_pages = LayerPages.of_engine(config, settings)
        self._engine_config = config
        device = torch.device("cpu" if current_platform.is_cpu() else "cuda")
        if settings.calibration is not None:
            # A file that does not fit is refused here, before weights are loaded.
            calibration_of(config.model_config, settings.calibration)
        self._num_copies = num_copies(config, settings)
        self._copies: RawCopies | None = None
        self._copies_of: TurboQuantImpl = self
        self.key_transform = LayerTransform(device)
        if not settings.center_keys:
            # Else the builder settles it, for it knows which layer this is.
            self.key_transform.settle()
        self.dense_attention = DenseAttention(
            self.scale, sliding_window, self.softcap, None if device.type == "cpu" else _flash_version(head_size, sinks)
        )
        self._float_sinks: torch.Tensor | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Prepare what depends on weights; after a reload at the addresses that CUDA graphs have."""
        if self._shares_with is not None:
            self._share(self._shares_with)
        elif self._layer_pages is not None:
            name, layer = self._layer_pages.layer_of(self)
            if self._layer_pages.is_skipped(name, layer):
                self._leave_uncompressed(layer, act_dtype)
                return
            self.config = self._settings.cache_config(self.head_size, self._layer_pages.give_bits(name, layer))
        if self.sinks is not None:
            if self._float_sinks is None:
                self._float_sinks = torch.empty_like(
                    self.sinks, dtype=torch.float32, memory_format=torch.contiguous_format
                )
            self._float_sinks.copy_(self.sinks)
        self.key_transform.restore()

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values [num_tokens, num_kv_heads, head_dim] at their slots."""
        num_tokens = len(slot_mapping)
        key, value = key[:num_tokens], value[:num_tokens]
        pages, layout = self._pages(kv_cache)
        cache_update(key, value, pages, slot_mapping, layout, key_transform=self.key_transform.settled)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TurboQuantMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with query [num_tokens, num_heads, head_dim] and write `output` of the same shape.

        A layer that shares the cache of another reads all from the codes.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("TurboQuant does not quantise its output; turn the fusion of that off")
        if attn_metadata is None:
            return self._profile(query, output)
        pages, layout = self._pages(kv_cache)
        # vLLM 0.29 gives a layer that shares a cache keys and values all the same, which nobody stores.
        own = None if self._shares_with is not None or key is None or value is None else (key, value)
        first = 0
        if decode := attn_metadata.decode:
            first = decode.num_tokens
            self._decode(query[:first], own, pages, layout, decode, output[:first])
        if rows := attn_metadata.prefill:
            tokens = slice(first, first + rows.num_tokens)
            own = None if own is None else (own[0][tokens], own[1][tokens])
            raw = None
            if rows.copies is not None:
                copies = self.copies(query.dtype, query.device)
                codes = copy_update(own, pages, rows.copies, copies, layout, reads_new=False, follows_update=True)
                raw = RawContext(rows.copies, copies, codes)
            prefill = Prefill(self.dense_attention, layout, self.sinks)
            prefill(query[tokens], own, pages, rows, self.key_transform.settled, output[tokens], raw)
        return output

    def _decode(
        self,
        query: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor] | None,
        pages: torch.Tensor,
        layout: KVCacheLayout,
        rows: DecodeRows,
        output: torch.Tensor,
    ) -> None:
        """Attend on codes, and on copies where there are some."""
        options: dict[str, Any] = {"scale": self.scale, "window": self.sliding_window, "softcap": self.softcap}
        arguments = (query, pages, rows.block_table, rows.seq_lens, layout)
        options_of_codes: dict[str, Any] = {
            **options,
            "query_start_loc": rows.query_start_loc,
            "max_query_len": rows.max_query_len,
            "sinks": self._float_sinks,
            "key_transform": self.key_transform.settled,
            "out": output,
        }
        if rows.copies is None:
            decode_attention(*arguments, **options_of_codes)
            return
        copies = self.copies(query.dtype, query.device)
        codes = copy_update(own, pages, rows.copies, copies, layout, follows_update=True)
        out, lse = decode_attention(
            *arguments, **options_of_codes, seq_starts=codes.starts, seq_ends=codes.ends, return_lse=True
        )
        merge_copies(query, out, lse, rows.copies, copies, codes, follows_attention=True, **options)

    def copies(self, dtype: torch.dtype, device: torch.device) -> RawCopies:
        """The layer's raw copies of keys and values of a type, or those of the layer whose cache it shares."""
        owner = self._copies_of
        if owner._copies is None:
            owner._copies = RawCopies.allocate(owner.config, owner.num_kv_heads, owner._num_copies, dtype, device)
        return owner._copies

    def _share(self, target: str) -> None:
        """Read what the layer whose cache this one shares has stored, as that one stores it.

        Raises:
            ValueError: If that one stays uncompressed.
        """
        other = all_layers(self._engine_config)[target].impl
        if not isinstance(other, TurboQuantImpl):
            raise ValueError(
                f"{target} stays uncompressed, and a layer that shares its cache is served by TurboQuant. "
                "Leave --kv-cache-dtype-skip-layers out."
            )
        self.config, self.key_transform, self._copies_of = other.config, other.key_transform, other

    def _leave_uncompressed(self, layer: Any, act_dtype: torch.dtype) -> None:
        """Leave the layer to vLLM's own backend from now on."""
        named = {} if self.sinks is None else {"sinks": self.sinks}
        with use_config(self._engine_config):
            impl = leave_to(
                own_backend(), layer, self.num_heads, self.head_size, self.scale, self.num_kv_heads, None,
                self.sliding_window, self.kv_cache_dtype, self.softcap, **named,
            )  # fmt: skip
        impl.process_weights_after_loading(act_dtype)
        self.key_transform.settle()
        layer.left_by = self

    def _pages(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, KVCacheLayout]:
        """Pages of vLLM's uint8 [num_blocks, num_kv_heads, block_size, slot_bytes], whose planes lie otherwise."""
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        layout = _layout(self.config, num_kv_heads, block_size)
        # A view, which fails where flatten would copy and what is written would be lost. vLLM's slots may be larger.
        return kv_cache.view(num_blocks, num_kv_heads, -1)[..., : layout.head_bytes], layout

    def _profile(self, query: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Take what prefill takes at most, for vLLM to leave that much free."""
        most = self._engine_config.scheduler_config.max_num_batched_tokens
        num_tokens = workspace_tokens(most, self.num_kv_heads, self.head_size, query.dtype)
        if self.sliding_window is not None:
            # A row's window is dequantised whole.
            longest = self._engine_config.model_config.max_model_len
            num_tokens = max(num_tokens, min(self.sliding_window - 1 + most, longest))
        if self._shares_with is not None:
            # Its own tokens are dequantised, and rotated back.
            num_tokens += 2 * most
        restores_keys = self._settings.calibration is not None
        if self._num_copies:
            # What stays, for vLLM to count.
            self.copies(query.dtype, query.device)
        take_workspace(query, self.num_kv_heads, num_tokens, restores_keys=restores_keys)
        return output.zero_()


# Made twice for every layer of every step, it would cost as much as a launch.
_layout = cache(KVCacheLayout)


def _flash_version(head_size: int, sinks: torch.Tensor | None) -> int:
    version = flash_version(head_size, has_sinks=sinks is not None)
    if version is None or (head_size > 256 and version < 4):
        raise ValueError(
            f"vLLM has no FlashAttention for head_size {head_size} on this GPU, which TurboQuant prefills with. "
            + INSTEAD
        )
    return version
