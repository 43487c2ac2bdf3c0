import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig

from turboquant_core.command_output import CommandError
from turboquant_hf.tools.caches import check_heads
from turboquant_hf.tools.eval.layer_errors import layer_errors


@pytest.mark.parametrize("command", ["calibrate", "tune"])
def test_commands_that_know_one_size_refuse_two(command):
    check_heads(LlamaConfig(), command, "Do without.")
    message = (
        rf"layer 0 of this deepseek_v3 model \(MLA\) stores keys of 512 channels and values of 64, and {command} takes "
        r"one size\. Do without\."
    )
    with pytest.raises(CommandError, match=message):
        check_heads(DeepseekV3Config(), command, "Do without.")


def test_errors_of_what_attention_does_not_read_are_not_measured(tiny_latent_config):
    model = DeepseekV3ForCausalLM(tiny_latent_config(DeepseekV3Config)).eval()
    with torch.no_grad():
        assert layer_errors(model, torch.ones(1, 20, dtype=torch.int64), {"tq4": (4, 4)}) == {"tq4": []}
