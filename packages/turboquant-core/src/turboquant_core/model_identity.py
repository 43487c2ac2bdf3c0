"""Which model a file of calibration belongs to."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from turboquant_core.files import parse_json


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
    """

    architecture: str = field(compare=False)
    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    rope_theta: tuple[float, ...]
    rope_factor: tuple[float, ...]

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
        )

    @classmethod
    def from_dict(cls, data: object) -> "ModelIdentity":
        """The identity that `to_dict` wrote.

        Raises:
            ValueError: If the data is no identity.
        """
        known = {each.name: each.type for each in fields(cls)}
        if not isinstance(data, dict) or data.keys() != known.keys():
            raise ValueError(f"the fields of the model must be {', '.join(known)}")
        values = dict(data)
        for name, expected in known.items():
            if expected == tuple[float, ...]:
                values[name] = _numbers(name, data[name])
            elif type(data[name]) is not expected or (expected is int and data[name] < 0):
                raise ValueError(f"{name} of the model is {data[name]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

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
        pairs = [
            (each.name, getattr(self, each.name), getattr(other, each.name)) for each in fields(self) if each.compare
        ]
        return [f"{name} {_shown(mine)} and {_shown(its)}" for name, mine, its in pairs if mine != its]

    def check_is(self, model: "ModelIdentity | None", found: str, remedy: str) -> None:
        """Refuse what belongs to another model than `model`, if that is known.

        Args:
            model: The model that it is to be used for.
            found: What belongs to this model, such as "FILE holds the key means of MODEL".
            remedy: What to do about it, a sentence.

        Raises:
            ValueError: If `model` is another.
        """
        if model is not None and (differences := self.differences(model)):
            raise ValueError(
                f"{found} ({self.architecture}), and this model is another ({model.architecture}): "
                f"{'; '.join(differences)}. {remedy}"
            )


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


def _numbers(name: str, data: object) -> tuple[float, ...]:
    if not isinstance(data, list) or not all(type(number) in (int, float) for number in data):
        raise ValueError(f"{name} of the model is {data!r}, no list of numbers")
    return tuple(map(float, data))


def _shown(value: object) -> str:
    return ", ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
