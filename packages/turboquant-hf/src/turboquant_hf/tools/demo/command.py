"""The command line of the demo."""

from typing import TYPE_CHECKING

from turboquant_core.command_options import DeviceOption, ForceOption, JsonOption, ModelArgument
from turboquant_core.command_output import STDOUT, CommandError, check_outputs, json_output, write_json

if TYPE_CHECKING:
    from turboquant_hf.tools.models import LoadedModel


def demo(
    model: ModelArgument = None, json_target: JsonOption = None, force: ForceOption = False, device: DeviceOption = None
) -> None:
    """Generate from compressed caches, beside the uncompressed one, and measure the difference."""
    outputs = [json_output("demo", json_target)]
    check_outputs(outputs, {"MODEL": model}, force=force)

    from turboquant_hf.tools.demo.comparison import encode_long_prompt, num_steps, run_demo
    from turboquant_hf.tools.demo.render import render
    from turboquant_hf.tools.inputs import chosen_device, load
    from turboquant_hf.tools.terminal import Steps, consoles

    console, errors = consoles()
    loaded = load(model, chosen_device(device), errors)
    long_ids = encode_long_prompt(loaded)
    _check_fits(loaded, long_ids.shape[1])
    with Steps(errors, "generating and scoring", num_steps(long_ids.shape[1])) as steps:
        result = run_demo(loaded, long_ids, on_step=steps.done)
    # Another program may have written there meanwhile.
    check_outputs(outputs, {"MODEL": model}, force=force)
    if json_target is not None:
        write_json("demo", result.to_dict(), json_target)
    if json_target != STDOUT:
        render(result, console)


def _check_fits(loaded: "LoadedModel", num_tokens: int) -> None:
    from turboquant_hf.scoring import CHUNK_SIZE

    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if num_tokens <= CHUNK_SIZE + 2:
        raise CommandError(f"the prompt has only {num_tokens} tokens with this tokenizer")
    if limit is not None and limit < num_tokens:
        raise CommandError(
            f"{loaded.name} takes {limit} tokens and the demo's long prompt has {num_tokens}. Pass a model with a "
            "longer context."
        )
