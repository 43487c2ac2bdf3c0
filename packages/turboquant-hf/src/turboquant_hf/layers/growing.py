"""One attention layer's compressed cache."""

from dataclasses import fields
from typing import Any, Self

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops._dispatch import VECTOR_DTYPES
from turboquant_core.scale import ScaleRule
from turboquant_hf._compat import CacheLayerMixin, PreTrainedConfig
from turboquant_hf.attention.dispatch import ATTENTION
from turboquant_hf.attention.gradients import without_gradient
from turboquant_hf.attention.handover import Prompt, Stored, hand_over
from turboquant_hf.inference_mode import outside_inference_mode
from turboquant_hf.layers.rows import picked, reordered, repeated
from turboquant_hf.storage.growing.store import growing_store
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import MAX_STEP_TOKENS, FullPrecisionSizes


class TurboQuantLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, stored as TurboQuant codes.

    The first tokens attend on their raw keys and values, as prefill does. Every later token attends on what the codes
    say, its own included: its output does not depend on how tokens were grouped into calls, so verifying several
    drafted tokens at once gives what decoding them one by one gives.

    Sinks and recent tokens are read as they are. With recent tokens the above holds for
    `attn_implementation="turboquant"`; elsewhere the tokens of a call see each other, and the window before the first
    of them, as they are.

    With `attn_implementation="turboquant"` up to 8 tokens attend on the codes themselves, and `update` returns
    placeholders; otherwise it returns the layer's history dequantised. No other full-precision copy outlives a call.

    Args:
        preset: Preset of `TurboQuantConfig`; the layer learns its head_dim from the first keys it sees.
        text_config: The configuration that the model's attention reads, which says how it attends; without it the
            layer always returns dequantised states.
        head_dim: Refuse keys of another dimension; None takes that of the first.
        sink_tokens: First tokens of every sequence that are kept as they are.
        recent_tokens: Newest tokens that are kept as they are.
        key_bits: As for `TurboQuantConfig`, instead of the preset's.
        value_bits: The same.
        key_scale: The same.
        value_scale: The same.
        center_keys: The same.
        key_split: The same, instead of where `key_transform` has an order.
        key_transform: What keys go through before codes, of tensors [num_kv_heads, ...]. With a mean they are stored
            less that one, whatever center_keys says; without one less that of the first ones, if center_keys says so.
    """

    config: TurboQuantConfig
    store: Store

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        preset: str = "tq4",
        *,
        text_config: PreTrainedConfig | None = None,
        head_dim: int | None = None,
        sink_tokens: int = 0,
        recent_tokens: int = 0,
        key_bits: float | None = None,
        value_bits: float | None = None,
        key_scale: ScaleRule | None = None,
        value_scale: ScaleRule | None = None,
        center_keys: bool | None = None,
        key_split: bool | None = None,
        key_transform: KeyTransform = IDENTITY,
    ) -> None:
        super().__init__()
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self._head_dim = head_dim
        self._preset = preset
        codes = {
            "key_bits": key_bits,
            "value_bits": value_bits,
            "key_scale": key_scale,
            "value_scale": value_scale,
            "center_keys": center_keys if key_transform.mean is None else True,
            "key_split": key_split,
        }
        self._codes: dict[str, Any] = {name: value for name, value in codes.items() if value is not None}
        self.key_transform = key_transform
        self._text_config = text_config
        self._has_gradient = False

    @classmethod
    def restore(
        cls,
        store: Store,
        dtype: torch.dtype,
        text_config: PreTrainedConfig | None,
        key_transform: KeyTransform,
    ) -> Self:
        """A layer with this store of keys and values in `dtype`; the other arguments are those of a new one."""
        config, sizes = store.config, store.length.sizes
        codes: dict[str, Any] = {
            field.name: getattr(config, field.name)
            for field in fields(config)
            if field.name not in ("head_dim", "value_head_dim")
        }
        codes |= {"sink_tokens": sizes.first, "recent_tokens": sizes.recent, "key_transform": key_transform}
        layer = cls(text_config=text_config, **codes)
        layer.config, layer.store = config, store
        layer.dtype, layer.device = dtype, store.pages.device
        layer.is_initialized = True
        store.pages.settle(key_transform)
        return layer

    @property
    def batch_size(self) -> int:
        """Sequences held; there is no such attribute before the first."""
        return self.store.batch_size

    @property
    def is_empty(self) -> bool:
        """Whether the next tokens are the first; does not wait for the device."""
        return not self.is_initialized or self.store.length.is_empty

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys as a next token reads them, [batch_size, num_kv_heads, num_tokens, head_dim]; None before the first.

        Dequantised at each look.
        """
        return self._dequantized(0)

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._refuse_to_set("keys", keys)

    @property
    def values(self) -> torch.Tensor | None:
        """The same for values."""
        return self._dequantized(1)

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._refuse_to_set("values", values)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shape, type and device from key and value states [batch_size, num_kv_heads, num_tokens, head_dim]."""
        head_dim, value_head_dim = key_states.shape[-1], value_states.shape[-1]
        if self._head_dim is not None and not head_dim == value_head_dim == self._head_dim:
            raise ValueError(
                f"keys have {head_dim} channels, values {value_head_dim}, and the cache was made for head_dim "
                f"{self._head_dim}; pass the model's head_dim"
            )
        config = TurboQuantConfig.preset(self._preset, head_dim, value_head_dim=value_head_dim, **self._codes)
        if "key_split" not in self._codes:
            config = config.fitted_to(self.key_transform)
        if key_states.dtype not in VECTOR_DTYPES and config.has_kernels:
            raise ValueError(
                f"keys are {key_states.dtype}; a cache of {config.key_bits} and {config.value_bits} bits holds "
                f"{', '.join(map(str, VECTOR_DTYPES))}. Load the model with dtype=torch.float32, or one of the others."
            )
        self.config = config
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store = self._new_store(*key_states.shape[:2])
        self.store.pages.settle(self.key_transform)
        self.is_initialized = True

    @outside_inference_mode
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states and return what attention reads, [batch_size, num_kv_heads, num_tokens, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        store, num_new = self.store, key_states.shape[2]
        self._check(key_states, value_states)
        wants_gradient = self._wants_gradient(key_states, value_states)
        config = self._text_config
        # With latents, models compute in between, and no kernel reads them.
        is_asked = config is not None and config._attn_implementation == ATTENTION
        reads_codes = is_asked and self.config.value_head_dim is None
        num_read, _ = self.get_mask_sizes(num_new)
        if store.length.is_empty:
            store.append(key_states, value_states)
            self._before_decoding(reads_codes)
            if reads_codes:
                given = Prompt(key_states, value_states, self.store_again, num_read)
                return hand_over(given, key_states.shape, self.dtype, self.device)
            return self._prompt(key_states, value_states)
        if num_new and reads_codes and (num_new <= MAX_STEP_TOKENS or store.parts_calls):
            recent = store.append_parts(key_states, value_states)
            shape = (*key_states.shape[:2], num_read, key_states.shape[3])
            return hand_over(Stored(store, recent, wants_gradient), shape, self.dtype, self.device)
        keys, values = store.extend(key_states, value_states, self.dtype)
        return (without_gradient(keys), without_gradient(values)) if wants_gradient else (keys, values)

    @outside_inference_mode
    def store_again(self, key_states: torch.Tensor, value_states: torch.Tensor, row_starts: torch.Tensor) -> None:
        """Store the first tokens in place of what is stored, now that it is known which of them are padding.

        Args:
            key_states: As for `update`.
            value_states: As there.
            row_starts: int32 [batch_size], the first token of every row that is no padding.
        """
        is_offloaded = self.store.pages.device != self.device
        if is_offloaded:
            self.prefetch()
        self.store.clear()
        self.store.append(key_states, value_states, row_starts)
        if is_offloaded:
            self.offload()

    def get_seq_length(self) -> int:
        """Tokens so far; of a static layer an int64 tensor [] once there are any."""
        return self.store.length.stop if self.is_initialized else 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """-1: the layer grows without bound."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a call with `query_length` new tokens attends to."""
        return self.get_seq_length() + query_length, 0

    @outside_inference_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: If the argument is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop got {tokens_to_remove}; pass the number of tokens to remove as a negative number")
        if tokens_to_remove and self.is_initialized:
            # Older versions of transformers pass a tensor, which lengths would then be, and be changed in place.
            self.store.crop(max(0, self.store.length.num_seen + int(tokens_to_remove)))

    def reset(self) -> None:
        """Forget every token, and free its memory."""
        if self.is_initialized:
            del self.store
            self.is_initialized = False

    @outside_inference_mode
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the sequences `beam_idx`, int64 [batch_size]."""
        if self.is_initialized:
            self.store = self.store.select_rows(reordered(beam_idx))

    @outside_inference_mode
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.is_initialized:
            self.store = self.store.select_rows(repeated(self.store.batch_size, repeats))

    @outside_inference_mode
    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences that `indices` picks of a tensor's first dimension: numbers, or a bool for each."""
        if self.is_initialized:
            self.store = self.store.select_rows(picked(self.store.batch_size, indices))

    @outside_inference_mode
    def offload(self) -> None:
        """Move everything kept to the CPU."""
        if self.is_initialized:
            self.store = self.store.to("cpu")

    @outside_inference_mode
    def prefetch(self) -> None:
        """Move everything kept back to the layer's device."""
        if self.is_initialized:
            self.store = self.store.to(self.device)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the layer keeps."""
        return self.store.tensors() if self.is_initialized else []

    @property
    def _sizes(self) -> FullPrecisionSizes:
        return FullPrecisionSizes(self.sink_tokens, self.recent_tokens)

    def _new_store(self, batch_size: int, num_kv_heads: int) -> Store:
        return growing_store(self.config, batch_size, num_kv_heads, self.dtype, self.device, self._sizes)

    @outside_inference_mode
    def _dequantized(self, which: int) -> torch.Tensor | None:
        if self.is_empty:
            return None
        return self.store.stored(self.dtype)[which]

    def _refuse_to_set(self, name: str, states: torch.Tensor | None) -> None:
        # The base class sets None.
        if states is not None:
            raise AttributeError(f"{name} of a {type(self).__name__} cannot be set: it stores codes. Use update().")

    def _wants_gradient(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether a backward pass from what reads these, or what is stored, would go on through them."""
        is_recorded = torch.is_grad_enabled()
        if self.store.length.is_empty:
            self._has_gradient = False
        self._has_gradient |= is_recorded and (key_states.requires_grad or value_states.requires_grad)
        return is_recorded and self._has_gradient

    def _before_decoding(self, reads_codes: bool) -> None:
        """What there is to do between the first tokens and the next, which attend on codes or on what they give."""

    def _prompt(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What another attention reads for the first tokens."""
        return key_states, value_states

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if key_states.dtype != value_states.dtype:
            raise ValueError(
                f"key_states are {key_states.dtype} and value_states {value_states.dtype}, as torch.autocast makes "
                "them; a cache holds one type. Load the model in the type to compute in, with dtype=..., and leave "
                "autocast out."
            )
        pages = self.store.pages
        heads = (pages.batch_size, pages.num_kv_heads, key_states.shape[-2])
        for name, given, head_dim in zip(
            ("key_states", "value_states"), (key_states, value_states), self.config.head_dims, strict=True
        ):
            if given.shape != (*heads, head_dim):
                raise ValueError(
                    f"{name} are {list(given.shape)}; this cache holds [batch_size, num_kv_heads, num_tokens, "
                    f"head_dim] = {[*heads, head_dim]}. Use a new cache, or reset() this one, for another batch."
                )
            if given.dtype != self.dtype or given.device != self.device:
                raise ValueError(
                    f"{name} are {given.dtype} on {given.device}; this cache was filled with {self.dtype} on "
                    f"{self.device}. Use a new cache, or reset() this one, for another type or device."
                )
