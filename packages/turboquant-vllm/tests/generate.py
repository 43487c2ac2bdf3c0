"""Generate greedily with one vLLM engine."""

import os
from functools import partial

import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

import forced
import processes

kept = []


def _logprobs(steps):
    """For every token generated, the logprobs of the likeliest tokens there."""
    return [{str(token): entry.logprob for token, entry in step.items()} for step in steps]


def _prompt(prompt):
    """A prompt for vLLM; `image` is a colour, which fills an image."""
    if isinstance(prompt, str) or "image" not in prompt:
        return prompt
    image = Image.new("RGB", (56, 56), prompt["image"])
    return {"prompt": prompt["prompt"], "multi_modal_data": {"image": image}}


def _use_references():
    """Have our layers call the references of their kernels."""
    from turboquant_vllm import impl
    from turboquant_vllm.prefill import attention, context_codes

    replaced = {
        impl: ("cache_update", "decode_attention"),
        attention: ("cache_gather",),
        context_codes: ("decode_attention",),
    }
    for module, names in replaced.items():
        for name in names:
            setattr(module, name, partial(getattr(module, name), path="reference"))


def _sleep(llm, level):
    """Sleep and wake up again, as vLLM documents it; the second level drops the weights."""
    llm.sleep(level=level)
    if level == 2:
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
    llm.wake_up()


def _sampling(request, text):
    """Greedy, or along a given text."""
    return SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"] if text is None else len(text),
        ignore_eos=True,
        logprobs=5,
        prompt_logprobs=request["prompt_logprobs"],
        extra_args=None if text is None else {forced.FORCED: text},
    )


def _jitter(size, model):
    """Have a model's logits differ from what they are by noise, as those of another processor do."""
    noise = torch.Generator().manual_seed(0)

    def disturb(module, arguments, logits):
        return logits if logits is None else logits + size * torch.randn(logits.shape, generator=noise)

    model.logits_processor.register_forward_hook(disturb)


def generate(request):
    """What an engine says: `request` has the options of the fixture `generate`, with `engine` those of vLLM's LLM."""
    if request["references"]:
        _use_references()
    engine = {
        "dtype": processes.DTYPE,
        "enforce_eager": True,
        "max_model_len": 1024,
        "disable_log_stats": False,
        # Of the device's memory, the first has to be free; the second is taken, and on CPUs written, at start.
        "gpu_memory_utilization": 0.05 if torch.cuda.is_available() else 0.3,
        "kv_cache_memory_bytes": 2**28,
        **request["engine"],
    }
    if engine["enforce_eager"]:
        # vLLM compiles parts of its sampler all the same.
        torch.compiler.set_stance("force_eager")
    texts = request["forced"] or [None] * len(request["prompts"])
    if any(texts):
        engine["logits_processors"] = [forced.processor()]
    llm = LLM(request["model"], **engine)
    if jitter := float(os.environ.get("JITTER", "0")):
        llm.apply_model(partial(_jitter, jitter))
    sampling = [_sampling(request, text) for text in texts]
    prompts = [_prompt(prompt) for prompt in request["prompts"]]
    lora = LoRARequest("adapter", 1, request["lora"]) if request["lora"] else None
    rounds = []
    for _ in range(request["rounds"]):
        if rounds and request["forget"]:
            # What a connector keeps it keeps.
            llm.reset_prefix_cache()
        rounds.append(llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora))
    for level in request["sleep"]:
        _sleep(llm, level)
        rounds.append(llm.generate(prompts, sampling, use_tqdm=False))
    config = llm.llm_engine.vllm_config
    if config.parallel_config.world_size == 1:
        # The process ends now, and takes seconds less without an orderly shutdown.
        kept.append(llm)
    cache = config.cache_config
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "tokens": [[list(answer.outputs[0].token_ids) for answer in answers] for answers in rounds],
        "logprobs": [[_logprobs(answer.outputs[0].logprobs) for answer in answers] for answers in rounds],
        # The first token of a prompt has none.
        "prompt_logprobs": [
            [_logprobs((answer.prompt_logprobs or [])[1:]) for answer in answers] for answers in rounds
        ],
        "cached": [[answer.num_cached_tokens for answer in answers] for answers in rounds],
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "second_runner": config.use_v2_model_runner,
        "drafted": counters.get("vllm:spec_decode_num_draft_tokens"),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens"),
    }
