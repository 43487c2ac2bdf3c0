"""Key means from texts that ship, taken at start with the model itself: no prompt of a user decides them."""

from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from turboquant_vllm._compat.engine import all_layers, attention_layers
from turboquant_vllm._compat.interface import init_logger
from turboquant_vllm._compat.worker import cached_tokenizer_from_config, model_with, run_on_text
from turboquant_vllm.key_transforms.raw_attention import RawAttention
from turboquant_vllm.refusals import MEANS_INSTEAD

logger = init_logger(__name__)
# Tokens where there is no tokenizer.
NUM_ARBITRARY = 512


def give_text_means(layer_names: Iterable[str], vllm_config: Any, device: torch.device) -> None:
    """Settle the means of one group's layers; the first group of a model settles those of all its layers.

    Every rank does so at the same time, for they run the model together.

    Raises:
        RuntimeError: If the model does not run on a text.
    """
    layers = all_layers(vllm_config)
    waiting = [layers[name] for name in layer_names if not layers[name].impl.key_transform.is_settled]
    if not waiting:
        return
    reason = why_none(vllm_config)
    if reason is None and (model := model_with(waiting, vllm_config.model_config)) is not None:
        own = set(model.modules())
        _take({name: layer for name, layer in layers.items() if layer in own}, model, vllm_config, device)
    # A draft sees hidden states of the model beside the text.
    for layer in waiting:
        if not layer.impl.key_transform.is_settled:
            layer.impl.key_transform.settle()
            whose = "a draft." if reason is None else f"this model: {reason}. {MEANS_INSTEAD}"
            logger.warning_once("TurboQuant does not centre the keys of %s", whose)


def why_none(vllm_config: Any) -> str | None:
    """Why no text can tell the means of an engine's model; None if one can."""
    if vllm_config.load_config.load_format == "dummy":
        return "load_format is dummy, and keys of random weights say nothing of those that may be loaded later"
    if vllm_config.model_config.is_hybrid:
        return "layers with a state, which this model has, keep none at start, and the keys behind them would be others"
    return None


def _take(layers: dict[str, Any], model: Any, vllm_config: Any, device: torch.device) -> None:
    """Run the model on the texts, and settle the means of its layers."""
    attending: dict[str, RawAttention] = {}
    for name, layer in attention_layers(layers).items():
        shared = getattr(layer, "kv_sharing_target_layer_name", None)
        attending[name] = RawAttention(_implementation(name, layer), attending[shared] if shared else None)
    replaced = {name: layers[name].impl for name in attending}
    try:
        for name, attention in attending.items():
            layers[name].impl = attention
        num_tokens = 0
        for ids in _texts(vllm_config):
            run_on_text(model, ids, vllm_config, device)
            num_tokens += len(ids)
    finally:
        for name, impl in replaced.items():
            layers[name].impl = impl
    without = [name for name, attention in attending.items() if not attention.settle()]
    logger.info_once("TurboQuant took its key means from %d tokens of the texts that it ships with.", num_tokens)
    if without:
        logger.warning_once("TurboQuant does not centre the keys of %s: their mean is not finite.", ", ".join(without))


def _implementation(name: str, layer: Any) -> Any:
    """A layer's implementation of ours, also where it is left uncompressed.

    Raises:
        RuntimeError: If it has none.
    """
    impl = layer.left_by if hasattr(layer, "left_by") else getattr(layer, "impl", None)
    if not hasattr(impl, "key_transform"):
        raise RuntimeError(
            f"{name} is {type(layer).__name__} of another backend, and TurboQuant cannot run it on a text to take the "
            f"key means. {MEANS_INSTEAD}"
        )
    return impl


def _texts(vllm_config: Any) -> Iterator[list[int]]:
    """The tokens of every text, as many as a batch may have; without a tokenizer arbitrary ones, always the same."""
    model_config = vllm_config.model_config
    most = min(vllm_config.scheduler_config.max_num_batched_tokens, model_config.max_model_len)
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        random = torch.Generator().manual_seed(0)
        yield torch.randint(model_config.get_vocab_size(), (min(most, NUM_ARBITRARY),), generator=random).tolist()
        return
    for text in shipped_texts():
        yield list(tokenizer.encode(text))[:most]


@cache
def shipped_texts() -> tuple[str, ...]:
    """Texts of several kinds, in an order that never changes."""
    paths = sorted(files("turboquant_vllm").joinpath("texts").iterdir(), key=lambda path: path.name)
    return tuple(path.read_text("utf-8") for path in paths)
