"""Kernels that are launched while the one before them runs."""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous_kernel():
    """Wait until the kernel before this one has finished, then let the next one be launched.

    In this order whatever is older than the kernel before is there from the start: that one waited for it.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
