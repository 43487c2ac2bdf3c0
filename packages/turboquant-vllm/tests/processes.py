"""Processes that need not import vLLM, for they are forked from one that has."""

import gc
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import forkserver

import pytest
import torch

# CUDA does not survive a fork.
FORKS = not torch.cuda.is_available()
# What the engines of the tests compute in: on GPUs our backend takes no float32.
DTYPE = torch.float32 if FORKS else torch.float16
_STARTING = threading.Lock()
# What engines and servers import, also late.
multiprocessing.set_forkserver_preload(
    [
        "vllm.entrypoints.llm",
        "vllm.entrypoints.openai.api_server",
        "vllm.lora.request",
        "vllm.model_executor.models.llama",
        "vllm.v1.engine.async_llm",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.sample.logits_processor",
        "vllm.v1.sample.rejection_sampler",
        "vllm.v1.worker.cpu_worker",
        "compressed_tensors",
        "turboquant_vllm.impl",
    ]
)


def call(function, argument, log, env, *, forks=FORKS):
    """Call a function in a process of its own, with `env` added to the environment.

    Raises:
        AssertionError: With the end of what the process wrote to `log`, if the function raised.
    """
    context = _context(forks)
    with ExitStack() as stack:
        # Python reads its own variables when it starts. This process's, of which there is one set for all threads, are
        # another's again as soon as it has.
        with _STARTING, pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            pool = stack.enter_context(ProcessPoolExecutor(1, context, _begin, (log, dict(os.environ), forks)))
            future = pool.submit(function, argument)
        try:
            return future.result()
        except Exception as error:
            raise AssertionError(f"{log.read_text(errors='replace')[-6000:]}\n{error!r}") from error


def start(function, argument, log):
    """Start a process that calls a function and writes to `log`."""
    process = _context(FORKS).Process(target=_run, args=(function, argument, log, dict(os.environ), FORKS))
    process.start()
    return process


def _run(function, argument, *begins):
    _begin(*begins)
    function(argument)


def _context(forks):
    if forks:
        # What it starts with, all that it forks have.
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver" if forks else "spawn")


def _begin(log, environment, forks):
    with log.open("ab") as output:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
    os.environ.update(environment)
    # It has been given the caller's path in place of its own.
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if forks:
        # What was imported is not garbage.
        gc.freeze()
        # On CPUs vLLM asks for processes that would import it again.
        multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")
