"""The tables of `turboquant doctor`."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from turboquant_hf.tools.doctor.attention import ModelAttention
from turboquant_hf.tools.doctor.checkpoint import short_name
from turboquant_hf.tools.doctor.diagnosis import Diagnosis
from turboquant_hf.tools.doctor.engines import Verdict
from turboquant_hf.tools.doctor.sizes import CACHES

ENGINE_NAMES = {"vllm": "vLLM", "transformers": "transformers"}


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print what was found, the recommendation last."""
    console.print(_layers(diagnosis))
    console.print(_sizes(diagnosis))
    _print_biases(diagnosis, console)
    for engine, verdict in diagnosis.verdicts.items():
        for refusal in verdict.refusals:
            console.print(Text.assemble((f"{ENGINE_NAMES[engine]} refuses: ", "bold red"), refusal))
    commands = diagnosis.commands()
    if commands:
        console.print(
            Text.assemble(
                ("recommended: ", "bold"),
                f"{diagnosis.preset}{_with_a_file(diagnosis)}. {diagnosis.reason}.",
            )
        )
    titled = {ENGINE_NAMES[engine]: command for engine, command in commands.items()}
    if diagnosis.measurement:
        titled = {"what it loses": diagnosis.measurement, **titled}
    for title, command in titled.items():
        console.print(Text(f"\n{title}:", "bold"))
        # Lines are to be copied: none may be wrapped.
        console.print(Text(command), soft_wrap=True)


def _layers(diagnosis: Diagnosis) -> Table:
    where = diagnosis.card.name if diagnosis.card else "cards from sm_80 on"
    name = short_name(diagnosis.checkpoint.name)
    table = Table(title=f"{name}: layers, and how {diagnosis.preset} serves them on {where}")
    for name in ("layers", "kind", "head_dim", "KV heads", "vLLM", "transformers"):
        table.add_column(name, justify="right" if name in ("layers", "head_dim", "KV heads") else "left")
    for layer, count in diagnosis.attention.groups():
        table.add_row(
            str(count),
            layer.describe(),
            str(layer.head_dim),
            str(layer.num_kv_heads),
            _path(diagnosis.verdicts["vllm"], layer.index),
            _path(diagnosis.verdicts["transformers"], layer.index),
        )
    table.caption = _extras(diagnosis.attention)
    return table


def _path(verdict: Verdict, index: int) -> str:
    return f"{verdict.layers[index].path}: {verdict.layers[index].reason}" if verdict.is_served else "refused"


def _with_a_file(diagnosis: Diagnosis) -> str:
    if not diagnosis.can_be_calibrated:
        return ""
    bytes_more = ", for two bytes each" if diagnosis.splits_keys else ""
    return f" and a calibration file, with which keys lose less{bytes_more}"


def _extras(attention: ModelAttention) -> str | None:
    extras = [
        "attention sinks" if attention.has_sinks else None,
        f"softcap {attention.softcap:g}" if attention.softcap else None,
        f"MLA with kv_lora_rank {attention.kv_lora_rank}" if attention.kv_lora_rank else None,
        "ALiBi" if attention.has_alibi else None,
    ]
    return ", ".join(extra for extra in extras if extra) or None


def _sizes(diagnosis: Diagnosis) -> Table:
    table = Table(title="Bytes per token")
    table.add_column("cache", no_wrap=True)
    for group in diagnosis.groups:
        table.add_column(f"a layer of {group.layer.describe()}", justify="right")
    table.add_column("all that keep every token", justify="right")
    table.add_column("against bf16", justify="right")
    plain = diagnosis.bytes_per_token("bf16")
    for cache in CACHES:
        total = diagnosis.bytes_per_token(cache)
        ratio = f"{plain / total:.2f}x" if plain and total else "-"
        table.add_row(cache, *(_number(group.nbytes[cache]) for group in diagnosis.groups), _number(total), ratio)
    return table


def _number(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes:,}"


def _print_biases(diagnosis: Diagnosis, console: Console) -> None:
    if diagnosis.checkpoint.tensors is None:
        console.print("key biases: not looked at, for no safetensors files were found")
    elif not diagnosis.alarms:
        what = "none" if not diagnosis.biases else f"of {len(diagnosis.biases)} layers, none of them large"
        console.print(f"key biases: {what}")
    else:
        worst = max(diagnosis.alarms, key=lambda bias: bias.logit_error)
        indices = ", ".join(str(bias.layer) for bias in diagnosis.alarms)
        console.print(
            Text.assemble(
                ("key biases: ALARM. ", "bold red"),
                f"They are so large that plain 4-bit keys would ruin the model (layers {indices}): in layer "
                f"{worst.layer}, up to {worst.largest:.0f}, they alone put an error of {worst.logit_error:.1f} nats on "
                "a logit. TurboQuant subtracts the mean key before it quantises, and a bias is part of the mean: "
                "leave center_keys on.",
            )
        )
