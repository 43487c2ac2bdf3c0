"""How every layer of a model attends, from its configuration."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.support import LayerAttention, LayerKind, layer_attention

GROWING_KINDS: tuple[LayerKind, ...] = ("full attention", "sparse attention", "linear and full attention", "MLA")
"""Kinds whose cache grows with every token."""


@dataclass(frozen=True)
class ModelAttention:
    """How a model attends.

    Attributes:
        model_type: Model type of the text model.
        layers: Every layer.
        softcap: Logits become softcap * tanh(logits / softcap); None where they stay.
        has_sinks: Whether heads have a learned sink.
        has_alibi: Whether positions are biases on logits.
        max_length: Longest context; None where the configuration does not tell.
    """

    model_type: str
    layers: tuple[LayerAttention, ...]
    softcap: float | None
    has_sinks: bool
    has_alibi: bool
    max_length: int | None

    @property
    def kv_lora_rank(self) -> int | None:
        """Largest width of MLA's latents; None without MLA."""
        return max((layer.head_dim for layer in self.layers if layer.kind == "MLA"), default=None)

    def groups(self) -> list[tuple[LayerAttention, int]]:
        """One layer of each sort, and how many there are, in the order of the model."""
        firsts: dict[LayerAttention, LayerAttention] = {}
        counts = Counter(_sort(layer) for layer in self.layers)
        for layer in self.layers:
            firsts.setdefault(_sort(layer), layer)
        return [(layer, counts[key]) for key, layer in firsts.items()]


def _sort(layer: LayerAttention) -> LayerAttention:
    return replace(layer, index=0)


def model_attention(config: PreTrainedConfig, tensor_names: Iterable[str] = ()) -> ModelAttention:
    """Read a configuration; names of tensors tell what it does not, such as sinks.

    Raises:
        ValueError: If the model is no decoder with attention layers.
    """
    text = config.get_text_config(decoder=True)
    layers = layer_attention(config)
    # What is read here is the same for all layers, and some configurations tell only what a layer has.
    first = text.per_layer_config[0]
    return ModelAttention(
        model_type=text.model_type,
        layers=layers,
        softcap=getattr(first, "attn_logit_softcapping", None) or None,
        has_sinks=text.model_type == "gpt_oss" or any("sink" in name.rsplit(".", 1)[-1] for name in tensor_names),
        has_alibi=bool(getattr(first, "alibi", False)) or text.model_type == "bloom",
        max_length=getattr(first, "max_position_embeddings", None),
    )
