"""What the file of a saved cache says of itself, of which nothing is believed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import NoneType
from typing import Any, Self, TypeVar
from zlib import crc32

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.files import parse_json
from turboquant_core.key_transform import PART_DTYPES, tensor_types
from turboquant_core.model_identity import ModelIdentity, architecture_of
from turboquant_core.scale import SCALE_DTYPE, ScaleRule
from turboquant_core.vector_format import OUTLIER_BITS, STORAGE_FORMAT
from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.storage.tables import FullPrecisionSizes

HEADER = "turboquant-hf cache"
FORMAT_VERSION = 11

# What a model's identity leaves out, for calibration does not ask for it.
HEAD_FIELDS = ("num_key_value_heads", "head_dim")
KEPT_TENSORS = ("kept_keys", "kept_values")
ROW_STARTS = "row_starts"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
"""Types that keys and values of a cache have, by name."""
# Of a model that does not say how much it reads.
CONTEXT = 1 << 16

TensorTypes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class SavedKept:
    """Tokens that are kept as they are.

    Attributes:
        sink_tokens: First tokens that are.
        recent_tokens: Newest tokens that are.
        num_kept: Tokens in the file.
    """

    sink_tokens: int
    recent_tokens: int
    num_kept: int


@dataclass(frozen=True)
class SavedLayer:
    """One layer.

    Attributes:
        config: What is stored for one head.
        batch_size: Rows.
        num_kv_heads: Heads of a row.
        num_tokens: Tokens of a row.
        dtype: Type of keys and values, one of `DTYPES`.
        given: Names of the parts of the transform of keys that the layer was made with, the same in every row.
        kept: What is kept as it is; None for nothing.
        checksums: Name of each of its tensors to their crc32.
    """

    config: TurboQuantConfig
    batch_size: int
    num_kv_heads: int
    num_tokens: int
    dtype: str
    given: list[str]
    kept: SavedKept | None
    checksums: dict[str, int]

    @property
    def sink_tokens(self) -> int:
        """First tokens that are kept as they are."""
        return 0 if self.kept is None else self.kept.sink_tokens

    def has_codes(self, is_padded: bool) -> bool:
        """Whether codes of any token are read: of padding, which a mask may show, and of what is not a sink."""
        return is_padded or self.num_tokens > self.sink_tokens

    def tensors(self, is_padded: bool) -> TensorTypes:
        """Names of its tensors, with their types and shapes; `is_padded` where the cache says where rows begin."""
        config, num_heads = self.config, self.batch_size * self.num_kv_heads
        tensors: TensorTypes = {}
        for field, name in slot_tensors(config).items():
            form = config.key_format if field.startswith("key") else config.value_format
            dtype, size = (SCALE_DTYPE, form.num_scales) if "scales" in field else (torch.uint8, form.code_bytes)
            tensors[name] = (dtype, (num_heads, self.num_tokens, size))
        if self.kept is not None:
            kept = (self.batch_size, self.num_kv_heads, self.kept.num_kept)
            for name, head_dim in zip(KEPT_TENSORS, config.head_dims, strict=True):
                tensors[name] = (DTYPES[self.dtype], (*kept, head_dim))
        types = tensor_types(self.num_kv_heads, config.head_dim)
        tensors |= {name: types[name] for name in self.given}
        if self.has_codes(is_padded):
            if config.center_keys and "key_mean" not in self.given:
                tensors["key_mean"] = tensor_types(num_heads, config.head_dim)["key_mean"]
            for name, form in (("key_order", config.key_format), ("value_order", config.value_format)):
                if form.bits in OUTLIER_BITS:
                    tensors[name] = (torch.int64, (num_heads, form.head_dim))
        return tensors

    def check(self, context: int) -> None:
        """Refuse numbers that no cache has, of a model that reads `context` tokens.

        Raises:
            ValueError: If there are any.
        """
        for name in ("batch_size", "num_kv_heads", "num_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}")
        known = tuple(PART_DTYPES)
        if unknown := [name for name in self.given if name not in known]:
            raise ValueError(f"given names {unknown[0]!r:.100}; keys go through {', '.join(known)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; keys and values are one of {', '.join(DTYPES)}")
        if self.kept is None:
            return
        sinks, recent, num_kept = self.kept.sink_tokens, self.kept.recent_tokens, self.kept.num_kept
        # Room is made for all that may be kept, whether or not there are so many tokens.
        room = max(self.num_tokens, context)
        if min(sinks, recent) < 0 or not 0 < sinks + recent <= room:
            raise ValueError(
                f"sink_tokens and recent_tokens are {sinks:,} and {recent:,}; together they are 1 to {room:,}, the "
                "tokens of the cache or of the model's context"
            )
        num_sinks = min(sinks, self.num_tokens)
        after = self.num_tokens - num_sinks
        # The window of the next token, and no more than there is room for.
        least = num_sinks + min(after, max(0, recent - 1))
        most = num_sinks + min(after, FullPrecisionSizes(sinks, recent).ring)
        if not least <= num_kept <= most:
            raise ValueError(
                f"num_kept is {num_kept:,}, and with {self.num_tokens:,} tokens, {sinks:,} sinks and {recent:,} recent "
                f"ones it is {least:,} to {most:,}"
            )


@dataclass(frozen=True)
class SavedCache:
    """A cache.

    Attributes:
        layers: Its layers.
        row_starts: crc32 of the tensor that says where rows begin, which layers share; None where none is padded.
    """

    layers: list[SavedLayer]
    row_starts: int | None

    @property
    def is_padded(self) -> bool:
        """Whether the file says where rows begin."""
        return self.row_starts is not None

    def tensors(self) -> TensorTypes:
        """Names of all tensors in the file, with their types and shapes."""
        tensors: TensorTypes = {}
        if self.is_padded:
            tensors[ROW_STARTS] = (torch.int32, (self.layers[0].batch_size,))
        for index, layer in enumerate(self.layers):
            tensors |= {stored_name(index, name): stored for name, stored in layer.tensors(self.is_padded).items()}
        return tensors

    def checksums(self) -> dict[str, int | None]:
        """Names of all tensors with their crc32."""
        layers = {
            stored_name(index, name): checksum
            for index, layer in enumerate(self.layers)
            for name, checksum in layer.checksums.items()
        }
        return {ROW_STARTS: self.row_starts, **layers}

    def check(self, text_config: PreTrainedConfig) -> None:
        """Refuse numbers that no cache of this model has, and layers that disagree.

        Raises:
            ValueError: If there are any.
        """
        context = getattr(text_config, "max_position_embeddings", None) or CONTEXT
        first = self.layers[0]
        if self.is_padded and first.kept is None:
            raise ValueError("rows are padded, and no tokens are kept as they are")
        for index, layer in enumerate(self.layers):
            try:
                layer.check(context)
                for name, mine, its in zip(_SHARED, _shared(first), _shared(layer), strict=True):
                    if mine != its:
                        raise ValueError(f"{name} is {its}, and {mine} in layer 0")
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from None

    def to_metadata(self, text_config: PreTrainedConfig) -> dict[str, str]:
        """Metadata of the file, of a model of this configuration."""
        header = {
            "version": FORMAT_VERSION,
            "storage_format": STORAGE_FORMAT,
            "model": _identity(text_config).to_dict(),
            "heads": _heads(text_config),
            **asdict(self),
        }
        return {HEADER: json.dumps({**header, "checksum": checksum_of(header)})}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], layers: Sequence[object], text_config: PreTrainedConfig) -> Self:
        """What a file says.

        Args:
            metadata: Its metadata.
            layers: Those of a new cache for the model.
            text_config: The configuration of the model.

        Raises:
            ValueError: If it is no cache, damaged, or not of this model or this version.
        """
        if HEADER not in metadata:
            raise ValueError("it is no cache that TurboQuantCache.save wrote")
        header = parse_json(metadata[HEADER])
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        if (found := header.get("version")) != FORMAT_VERSION:
            raise ValueError(f"its format version is {found}, and this version of turboquant-hf reads {FORMAT_VERSION}")
        if header.pop("checksum", None) != checksum_of(header):
            raise ValueError("its header is damaged: its checksum is another")
        del header["version"]
        if (stored := header.pop("storage_format", None)) != STORAGE_FORMAT:
            raise ValueError(
                f"its codes are of storage format {stored}, and this version of turboquant-core reads {STORAGE_FORMAT}"
            )
        _check_model(header.pop("model", None), header.pop("heads", None), text_config)
        for index, layer in enumerate(layers):
            if type(layer) is not TurboQuantLayer:
                raise ValueError(f"layer {index} of this model is a {type(layer).__name__}, and no file has any")
        saved = _dataclass(cls, header, "the header")
        if len(saved.layers) != len(layers):
            raise ValueError(f"it has {len(saved.layers)} layers, and this model has {len(layers)}")
        saved = replace(saved, layers=[_layer(data, f"layer {index}") for index, data in enumerate(saved.layers)])
        saved.check(text_config)
        return saved


def checksum_of(header: dict[str, Any]) -> int:
    """The crc32 of a header without it."""
    return crc32(json.dumps(header).encode())


def slot_tensors(config: TurboQuantConfig) -> dict[str, str]:
    """The fields of `PageViews`, with the names of a layer's tensors of them, [heads, num_tokens, n].

    Scales are named after the rule that they were made by, which nothing else in them tells.
    """
    return {
        "key_codes": "key_codes",
        "value_codes": "value_codes",
        "key_scales": f"key_scales_{config.key_scale}",
        "value_scales": f"value_scales_{config.value_scale}",
    }


def stored_name(index: int, name: str) -> str:
    """What a layer's tensor is called in the file."""
    return f"layers.{index}.{name}"


_SHARED = ("batch_size", "num_tokens", "dtype", "sink_tokens", "recent_tokens")
"""What layers have in common."""

_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    int | None: (int, NoneType),
    float: (int, float),
    str: (str,),
    ScaleRule: (str,),
    TurboQuantConfig: (dict,),
    SavedKept | None: (dict, NoneType),
    dict[str, int]: (dict,),
    list[str]: (list,),
    list[SavedLayer]: (list,),
}
"""What a field of each type is in JSON."""


def _shared(layer: SavedLayer) -> tuple[object, ...]:
    recent = None if layer.kept is None else layer.kept.recent_tokens
    return layer.batch_size, layer.num_tokens, layer.dtype, layer.sink_tokens, recent


def _layer(data: object, name: str) -> SavedLayer:
    layer = _dataclass(SavedLayer, data, name)
    config = _dataclass(TurboQuantConfig, layer.config, f"the configuration of {name}")
    kept = None if layer.kept is None else _dataclass(SavedKept, layer.kept, f"what is kept of {name}")
    return replace(layer, config=config, kept=kept)


def _dataclass(cls: type[_T], data: object, name: str) -> _T:
    """The dataclass whose fields these are; dataclasses in it stay data."""
    expected = {field.name: _JSON_TYPES[field.type] for field in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(data, dict) or data.keys() != expected.keys():
        raise ValueError(f"the fields of {name} must be {', '.join(expected)}")
    for field, kinds in expected.items():
        if type(data[field]) not in kinds:
            raise ValueError(f"{field} of {name} is {data[field]!r}")
    return cls(**data)


def _check_model(identity: object, heads: object, text_config: PreTrainedConfig) -> None:
    ModelIdentity.from_dict(identity).check_is(
        _identity(text_config), "it is the cache of a model", "A cache is of use to that model alone"
    )
    if heads != _heads(text_config):
        raise ValueError(f"it is the cache of a model with {heads}, and this model has {_heads(text_config)}")


def _identity(text_config: PreTrainedConfig) -> ModelIdentity:
    return ModelIdentity.of(text_config, architecture_of(text_config))


def _heads(text_config: PreTrainedConfig) -> dict[str, Any]:
    return {field: getattr(text_config, field, None) for field in HEAD_FIELDS}
