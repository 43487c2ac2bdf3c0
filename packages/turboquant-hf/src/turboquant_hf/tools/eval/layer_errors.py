"""What quantising does to each attention layer alone: keys, values and the layer's output."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from turboquant_core import TurboQuantConfig
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_hf._compat import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    sdpa_mask,
    with_cache,
)
from turboquant_hf.attending import attending
from turboquant_hf.attention.function import turboquant_attention
from turboquant_hf.attention.handover import Stored, hand_over
from turboquant_hf.layers.build import kept_tokens
from turboquant_hf.storage.growing.store import growing_store
from turboquant_hf.storage.tables import FullPrecisionSizes
from turboquant_hf.support import layer_attention
from turboquant_hf.tools.caches import compressed_layers
from turboquant_hf.tools.eval.results import LayerError

PROBE = "turboquant_probe"
_KEPT = FullPrecisionSizes(*kept_tokens(None, None).values())

Bits = tuple[float, float]


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    bits: Mapping[str, Bits],
    key_transforms: Mapping[int, KeyTransform] = MappingProxyType({}),
) -> dict[str, list[LayerError]]:
    """The errors of every layer that `TurboQuantCache` compresses, each on its true inputs.

    A text is run uncompressed. Beside its output, each layer's attention is computed once more for every pair of bits,
    with that layer's keys and values as `TurboQuantCache` would have every token read them, so that no error of one
    layer reaches another: the first token and the newest before it are as they are.

    Args:
        model: The model.
        input_ids: int64 [1, num_tokens].
        bits: Name to (key_bits, value_bits).
        key_transforms: Layer index to what its keys go through, as `TurboQuantCache` is given it.

    Returns:
        The errors by name, in the order of the layers.
    """
    # What attention reads with latents is not what the cache stores.
    latent = {layer.index for layer in layer_attention(model.config) if layer.kind == "MLA"}
    probe = _Probe(compressed_layers(model.config) - latent, bits, key_transforms)
    AttentionInterface.register(PROBE, probe.attend)
    AttentionMaskInterface.register(PROBE, sdpa_mask)
    with attending(model, PROBE):
        cache = DynamicCache(config=model.config)
        model(input_ids=input_ids, **with_cache(cache), logits_to_keep=1)
    return probe.errors


class _Probe:
    """An attention function that measures on the way."""

    def __init__(
        self, layers: frozenset[int], bits: Mapping[str, Bits], key_transforms: Mapping[int, KeyTransform]
    ) -> None:
        self.errors: dict[str, list[LayerError]] = {name: [] for name in bits}
        self._layers = layers
        self._bits = bits
        self._key_transforms = key_transforms

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `turboquant_attention`."""

        def attention(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            output, _ = turboquant_attention(
                module, query, keys, values, attention_mask, dropout, scaling, softcap, s_aux, **kwargs
            )
            return output

        exact = attention(key, value)
        index = getattr(module, "layer_idx", None)
        if index in self._layers:
            transform = self._key_transforms.get(index, IDENTITY)
            for name, (key_bits, value_bits) in self._bits.items():
                value_head_dim = value.shape[-1]
                config = TurboQuantConfig(key.shape[-1], key_bits, value_bits, value_head_dim=value_head_dim)
                config = config.fitted_to(transform)
                store = growing_store(config, key.shape[0], key.shape[1], key.dtype, key.device, _KEPT)
                store.pages.settle(transform)
                given = Stored(store, store.append_parts(key, value))
                output = attention(*hand_over(given, key.shape, key.dtype, key.device))
                keys, values = store.stored(key.dtype)
                self.errors[name].append(
                    LayerError(
                        index=int(index),
                        key_error=_relative(keys - key, key - key.float().mean(-2, keepdim=True)),
                        value_error=_relative(values - value, value),
                        output_error=_relative(output - exact, exact),
                    )
                )
        return exact, None


def _relative(error: torch.Tensor, whole: torch.Tensor) -> float:
    """The squared norm of an error over that of what it is an error of."""
    return float(error.float().square().sum() / whole.float().square().sum())
