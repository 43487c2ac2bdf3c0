"""The cache to pass as `past_key_values`."""

from typing import Any

from turboquant_core import TurboQuantConfig
from turboquant_core.quantized import storage_nbytes
from turboquant_hf._compat import Cache, PreTrainedConfig
from turboquant_hf.layer import TurboQuantLayer
from turboquant_hf.report import MemoryReport, layer_tensors, memory_report
from turboquant_hf.support import compressible_layers, text_head_dim


class TurboQuantCache(Cache):
    """A KV cache that keeps TurboQuant codes instead of keys and values.

    ```python
    cache = TurboQuantCache(model.config)
    model.generate(**inputs, past_key_values=cache)
    ```

    Full-attention layers are compressed. Layers whose memory is bounded anyway (sliding windows, linear attention) stay
    as transformers makes them; `memory_report()` says which is which.

    Args:
        config: The model's configuration.
        preset: "tq4", "tq3.5", "tq3", "tq2.5", "tq2", "k6v4" or "k8v4".
        offloading: Keep layers on the CPU while they are not used, as in `DynamicCache`.
        **overrides: Fields of `TurboQuantConfig` that replace the preset's: `key_bits`, `value_bits`, `key_scale`,
            `value_scale`, `center_keys`.

    Raises:
        ValueError: If preset or bits do not exist, or the model has no layer that this cache can hold.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        preset: str = "tq4",
        *,
        offloading: bool = False,
        **overrides: Any,
    ) -> None:
        kinds = compressible_layers(config)
        # A preset or bits that do not exist are found here, not at the first token.
        TurboQuantConfig.preset(preset, text_head_dim(config), **overrides)
        text_config = config.get_text_config(decoder=True)
        layers = [
            TurboQuantLayer(preset, text_config=text_config, **overrides) if compress else layer
            for layer, compress in kinds
        ]
        super().__init__(layers=layers, offloading=offloading)

    @property
    def nbytes(self) -> int:
        """Allocated bytes of everything the cache keeps, measured from storage."""
        return storage_nbytes(tensor for layer in self.layers for tensor in layer_tensors(layer))

    def memory_report(self) -> MemoryReport:
        """What each layer keeps, measured from storage."""
        return memory_report(self.layers)
