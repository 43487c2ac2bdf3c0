"""The interface of the first TurboQuant packages: compress a `DynamicCache` that is passed to `generate`."""

from functools import partial
from types import TracebackType
from typing import Any, Self

from turboquant_core import TurboQuantConfig
from turboquant_hf._compat import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, PreTrainedConfig
from turboquant_hf.calls import guard, unguard
from turboquant_hf.layers.build import compressed_layer, kept_tokens
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer
from turboquant_hf.memory import MemoryReport, memory_report


class CompressedDynamicCache:
    """Compresses what a `DynamicCache` stores from now on; the cache itself goes to `generate`.

    ```python
    cache = DynamicCache()
    compressed = CompressedDynamicCache(cache, head_dim=128, bits=4)
    model.generate(**inputs, past_key_values=cache)
    ```

    The layers of that one cache are replaced by those of `TurboQuantCache`, which new code should use, and its calls
    are guarded as there. As a context manager it restores the cache at the end; after an error it stays
    compressed, and refuses what was left half done.

    Args:
        cache: An empty cache.
        head_dim: Dimension of keys and values; another one is refused when it comes.
        bits: Bits of keys and values: 2, 2.5, 3, 3.5, 4, 5, 6 or 8.
        k_bits: Bits of keys, instead of `bits`.
        v_bits: Bits of values, instead of `bits`.
        model_config: The model's configuration, for fused decoding; see `TurboQuantCache`.
        sink_tokens: As for `TurboQuantCache`.
        recent_tokens: As there.

    Raises:
        TypeError: If `cache` is no `DynamicCache`.
        ValueError: If it holds tokens, is compressed already, bits or head_dim do not exist, or a number of tokens is
            none.
    """

    def __init__(
        self,
        cache: DynamicCache,
        head_dim: int,
        bits: float = 4,
        *,
        k_bits: float | None = None,
        v_bits: float | None = None,
        model_config: PreTrainedConfig | None = None,
        sink_tokens: int | None = None,
        recent_tokens: int | None = None,
    ) -> None:
        if not isinstance(cache, DynamicCache):
            raise TypeError(f"cache is {type(cache).__name__}; pass a DynamicCache, or use TurboQuantCache by itself")
        if any(isinstance(layer, TurboQuantLayer) for layer in cache.layers) or cache.layer_class_to_replicate not in (
            None,
            DynamicLayer,
        ):
            raise ValueError("this cache is compressed already")
        if cache.get_seq_length():
            raise ValueError(
                f"this cache holds {cache.get_seq_length()} tokens; compress it before it is used, or reset() it"
            )
        self.cache = cache
        self.head_dim = head_dim
        self.k_bits = bits if k_bits is None else k_bits
        self.v_bits = bits if v_bits is None else v_bits
        # Bits and sizes that do not exist are found here, not at the first token.
        TurboQuantConfig(head_dim, self.k_bits, self.v_bits)
        options: dict[str, Any] = {
            "text_config": None if model_config is None else model_config.get_text_config(decoder=True),
            "head_dim": head_dim,
            "key_bits": self.k_bits,
            "value_bits": self.v_bits,
        }
        options |= kept_tokens(sink_tokens, recent_tokens)
        cache.layers = [compressed_layer(layer, "tq4", options) for layer in cache.layers]
        if cache.layer_class_to_replicate is not None:
            cache.layer_class_to_replicate = partial(TurboQuantLayer, **options)
        guard(cache)

    def restore(self) -> None:
        """Give the cache layers of its own again, with what is stored dequantised.

        Raises:
            ValueError: If a sliding-window layer holds tokens.
            RuntimeError: If a call stopped between layers and was not taken back.
        """
        layers = [_restored(layer) for layer in self.cache.layers]
        unguard(self.cache)
        self.cache.layers = layers
        if self.cache.layer_class_to_replicate is not None:
            self.cache.layer_class_to_replicate = DynamicLayer

    def memory_report(self) -> MemoryReport:
        """What each layer keeps, measured from storage."""
        return memory_report(self.cache.layers)

    def vram_bytes(self) -> int:
        """Allocated bytes of everything kept."""
        return self.memory_report().nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.restore()


def _restored(layer: Any) -> Any:
    if not isinstance(layer, TurboQuantLayer):
        return layer
    if isinstance(layer, TurboQuantSlidingLayer):
        if layer.get_seq_length():
            raise ValueError(
                "a sliding-window layer that holds tokens cannot be restored; use a new cache, or reset() it"
            )
        return DynamicSlidingWindowLayer(layer.sliding_window)
    native = DynamicLayer()
    if layer.get_seq_length():
        native.update(*layer.store.dequantize(layer.dtype))
    return native
