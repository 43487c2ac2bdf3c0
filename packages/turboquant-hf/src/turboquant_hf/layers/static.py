"""The cache for compiled decoding: storage made once, and written in place."""

from typing import Any, NoReturn

import torch

from turboquant_hf._compat import StaticLayer
from turboquant_hf.inference_mode import outside_inference_mode
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.storage.static.store import static_store
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import FullPrecisionSizes


class TurboQuantStaticLayer(TurboQuantLayer):
    """A layer for `torch.compile` and CUDA graphs: preallocated, written in place, at fixed addresses.

    Without `attn_implementation="turboquant"` every step dequantises the whole of it. At fractional bits, which that
    attention has no kernel for, recent tokens of one call see each other as they are.

    Args:
        max_length: The most tokens of a sequence.
        preset: As for `TurboQuantLayer`.
        **options: As there.
    """

    is_compileable = True

    def __init__(self, max_length: int, preset: str, **options: Any) -> None:
        super().__init__(preset, **options)
        self._max_length = max_length

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self._max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys: all that there is room for."""
        return self._max_length, 0

    @outside_inference_mode
    def reset(self) -> None:
        """Forget every token; storage stays where it is."""
        if self.is_initialized:
            self.store.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: storage has a fixed batch size."""
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused: storage has a fixed batch size."""
        self._refuse("batch_select_indices")

    def offload(self) -> None:
        """Refused: storage has fixed addresses."""
        self._refuse("offloading")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{what} does not go with max_length: a static cache stays where and as large as it is")

    def _new_store(self, batch_size: int, num_kv_heads: int) -> Store:
        heads = (batch_size, num_kv_heads)
        return static_store(self.config, *heads, self.dtype, self.device, self._max_length, self._sizes)

    def _before_decoding(self, reads_codes: bool) -> None:
        if self.store.pages.device.type == "cuda" and not torch.compiler.is_compiling():
            self.store.warm_up(self.dtype, attends=reads_codes)

    def _prompt(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        room = (0, 0, 0, self._max_length - key_states.shape[-2])
        return torch.nn.functional.pad(key_states, room), torch.nn.functional.pad(value_states, room)


class StaticWindowLayer(StaticLayer):
    """Transformers' static layer with room for all tokens, of which each sees a window, which the mask says.

    Args:
        max_cache_len: The most tokens of a sequence.
        sliding_window: Tokens that a token sees, itself included.
    """

    is_sliding = True

    def __init__(self, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len)
        self.sliding_window = sliding_window


class TurboQuantStaticSlidingLayer(TurboQuantStaticLayer):
    """A layer for `torch.compile` whose tokens see a window, which the mask says.

    The codes of all `max_length` tokens are kept. At 4 bits they take more than a window in bfloat16 where `max_length`
    is some four windows or more. Sinks and recent tokens are read as they are as long as the window shows them.

    Args:
        max_length: The most tokens of a sequence.
        sliding_window: Tokens that a token sees, itself included.
        preset: As for `TurboQuantLayer`.
        **options: As there.
    """

    is_sliding = True

    def __init__(self, max_length: int, sliding_window: int, preset: str, **options: Any) -> None:
        super().__init__(max_length, preset, **options)
        self.sliding_window = sliding_window

    @property
    def _sizes(self) -> FullPrecisionSizes:
        return super()._sizes.within(self.sliding_window)
