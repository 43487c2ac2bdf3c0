"""The backend's answers to vLLM: what it supports and how large its pages are."""

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch

from turboquant_core import vllm_limits
from turboquant_vllm._compat.engine import current_config
from turboquant_vllm._compat.interface import (
    AttentionBackend,
    FullAttentionSpec,
    MultipleOf,
    SlidingWindowSpec,
    VllmLayout,
    current_platform,
)
from turboquant_vllm.refusals import INSTEAD, KV_CACHE_DTYPES, engine_problems, reads_only_own_pages
from turboquant_vllm.settings import process_settings


class TurboQuantBackend(AttentionBackend):
    """Serves from pages of codes."""

    # FlashAttention takes no float32.
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        *([torch.float32] if current_platform.is_cpu() else []),
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(KV_CACHE_DTYPES)
    forward_includes_kv_cache_update: bool = False
    # Key and value bits of layers whose bits a file gives; None for those that have the settings'.
    layer_bits: ClassVar[tuple[float, float] | None] = None

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's registry."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        """The class that attends."""
        from turboquant_vllm.impl import TurboQuantImpl

        return TurboQuantImpl

    @staticmethod
    def get_builder_cls() -> type:
        """The class that describes a batch."""
        from turboquant_vllm.builder import TurboQuantMetadataBuilder

        return TurboQuantMetadataBuilder

    @staticmethod
    @cache
    def with_bits(key_bits: float, value_bits: float) -> "type[TurboQuantBackend]":
        """The backend of layers whose pages hold those bits; vLLM tells backends apart by name."""
        name = f"{TurboQuantBackend.__name__}K{key_bits}V{value_bits}"
        return type(name, (TurboQuantBackend,), {"layer_bits": (key_bits, value_bits), "__module__": __name__})

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Tokens of a page."""
        return [MultipleOf(vllm_limits.BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes that the kernels are tested at."""
        return list(vllm_limits.HEAD_DIMS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[VllmLayout, ...]:
        """Layouts in which the bytes of one head of a page lie together."""
        return (VllmLayout.LBHNC, VllmLayout.BLHNC, VllmLayout.BHLNC, VllmLayout.LHBNC)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The page as bytes: for each token and KV head its codes and scales, and nothing else.

        Raises:
            ValueError: If the layer is of a kind, or of a shape, that is not served.
        """
        # Of their subclasses some see later tokens, and some lack earlier ones.
        non_causal = getattr(spec, "non_causal", False)
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec) or non_causal:
            raise ValueError(
                f"{'non-causal attention' if non_causal else type(spec).__name__} is not supported by TurboQuant; it "
                f"serves causal attention to all tokens or to those of a sliding window. {INSTEAD}"
            )
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"keys have head_size {spec.head_size} and values {spec.head_size_v}; TurboQuant serves equal ones. "
                + INSTEAD
            )
        # vLLM makes pages equal by more tokens for the smaller heads, and pads what does not divide.
        num_heads = 2 if spec.head_size == vllm_limits.LARGEST_HEAD_DIM else 1
        config = process_settings().cache_config(spec.head_size // num_heads, cls.layer_bits)
        return replace(spec, dtype=torch.uint8, state_content_bytes=num_heads * config.slot_bytes)

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks take weight in the kernels' softmax."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are kept to in prefill and decode."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Pages that another process reads need the same key means there, so they must come from a file."""
        settings, config = process_settings(), current_config()
        means_are_shared = not settings.center_keys or settings.calibration is not None
        return means_are_shared or (config is not None and reads_only_own_pages(config.kv_transfer_config))

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Not tested."""
        return False

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        """What of the engine is not served, and what to do about it: the other hooks only answer yes or no."""
        return " ".join(engine_problems(current_config(), process_settings())) or None

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """From Ampere on."""
        return (capability.major, capability.minor) >= vllm_limits.MIN_CAPABILITY
