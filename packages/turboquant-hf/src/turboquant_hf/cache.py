"""The cache to pass as `past_key_values`."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_core.quantized import storage_nbytes
from turboquant_core.scale import ScaleRule
from turboquant_hf._compat import EMPTY_LAYERS, CacheLayerMixin, PreTrainedConfig
from turboquant_hf.attention.dispatch import ATTENTION
from turboquant_hf.calls import GuardedCache
from turboquant_hf.inference_mode import outside_inference_mode
from turboquant_hf.layers.build import build_layers
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.memory import MemoryReport, layer_tensors, memory_report
from turboquant_hf.saving.file import load_layers, save_layers


class TurboQuantCache(GuardedCache):
    """A KV cache that keeps TurboQuant codes instead of keys and values.

    ```python
    cache = TurboQuantCache(model.config)
    model.generate(**inputs, past_key_values=cache)
    ```

    Full-attention layers are compressed, and sliding-window layers within their window. Linear-attention layers, those
    that share another's cache, and with `max_length` those with a window beside full attention stay as transformers
    makes them; `memory_report()` says which is which.

    Args:
        config: The model's configuration.
        preset: "tq4", "tq3.5", "tq3", "tq2.5", "tq2", "k6v4" or "k8v4".
        offloading: Keep layers on the CPU while they are not used, as in `DynamicCache`.
        max_length: The most tokens of a sequence. With it storage is made once and stays where it is, for
            `torch.compile` and CUDA graphs, which `generate` then uses by itself on a GPU.
        max_cache_len: Another name of max_length, as transformers' `StaticCache` calls it.
        skip_layers: Layers that keep full precision, by index; negative ones count from the last.
        layer_bits: (key_bits, value_bits) of single layers, by index, instead of the preset's; or the path of a file
            that `turboquant tune` wrote, which has them for every layer.
        key_transforms: What keys of single layers go through before codes, by index: `turboquant_core.KeyTransform`s.
            One without a mean leaves it to the prompt; with an order, keys of 2, 3 and 4 bits are split. Or the path of
            a file that `turboquant calibrate` wrote, which has a scale and an order for every layer that gains by them;
            its means are for vLLM, and the prompt's own are used instead.
        sink_tokens: First tokens of every sequence that layers keep as they are. Those with a window read them as long
            as it shows them.
        recent_tokens: Newest tokens that they keep as they are: what a token sees of itself and those before it. Other
            quantised caches call it residual_length.
        key_bits: Bits of keys, instead of the preset's, as for `TurboQuantConfig`. Bits in `layer_bits` win over both.
        value_bits: The same for values.
        key_scale: How scales of keys are made, instead of the preset's, as for `TurboQuantConfig`.
        value_scale: The same for values.
        center_keys: Whether keys are stored less the mean that the prompt gives, instead of the preset's. Layers whose
            transform has a mean are stored less that one.
        **unknown: Refused.

    Raises:
        TypeError: If config is no model configuration, or there is no such option.
        ValueError: If preset, bits or a layer do not exist, bits or a transform are for a layer that is not compressed,
            a transform does not fit its layer, its key_bits or center_keys, a number of tokens is none, the model has
            no layer that this cache can hold, a file is damaged or of another model, max_length comes with offloading
            or under both of its names, or there is no CUDA device to offload from.
        FileNotFoundError: If there is no such file.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        preset: str = "tq4",
        *,
        offloading: bool = False,
        max_length: int | None = None,
        max_cache_len: int | None = None,
        skip_layers: Iterable[int] = (),
        layer_bits: Mapping[int, tuple[float, float]] | str | PathLike[str] | None = None,
        key_transforms: Mapping[int, KeyTransform] | str | PathLike[str] | None = None,
        sink_tokens: int | None = None,
        recent_tokens: int | None = None,
        key_bits: float | None = None,
        value_bits: float | None = None,
        key_scale: ScaleRule | None = None,
        value_scale: ScaleRule | None = None,
        center_keys: bool | None = None,
        **unknown: Any,
    ) -> None:
        _refuse(unknown)
        if max_length is not None and max_cache_len is not None:
            raise ValueError(
                f"max_length is {max_length} and max_cache_len {max_cache_len}, two names of one option; give one"
            )
        max_length = max_cache_len if max_length is None else max_length
        if max_length is not None and offloading:
            raise ValueError("offloading does not go with max_length: a static cache stays where it is")
        if offloading and not torch.cuda.is_available():
            raise ValueError("offloading moves layers off a CUDA device, and torch sees none here; leave it out")
        layers = build_layers(
            config,
            preset,
            max_length=max_length,
            skip_layers=skip_layers,
            layer_bits={} if layer_bits is None else layer_bits,
            key_transforms={} if key_transforms is None else key_transforms,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            codes={
                "key_bits": key_bits,
                "value_bits": value_bits,
                "key_scale": key_scale,
                "value_scale": value_scale,
                "center_keys": center_keys,
            },
        )
        super().__init__(layers=layers, offloading=offloading)
        self._text_config = config.get_text_config(decoder=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copy serves the same model, and looks at that model's configuration for how it attends.
        memo[id(self._text_config)] = self._text_config
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(deepcopy(self.__dict__, memo))
        return twin

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Keys, values and window of every layer as of a `DynamicCache`; dequantised one layer at a time."""
        for layer in self.layers:
            window = getattr(layer, "sliding_window", None)
            yield layer.keys, layer.values, None if window is None else torch.tensor(window)

    @property
    def max_cache_len(self) -> int:
        """The name that PEFT's prefix tuning looks up, for `get_max_length()`; it warns of what PEFT does with it."""
        warnings.warn(
            "PEFT's prefix tuning puts a DynamicCache of its own in place of this cache, and nothing is compressed. "
            "docs/quickstart-hf.md says how to fill this one with the prefix.",
            stacklevel=2,
        )
        return int(self.get_max_length())

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask is over.

        First tokens that are handed over attend on themselves, also where there is room for more.
        """
        kept = (x for x in self.layers if isinstance(x, CacheLayerMixin) and not isinstance(x, EMPTY_LAYERS))
        reads_codes = self._text_config._attn_implementation == ATTENTION
        if reads_codes and all(isinstance(x, TurboQuantLayer) and x.is_empty for x in kept):
            return query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write everything held to a safetensors file, to be continued with `load`.

        Args:
            path: The file. A saved cache that is there is replaced.
            overwrite: Replace any other file too, and send what is no file, such as a pipe, what a file would hold.

        Raises:
            FileExistsError: If there is something that is no saved cache, without `overwrite`.
            OSError: If the file cannot be written.
            ValueError: If the cache is empty, or has layers that are not compressed.
            RuntimeError: If a call stopped between layers and was not taken back.
        """
        self._calls.check(self.layers)
        save_layers(self.layers, self._text_config, Path(path), overwrite=overwrite)

    @classmethod
    @outside_inference_mode
    def load(
        cls,
        path: str | PathLike[str],
        config: PreTrainedConfig,
        *,
        device: torch.device | str = "cpu",
        offloading: bool = False,
    ) -> Self:
        """A cache that `save` wrote, with the bits and options that it was made with.

        Keys and values mean something to the very weights that made them: the file names the model's shape and not
        its weights.

        Args:
            path: The file.
            config: The model's configuration, `model.config`.
            device: Where the model runs.
            offloading: As for a new cache.

        Raises:
            OSError: If there is no such file.
            ValueError: If it is damaged, no cache, or one of another model or version.
        """
        cache = cls(config, offloading=offloading)
        cache.layers = list(load_layers(Path(path), cache.layers, cache._text_config, torch.device(device)))
        return cache

    @property
    def nbytes(self) -> int:
        """Allocated bytes of everything the cache keeps, measured from storage."""
        return storage_nbytes(tensor for layer in self.layers for tensor in layer_tensors(layer))

    def memory_report(self) -> MemoryReport:
        """What each layer keeps, measured from storage."""
        return memory_report(self.layers)


def _refuse(unknown: Mapping[str, object]) -> None:
    """Raise TypeError for arguments that a cache does not take, naming those that it does."""
    taken = [name for name in signature(TurboQuantCache).parameters if name not in ("config", "unknown")]
    for name in unknown:
        hint = "; what other caches call residual_length is recent_tokens" if name == "residual_length" else ""
        raise TypeError(f"TurboQuantCache has no option {name!r}{hint}; it has {', '.join(taken)}")
