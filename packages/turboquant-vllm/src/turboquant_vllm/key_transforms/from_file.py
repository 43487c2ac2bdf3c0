"""What keys go through by a calibration file, for the layers and heads of this process."""

from collections.abc import Iterable
from typing import Any

from turboquant_core.key_transform import KeyTransform
from turboquant_vllm._compat.engine import all_layers
from turboquant_vllm._compat.worker import (
    extract_layer_index,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from turboquant_vllm.artifacts import calibration_of


def give_transforms(path: str, layer_names: Iterable[str], vllm_config: Any, *, codes_only: bool) -> None:
    """Give the layers of one group their transforms, whichever of the model's layers and KV heads they are.

    `codes_only` says whether first tokens are read as codes too.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not belong to the model.
    """
    model_config = vllm_config.model_config
    calibration = calibration_of(model_config, path)
    rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    layers = all_layers(vllm_config)
    for name in layer_names:
        impl = layers[name].impl
        if impl.key_transform.is_settled:
            # The layer whose cache this one shares has had it.
            continue
        # Where there are more ranks than KV heads, vLLM gives several ranks the same one.
        total = impl.num_kv_heads * world_size
        if impl.num_kv_heads == 1:
            total = min(world_size, model_config.get_total_num_kv_heads())
        transform = calibration.of_layer(extract_layer_index(name), total, impl.head_size, codes_only=codes_only)
        if not impl.config.key_split:
            # The order of channels is of no use to keys of one width.
            transform = KeyTransform.of_parts(transform.mean, transform.scale, None)
        impl.key_transform.settle(transform.shard(heads_of_rank(total, impl.num_kv_heads, rank, world_size)))


def heads_of_rank(total: int, num_kv_heads: int, rank: int, world_size: int) -> slice:
    """Which num_kv_heads of the total vLLM puts on a tensor-parallel rank."""
    first = rank * total // world_size
    return slice(first, first + num_kv_heads)
