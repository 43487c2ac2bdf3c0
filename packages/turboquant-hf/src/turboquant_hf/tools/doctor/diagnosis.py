"""Everything that `turboquant doctor` says of a model."""

import json
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from turboquant_core.config import preset_bits
from turboquant_core.vector_format import can_split
from turboquant_core.vllm_limits import MIN_CAPABILITY
from turboquant_hf._compat import CACHE_ARGUMENT, gguf_weights_in_full
from turboquant_hf.support import LayerAttention
from turboquant_hf.tools.doctor.attention import GROWING_KINDS, ModelAttention
from turboquant_hf.tools.doctor.cards import Card
from turboquant_hf.tools.doctor.checkpoint import Checkpoint
from turboquant_hf.tools.doctor.engines import Verdict, by_transformers, by_vllm
from turboquant_hf.tools.doctor.key_bias import KeyBias, key_biases
from turboquant_hf.tools.doctor.sizes import CACHES, token_bytes
from turboquant_hf.tools.models import model_source

# Below it, to start with 6-bit keys: `turboquant demo` measures what 4-bit ones lose on SmolLM2, whose head_dim is 64.
# From it on some models lose little at 4 bits and some much, whatever their head_dim.
FINE_KEYS_BELOW = 128
_HAS_TO_BE_MEASURED = "what a preset loses on this model is not in its files, and has to be measured"
# Models whose image tokens see each other; vLLM's backend serves their text.
BIDIRECTIONAL_IMAGES = ("gemma3", "molmo2", "paligemma")
CALIBRATION_FILE = "turboquant.safetensors"


@dataclass(frozen=True)
class GroupBytes:
    """What the layers of one sort take for a token.

    Attributes:
        layer: The first of them.
        count: How many there are.
        nbytes: Cache name to bytes of one layer; None where it does not store this layer.
    """

    layer: LayerAttention
    count: int
    nbytes: dict[str, int | None]


@dataclass(frozen=True)
class Diagnosis:
    """What doctor found.

    Attributes:
        checkpoint: The model's files.
        attention: How it attends.
        card: The card it was asked for; None for any that vLLM's backend takes.
        groups: Bytes for every sort of layer.
        biases: Key biases of layers that have one.
        preset: The recommended preset, to start with.
        reason: Why that one, and what is not known.
        verdicts: Engine to what it makes of the model with that preset.
    """

    checkpoint: Checkpoint
    attention: ModelAttention
    card: Card | None
    groups: tuple[GroupBytes, ...]
    biases: tuple[KeyBias, ...]
    preset: str
    reason: str
    verdicts: dict[str, Verdict]

    @property
    def alarms(self) -> tuple[KeyBias, ...]:
        """Layers whose key bias plain 4 bits do not survive."""
        return tuple(bias for bias in self.biases if bias.is_alarming)

    @property
    def is_served(self) -> bool:
        """Whether any engine compresses the model."""
        return any(verdict.is_served for verdict in self.verdicts.values())

    def bytes_per_token(self, cache: str) -> int | None:
        """Bytes that a token adds to the layers that keep all of them; None where the cache does not store one."""
        sizes = [(group.nbytes[cache], group.count) for group in self.groups if group.layer.kind in GROWING_KINDS]
        total = 0
        for nbytes, count in sizes:
            if nbytes is None:
                return None
            total += nbytes * count
        return total

    @property
    def measurement(self) -> str | None:
        """What measures how much presets lose; None where transformers does not hold the model's cache."""
        if not self.verdicts["transformers"].is_served:
            return None
        return f"turboquant eval {shlex.quote(self.checkpoint.name)} --cache tq4 --cache k6v4 --measure quality"

    @property
    def can_be_calibrated(self) -> bool:
        """Whether `turboquant calibrate` takes the model; see `turboquant_hf.tools.caches.check_heads`."""
        return all(layer.has_one_head_dim for layer in self.attention.layers if layer.is_compressed)

    @property
    def splits_keys(self) -> bool:
        """Whether a calibration file splits keys, if it orders their channels."""
        key_bits, _ = preset_bits(self.preset)
        return any(can_split(layer.head_dim, key_bits) for layer in self.attention.layers if layer.has_heads)

    def commands(self) -> dict[str, str]:
        """Engine to what runs the model with the recommended preset."""
        calibrate = f"turboquant calibrate {shlex.quote(self.checkpoint.name)} --out {CALIBRATION_FILE}"
        commands = {}
        if self.verdicts["vllm"].is_served:
            commands["vllm"] = f"{calibrate}\n{self._vllm_command()}"
        if self.verdicts["transformers"].is_served:
            first = f"# First, in a shell: {calibrate}\n" if self.can_be_calibrated else ""
            commands["transformers"] = f"{first}{self._transformers_code()}"
        return commands

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        commands = self.commands()
        return {
            "model": self.checkpoint.name,
            "model_type": self.attention.model_type,
            "served": self.is_served,
            "layers": [asdict(layer) for layer in self.attention.layers],
            "softcap": self.attention.softcap,
            "sinks": self.attention.has_sinks,
            "kv_lora_rank": self.attention.kv_lora_rank,
            "weights_bytes": self.checkpoint.weights_nbytes,
            "key_bias": {
                "read": self.checkpoint.tensors is not None,
                "alarm": bool(self.alarms),
                "layers": [{**asdict(bias), "alarm": bias.is_alarming} for bias in self.biases],
            },
            "bytes_per_token": {
                "growing": {cache: self.bytes_per_token(cache) for cache in CACHES},
                "by_layer_sort": [
                    {"first_layer": group.layer.index, "kind": group.layer.kind, "count": group.count} | group.nbytes
                    for group in self.groups
                ],
            },
            "recommended": {"preset": self.preset, "reason": self.reason, "measure": self.measurement},
            "engines": {
                engine: {
                    "served": verdict.is_served,
                    "refusals": list(verdict.refusals),
                    "layers": [asdict(path) for path in verdict.layers],
                    "command": commands.get(engine),
                }
                for engine, verdict in self.verdicts.items()
            },
        }

    def _vllm_command(self) -> str:
        name = shlex.quote(self.checkpoint.name)
        settings = ({} if self.preset == "tq4" else {"preset": self.preset}) | {"calibration": CALIBRATION_FILE}
        serve = f"vllm serve {name} --attention-backend CUSTOM"
        if self.checkpoint.config.model_type in BIDIRECTIONAL_IMAGES:
            serve += " --language-model-only"
        return f"{serve} --additional-config {shlex.quote(json.dumps({'turboquant': settings}))}"

    def _transformers_code(self) -> str:
        source, kwargs = model_source(self.checkpoint.name)
        imported = ["AutoModelForCausalLM"]
        arguments = [json.dumps(source), *(f"{name}={json.dumps(value)}" for name, value in kwargs.items())]
        if kwargs and gguf_weights_in_full():
            imported.append("GgufConfig")
            arguments.append("quantization_config=GgufConfig(dequantize=True)")
        if any(path.path == "fused" for path in self.verdicts["transformers"].layers):
            arguments.append('attn_implementation="turboquant"')
        options = f', key_transforms="{CALIBRATION_FILE}"' if self.can_be_calibrated else ""
        return (
            f"from transformers import {', '.join(imported)}\n"
            "from turboquant_hf import TurboQuantCache\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})\n"
            f'cache = TurboQuantCache(model.config, "{self.preset}"{options})\n'
            f"model.generate(**inputs, {CACHE_ARGUMENT}=cache)"
        )


def diagnose(checkpoint: Checkpoint, attention: ModelAttention, card: Card | None) -> Diagnosis:
    """Find out how a model would be served.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a key bias does not belong to the configuration.
    """
    groups = tuple(
        GroupBytes(layer, count, {cache: _bytes_or_none(cache, layer) for cache in CACHES})
        for layer, count in attention.groups()
    )
    preset, reason = _recommend(attention)
    capability = card.capability if card else MIN_CAPABILITY
    return Diagnosis(
        checkpoint=checkpoint,
        attention=attention,
        card=card,
        groups=groups,
        biases=tuple(key_biases(checkpoint, attention)),
        preset=preset,
        reason=reason,
        verdicts={
            "vllm": by_vllm(checkpoint, attention, preset, capability),
            "transformers": by_transformers(checkpoint.config, attention, preset, capability),
        },
    )


def _bytes_or_none(cache: str, layer: LayerAttention) -> int | None:
    if not layer.is_compressed:
        return None
    try:
        return token_bytes(cache, layer.num_kv_heads, layer.head_dim, value_head_dim=layer.value_head_dim)
    except ValueError:
        return None


def _recommend(attention: ModelAttention) -> tuple[str, str]:
    head_dim = min((layer.head_dim for layer in attention.layers if layer.is_compressed), default=FINE_KEYS_BELOW)
    if head_dim >= FINE_KEYS_BELOW:
        return "tq4", f"head_dim is {head_dim}, where 4 bits are a start and no promise: {_HAS_TO_BE_MEASURED}"
    return "k6v4", (
        f"head_dim is {head_dim}: on SmolLM2, whose head_dim is 64, 4-bit keys lose several times as much as 6-bit "
        f"ones; {_HAS_TO_BE_MEASURED}"
    )
