"""Run vLLM's server."""

import runpy
import sys


def serve(arguments):
    """Serve as `vllm serve` does, but for a look at a package called vllm, which the build for CPUs is not."""
    sys.argv[1:] = arguments
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
