"""What a worker asks of its model, its batches and its ranks."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import set_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.model_loader import get_model_cls
from vllm.model_executor.models.interfaces import requires_raw_input_tokens
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

__all__ = [
    "cached_tokenizer_from_config",
    "extract_layer_index",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "model_with",
    "run_on_text",
    "split_decodes_and_prefills",
]


def model_with(layers: Iterable[Any], model_config: Any) -> Any:
    """The model that `model_config` describes and that has one of these layers, or None.

    vLLM hands its models to no backend, so it is looked for among all objects of the process.
    """
    kind, wanted = get_model_cls(model_config), set(layers)
    models = (found for found in gc.get_objects() if issubclass(type(found), kind))
    return next((model for model in models if not wanted.isdisjoint(model.modules())), None)


@torch.inference_mode()
def run_on_text(model: Any, ids: list[int], vllm_config: Any, device: torch.device) -> None:
    """Run this rank's part of the model on a text, not compiled, as vLLM's runners call it."""
    num_tokens, model_config, stage = len(ids), vllm_config.model_config, get_pp_group()
    arguments: dict[str, Any] = {
        "input_ids": torch.tensor(ids, device=device),
        "positions": torch.arange(num_tokens, device=device),
        "intermediate_tensors": None,
        "inputs_embeds": None,
    }
    if rows := _position_rows(model_config):
        arguments["positions"] = arguments["positions"].expand(rows, -1).contiguous()
    # A manager without adapters counts as empty.
    if (manager := getattr(model, "lora_manager", None)) is not None:
        manager.set_adapter_mapping(LoRAMapping((0,) * num_tokens, (0,), is_prefill=True))
    with set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True):
        if not stage.is_first_rank:
            arguments["intermediate_tensors"] = IntermediateTensors(stage.recv_tensor_dict())
        elif model_config.is_multimodal_model:
            arguments["inputs_embeds"] = model.embed_input_ids(arguments["input_ids"])
            if not requires_raw_input_tokens(model):
                arguments["input_ids"] = None
        hidden = model(**arguments)
        if not stage.is_last_rank:
            stage.send_tensor_dict(hidden.tensors)


def _position_rows(model_config: Any) -> int:
    """How many positions the model takes for every token, beside each other; 0 where it takes one as it is."""
    if model_config.uses_mrope:
        return 3
    # Of vLLM before 0.30 or so.
    return int(getattr(model_config, "uses_xdrope_dim", 0))
