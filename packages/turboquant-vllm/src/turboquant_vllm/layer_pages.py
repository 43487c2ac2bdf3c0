"""Layers whose pages are unlike those of most: with bits of their own, or left uncompressed."""

from dataclasses import dataclass
from typing import Any

from turboquant_core.layer_bits import LayerBits
from turboquant_vllm._compat.engine import all_layers, attention_layers
from turboquant_vllm._compat.worker import extract_layer_index
from turboquant_vllm.artifacts import layer_bits_of
from turboquant_vllm.settings import Settings

SLIDING_WINDOW = "sliding_window"


@dataclass(frozen=True)
class LayerPages:
    """What single layers of an engine store.

    Attributes:
        bits: Of all layers, or None if all have those of the settings.
        skipped: Layers that stay uncompressed, as `--kv-cache-dtype-skip-layers` names them: indices, or
            "sliding_window" for those with a window.
        layers: All layers of this process by name; vLLM adds them while it builds the model.
    """

    bits: LayerBits | None
    skipped: tuple[str, ...]
    layers: dict[str, Any]

    @classmethod
    def of_engine(cls, config: Any, settings: Settings) -> "LayerPages | None":
        """What an engine's layers store, or None if they all store alike.

        Raises:
            FileNotFoundError: If there is no file of bits where the settings name one.
            ValueError: If it does not belong to the model, or has bits that the kernels do not read.
        """
        if config is None:
            return None
        skipped = tuple(config.cache_config.kv_cache_dtype_skip_layers)
        bits = None if settings.layer_bits is None else layer_bits_of(config.model_config, settings.layer_bits)
        return cls(bits, skipped, all_layers(config)) if skipped or bits else None

    def layer_of(self, impl: Any) -> tuple[str, Any]:
        """The layer of an implementation, by name.

        Raises:
            ValueError: If pages of unlike sizes would not lie together.
        """
        layers = attention_layers(self.layers)
        kinds = {_kind(layer) for layer in layers.values()}
        if len(kinds) > 1 and (self.skipped or (self.bits and len(set(self.bits.layer_bits.values())) > 1)):
            asked = f"layers {', '.join(self.skipped)} are to stay uncompressed"
            if not self.skipped and self.bits:
                asked = f"the bits of {self.bits.source} differ between layers"
            raise ValueError(
                f"{asked}, and this model has {' and '.join(sorted(kinds))}, whose pages vLLM makes equally large. "
                'Leave --kv-cache-dtype-skip-layers and "layer_bits" out.'
            )
        return next((name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is impl)

    def is_skipped(self, name: str, layer: Any) -> bool:
        """Whether a layer stays uncompressed, as vLLM decides it."""
        windowed = layer.sliding_window is not None and SLIDING_WINDOW in self.skipped
        return windowed or str(extract_layer_index(name)) in self.skipped

    def give_bits(self, name: str, layer: Any) -> tuple[float, float] | None:
        """Have a layer ask for pages of its bits, and say which; None for those of the settings.

        vLLM asks a backend for the size of a page without saying of which layer, but it asks the layer for its backend.

        Raises:
            ValueError: If the file has none for the layer.
        """
        if self.bits is None:
            return None
        pair = self.bits.of_layer(extract_layer_index(name))
        layer.attn_backend = layer.attn_backend.with_bits(*pair)
        return pair


def leave_to(backend: Any, layer: Any, *arguments: Any, **named: Any) -> Any:
    """Give a layer another backend, and return its implementation."""
    layer.attn_backend, layer.impl = backend, backend.get_impl_cls()(*arguments, **named)
    return layer.impl


def _kind(layer: Any) -> str:
    if not hasattr(layer, "sliding_window"):
        return f"{type(layer).__name__} layers"
    return "layers without a window" if layer.sliding_window is None else f"windows of {layer.sliding_window}"
