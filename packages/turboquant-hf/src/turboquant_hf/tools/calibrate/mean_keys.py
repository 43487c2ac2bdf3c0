"""The mean key of every layer over a text."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from turboquant_core.calibration import Calibration
from turboquant_core.key_transform import KeyTransform
from turboquant_core.model_identity import ModelIdentity
from turboquant_hf._compat import with_cache
from turboquant_hf.tools.models import LoadedModel

CHUNK_SIZE = 512


class KeySums(DynamicCache):
    """An uncompressed cache that adds up the keys it is given, whatever its layers keep of them.

    Attributes:
        sums: Layer index to the sum over sequences and tokens, float64 [num_kv_heads, head_dim] on the CPU. Layers
            that store no keys of their own, such as linear attention, are not in it.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.sums: dict[int, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up keys [batch_size, num_kv_heads, num_tokens, head_dim], as attention sees them, and store them."""
        total = key_states.float().sum(dim=(0, 2)).cpu().double()
        self.sums[layer_idx] = self.sums[layer_idx] + total if layer_idx in self.sums else total
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def num_chunks(num_tokens: int) -> int:
    """Forward passes that `mean_keys` needs for that many tokens."""
    return -(-num_tokens // CHUNK_SIZE)


@torch.inference_mode()
def mean_keys(
    loaded: LoadedModel, input_ids: torch.Tensor, on_forward: Callable[[], None] = lambda: None
) -> Calibration:
    """The mean key of every layer over a text.

    Args:
        loaded: The model.
        input_ids: int64 [1, num_tokens]; no longer than the model's context.
        on_forward: Called after each forward pass.
    """
    model = loaded.model
    cache = KeySums(model.config)
    for chunk in torch.split(input_ids.to(model.device), CHUNK_SIZE, dim=1):
        # Logits of a long chunk take more memory than its keys.
        model(input_ids=chunk, **with_cache(cache), logits_to_keep=1)
        on_forward()
    num_tokens = input_ids.shape[1]
    return Calibration(
        layers={index: KeyTransform((total / num_tokens).float()) for index, total in cache.sums.items()},
        model=ModelIdentity.of(model.config.get_text_config(decoder=True), type(model).__name__),
        source=loaded.name,
        num_tokens=num_tokens,
    )
