"""Which models and layers the cache can hold, found out before anything runs."""

from turboquant_hf._compat import (
    ENCODER_MODEL_TYPES,
    KNOWN_LAYERS,
    PreTrainedConfig,
    transformers_layers,
)


def text_head_dim(config: PreTrainedConfig) -> int:
    """head_dim of a model's attention.

    Raises:
        ValueError: If the configuration does not tell.
    """
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None)
    if head_dim is None:
        heads = getattr(text, "num_attention_heads", None)
        if not heads:
            raise ValueError(
                f"{type(config).__name__} names no head_dim and no num_attention_heads; TurboQuantCache needs a model "
                "with attention layers"
            )
        head_dim = text.hidden_size // heads
    return int(head_dim)


def held_layers(config: PreTrainedConfig, max_length: int | None) -> list[object]:
    """The layers of transformers' own cache for this model, `StaticCache` with a max_length.

    Raises:
        TypeError: If `config` is no model configuration.
        ValueError: If the model is an encoder or uses MLA, or has a layer of unknown kind.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config is {type(config).__name__}; pass the model's configuration, model.config")
    check_architecture(config)
    layers = transformers_layers(config, max_length)
    for index, layer in enumerate(layers):
        if type(layer) not in KNOWN_LAYERS:
            raise ValueError(
                f"layer {index} of this {config.model_type} model is a {type(layer).__name__}, which TurboQuantCache "
                "does not know. Use DynamicCache for this model."
            )
    return layers


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise ValueError for encoders, encoder-decoders and MLA models."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise ValueError(
            f"this {config.model_type} model is an encoder-decoder; TurboQuantCache holds decoder-only models"
        )
    if text.model_type in ENCODER_MODEL_TYPES and not getattr(text, "is_decoder", False):
        raise ValueError(
            f"this {config.model_type} model is an encoder, which keeps no KV cache; TurboQuantCache holds "
            "decoder-only language models"
        )
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"this {config.model_type} model uses multi-head latent attention (kv_lora_rank {text.kv_lora_rank}), "
            "which caches latents instead of heads; TurboQuantCache does not hold those yet. Use DynamicCache for it."
        )
