"""What keys of every layer go through: measured on one part of a text, and tried on another at other positions."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from turboquant_core import TurboQuantConfig
from turboquant_core.calibration import Calibration
from turboquant_core.key_transform import KeyTransform
from turboquant_core.model_identity import ModelIdentity
from turboquant_core.pair_transform import pair_transform, unusable_heads
from turboquant_hf._compat import with_cache
from turboquant_hf.attention.dispatch import own_attention
from turboquant_hf.layers.build import DEFAULT_RECENT_TOKENS, DEFAULT_SINK_TOKENS
from turboquant_hf.tools.calibrate.probes import KEY_BITS, KeptTokens, PairProbe, TransformProbe
from turboquant_hf.tools.calibrate.rotary_pairs import rotary_pairs
from turboquant_hf.tools.calibrate.sums import Sums
from turboquant_hf.tools.calibrate.watch import WatchedCache
from turboquant_hf.tools.models import LoadedModel

CHUNK_SIZE = 512
KEPT = (KeptTokens(DEFAULT_SINK_TOKENS, DEFAULT_RECENT_TOKENS), KeptTokens(0, 0))
CENTRED, SCALED, ORDERED = "mean", "scale", "scale and order"
"""What is tried: keys less their mean alone, with a scale too, and in two halves of unequal bits."""


@dataclass(frozen=True)
class MeasuredLayer:
    """One layer.

    Attributes:
        transform: What its keys are to go through.
        kind: The name of what was tried and erred least.
        errors: What each that was tried changes the attention's output by on the held-out text, as a share.
        left: Why heads are left unscaled, by head; or the whole layer, under None.
    """

    transform: KeyTransform
    kind: str
    errors: Mapping[str, float]
    left: Mapping[int | None, str]


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes:
        layers: By index. Layers that store no keys of their own are not among them.
        calibration: What a file keeps of it.
    """

    layers: Mapping[int, MeasuredLayer]
    calibration: Calibration


def num_forwards(num_measured: int, num_held_out: int) -> int:
    """Forward passes that `measure` needs for that many tokens."""
    return 1 + len(KEPT) * sum(-(-count // CHUNK_SIZE) for count in (num_measured, num_held_out))


@torch.inference_mode()
def measure(
    loaded: LoadedModel,
    measured: torch.Tensor,
    held_out: torch.Tensor,
    on_forward: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure keys and queries of a text, and try what comes of it on what follows the text.

    Twice: for caches that keep the first token and the newest of each query as they are, which are left out, and for
    caches that store all tokens as codes.

    Args:
        loaded: The model.
        measured: int64 [1, num_tokens], of a text.
        held_out: int64 [1, num_tokens], of another text; together no longer than the model's context.
        on_forward: Called after each forward pass.
    """
    model = loaded.model
    identity = ModelIdentity.of(model.config.get_text_config(decoder=True), type(model).__name__)
    pairs = rotary_pairs(model, measured, identity)
    on_forward()
    layers, codes_only = (_measured(model, pairs, measured, held_out, on_forward, kept) for kept in KEPT)
    chosen, of_codes = ({index: layer.transform for index, layer in found.items()} for found in (layers, codes_only))
    return Measured(layers, Calibration(chosen, identity, loaded.name, measured.shape[1], of_codes))


def _measured(
    model: PreTrainedModel,
    pairs: Mapping[int, torch.Tensor | str],
    measured: torch.Tensor,
    held_out: torch.Tensor,
    on_forward: Callable[[], None],
    kept: KeptTokens,
) -> dict[int, MeasuredLayer]:
    """The layers, for caches that keep these tokens as they are."""
    cache = WatchedCache(config=model.config)
    reason = own_attention(model.config)
    sums: dict[int, Sums] = defaultdict(Sums)
    pair_probe = PairProbe(cache, kept, sums)
    with nullcontext() if reason else pair_probe.at_work(model):
        for index, chunk in enumerate(torch.split(measured, CHUNK_SIZE, dim=1)):
            pair_probe.num_before = index * CHUNK_SIZE
            _forward(model, chunk, cache)
            for layer, keys in cache.new_keys.items():
                sums[layer].add_keys(keys[0, :, kept.first if index == 0 else 0 :])
            on_forward()
    tried: dict[int, dict[str, KeyTransform]] = {}
    left: dict[int, dict[int | None, str]] = {}
    for layer, found in sums.items():
        tried[layer], left[layer] = _transforms(found, reason or pairs[layer])
    transforms = TransformProbe(cache, kept, tried)
    if not reason:
        with transforms.at_work(model):
            for index, chunk in enumerate(torch.split(held_out, CHUNK_SIZE, dim=1)):
                transforms.num_before = measured.shape[1] + index * CHUNK_SIZE
                _forward(model, chunk, cache)
                on_forward()
    return {layer: _chosen(tried[layer], transforms.errors(layer), left[layer]) for layer in sorted(sums)}


def _forward(model: PreTrainedModel, input_ids: torch.Tensor, cache: WatchedCache) -> None:
    # Logits of all would take more memory than keys do. With a number in place of an index, Gemma 4's layers that share
    # keys would compute the last token alone.
    last = torch.tensor([input_ids.shape[1] - 1], device=model.device)
    model(input_ids=input_ids.to(model.device), **with_cache(cache), logits_to_keep=last)


def _transforms(sums: Sums, pairs: torch.Tensor | str) -> tuple[dict[str, KeyTransform], dict[int | None, str]]:
    """The transforms to try for a layer, by name, and why heads or all are left; `pairs`, or why there are none."""
    mean = sums.mean_key.float()
    # Of a head that is not finite.
    mean = torch.where(mean.isfinite().all(-1, keepdim=True), mean, 0)
    tried = {CENTRED: KeyTransform(mean)}
    if isinstance(pairs, str):
        return tried, {None: pairs}
    energies = sums.energies
    left: dict[int | None, str] = dict(unusable_heads(*energies).items())
    if len(left) < len(mean):
        whole = pair_transform(mean, *energies, pairs)
        tried[SCALED] = KeyTransform(mean, whole.scale)
        if TurboQuantConfig(mean.shape[-1], KEY_BITS).fitted_to(whole).key_split:
            tried[ORDERED] = whole
    return tried, left


def _chosen(
    tried: Mapping[str, KeyTransform], errors: Mapping[str, float], left: Mapping[int | None, str]
) -> MeasuredLayer:
    finite = {name: error for name, error in errors.items() if error < torch.inf}
    kind = min(finite, key=lambda name: finite[name]) if CENTRED in finite else CENTRED
    if kind == CENTRED and len(tried) > 1:
        left = {**left, None: "nothing tried errs less than the mean alone"}
    return MeasuredLayer(tried[kind], kind, errors, left)
