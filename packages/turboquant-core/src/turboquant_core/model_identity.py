"""Which model a file of calibration belongs to."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from turboquant_core.files import parse_json

# Fields of a configuration that say which layers have a rotary embedding, and what else it is.
_ROTARY_FIELD = re.compile(r"(?!_|ignore_keys).*(rope|rotary|nope|alibi)|layer_types|position_embedding_type")
# Models whose layers of full attention have a rotary embedding only where the model has no window, used or not.
_HANG_ON_WINDOWS = re.compile(r"exaone|kolibri1")
# Those that transformers or vLLM moves into `rope_parameters`, and what others are made of.
_MOVED = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "no_rope_layer_interval"}
_MOVED |= {"rotary_pct", "rotary_emb_base", "rotary_emb_fraction"}
_OTHER_NAMES = {"mrope": "default", "su": "longrope"}
# Kinds of rotary embedding that the length a model was trained for belongs to.
_KNOW_LENGTH = ("dynamic", "llama3", "longrope", "yarn")
# Fields that files written before lack.
_ADDED = {"rope", "rope_fields"}
_SHOWN_LENGTH = 100

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ModelIdentity:
    """What a configuration says of the keys that a model makes; equal for a model and its quantised weights.

    Weights are not looked at: two models of one shape, such as a base model and its fine-tune, are equal. What was
    calibrated on the one serves the other; only how closely keys and values are stored depends on it.

    Attributes:
        architecture: Class of the model. Informs, and is not compared: one model has several.
        model_type: Model type of the text model.
        num_layers: Layers of the text model, those without a KV cache included.
        hidden_size: Width of the text model.
        num_attention_heads: Query heads.
        vocab_size: Size of the vocabulary.
        rope_theta: Base of the rotary embedding, one or one for each kind of layer in the order of their names; empty
            when there is none.
        rope_factor: Factors by which the rotary embedding is stretched, in the same order; 1 when it is not.
        rope: Every other parameter of the rotary embedding: names such as "rope_type" or
            "full_attention.low_freq_factor" with values as JSON. None in files written before, and not compared then.
        rope_fields: Fields of the configuration beside them that say which layers have a rotary embedding, such as
            "no_rope_layers". One is compared where both have it, for versions of transformers differ in them.
    """

    architecture: str = field(compare=False)
    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    rope_theta: tuple[float, ...]
    rope_factor: tuple[float, ...]
    rope: Pairs | None = None
    rope_fields: Pairs = ()

    @classmethod
    def of(cls, text_config: object, architecture: str) -> "ModelIdentity":
        """The identity of a transformers model, from the configuration of its text model.

        Args:
            text_config: `config.get_text_config()`.
            architecture: Class of the model, such as "Qwen2ForCausalLM".

        Raises:
            ValueError: If the configuration lacks a field.
        """
        rotary = _rotary_parameters(text_config)
        return cls(
            architecture=architecture,
            model_type=_required(text_config, "model_type"),
            num_layers=_required(text_config, "num_hidden_layers"),
            hidden_size=_required(text_config, "hidden_size"),
            num_attention_heads=_required(text_config, "num_attention_heads"),
            vocab_size=_required(text_config, "vocab_size"),
            rope_theta=tuple(float(parameters["rope_theta"]) for parameters in rotary),
            rope_factor=tuple(float(parameters.get("factor") or 1) for parameters in rotary),
            rope=_pairs(_other_parameters(text_config)),
            rope_fields=_pairs(_rotary_fields(text_config)),
        )

    @classmethod
    def from_dict(cls, data: object) -> "ModelIdentity":
        """The identity that `to_dict` wrote.

        Raises:
            ValueError: If the data is no identity.
        """
        known = {each.name: each.type for each in fields(cls)}
        if not isinstance(data, dict) or data.keys() not in (known.keys(), known.keys() - _ADDED):
            raise ValueError(f"the fields of the model must be {', '.join(known)}")
        values = dict(data)
        for name in data:
            expected = known[name]
            if name in _ADDED:
                if not isinstance(data[name], dict):
                    raise ValueError(f"{name} of the model is {data[name]!r}, no object")
                values[name] = _pairs(data[name])
            elif expected == tuple[float, ...]:
                values[name] = _numbers(name, data[name])
            elif type(data[name]) is not expected or (expected is int and data[name] < 0):
                raise ValueError(f"{name} of the model is {data[name]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        rope, rope_fields = data.pop("rope"), data.pop("rope_fields")
        if rope is not None:
            data["rope"] = {name: json.loads(value) for name, value in rope}
            data["rope_fields"] = {name: json.loads(value) for name, value in rope_fields}
        return data

    @classmethod
    def from_json(cls, text: str) -> "ModelIdentity":
        """The identity that `to_json` wrote.

        Raises:
            ValueError: If the text is no identity.
        """
        return cls.from_dict(parse_json(text))

    def to_json(self) -> str:
        """This identity as JSON."""
        return json.dumps(self.to_dict())

    def differences(self, other: "ModelIdentity") -> list[str]:
        """What tells two models apart, such as "hidden_size 576 and 1536"; empty when they are equal."""
        plain = [each.name for each in fields(self) if each.compare and each.name not in _ADDED]
        triples = [(name, getattr(self, name), getattr(other, name)) for name in plain]
        if self.rope is not None and other.rope is not None:
            mine, its = dict(self.rope), dict(other.rope)
            triples += [(name, mine.get(name, "none"), its.get(name, "none")) for name in sorted(mine | its)]
        mine, its = dict(self.rope_fields), dict(other.rope_fields)
        triples += [(name, mine[name], its[name]) for name in sorted(mine.keys() & its.keys())]
        return [f"{name} {_shown(mine)} and {_shown(its)}" for name, mine, its in triples if mine != its]

    def check_is(self, model: "ModelIdentity | None", found: str, remedy: str) -> None:
        """Refuse what belongs to another model than `model`, if that is known.

        Args:
            model: The model that it is to be used for.
            found: What belongs to this model, such as "FILE holds the calibration of MODEL".
            remedy: What to do about it, a sentence.

        Raises:
            ValueError: If `model` is another.
        """
        if model is not None and (differences := self.differences(model)):
            raise ValueError(
                f"{found} ({self.architecture}), and this model is another ({model.architecture}): "
                f"{'; '.join(differences)}. {remedy}"
            )


def architecture_of(config: object) -> str:
    """The first architecture that a configuration names, whatever a file gave it for one."""
    named = getattr(config, "architectures", None)
    first = named[0] if isinstance(named, list | tuple) and named else None
    return first if isinstance(first, str) else "this model"


def _required(config: object, name: str) -> Any:
    value = getattr(config, name, None)
    if value is None:
        raise ValueError(f"{type(config).__name__} names no {name}; pass the configuration of a text model")
    return value


def _rotary_parameters(config: object) -> list[Mapping[str, Any]]:
    """Parameters of the rotary embedding, of one or of each kind of layer; none when there is no such embedding."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in parameters:
        return [parameters]
    nested = [parameters[kind] for kind in sorted(parameters)]
    return [each for each in nested if isinstance(each, Mapping) and "rope_theta" in each]


def _other_parameters(config: object) -> dict[str, Any]:
    """What `rope_parameters` holds but bases and factors, less defaults, spelt alike in every version."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = {f"{kind}.": each for kind, each in parameters.items() if isinstance(each, Mapping)}
    found: dict[str, Any] = {}
    for prefix, each in (nested or {"": parameters}).items():
        rope_type = each.get("rope_type", each.get("type", "default"))
        rope_type = _OTHER_NAMES.get(rope_type, rope_type)
        others = {name: value for name, value in each.items() if name not in ("rope_theta", "factor", "type")}
        others["rope_type"] = None if rope_type == "default" else rope_type
        length = others.pop("original_max_position_embeddings", None)
        if rope_type in _KNOW_LENGTH:
            names = ("original_max_position_embeddings", "max_position_embeddings")
            given = (length, *(getattr(config, name, None) for name in names))
            others[names[0]] = next((each for each in given if each is not None), None)
        if rope_type in ("dynamic", "longrope"):
            others["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
        if others.get("partial_rotary_factor") == 1:
            del others["partial_rotary_factor"]
        found |= {prefix + name: value for name, value in others.items() if value is not None}
    return found


def _rotary_fields(config: object) -> dict[str, Any]:
    fields_of_config = vars(config).items()
    found = {name: value for name, value in fields_of_config if _ROTARY_FIELD.match(name) and name not in _MOVED}
    if _HANG_ON_WINDOWS.match(getattr(config, "model_type", "")):
        found["has_sliding_window"] = getattr(config, "sliding_window", None) is not None
    return found


def _pairs(values: Mapping[str, Any]) -> Pairs:
    return tuple((name, json.dumps(_plain(value), sort_keys=True)) for name, value in sorted(values.items()))


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers and truth values that are equal become one."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if isinstance(value, float):
        return value
    return value if value is None else str(value)


def _numbers(name: str, data: object) -> tuple[float, ...]:
    if not isinstance(data, list) or not all(type(number) in (int, float) for number in data):
        raise ValueError(f"{name} of the model is {data!r}, no list of numbers")
    return tuple(map(float, data))


def _shown(value: object) -> str:
    text = ", ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}..."
