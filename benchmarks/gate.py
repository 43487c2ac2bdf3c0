"""What has to be so before anything is timed."""

import torch


def needs_gpu(timed: str = "kernels") -> None:
    """End a benchmark where there is no GPU.

    Raises:
        SystemExit: If there is none.
    """
    if not torch.cuda.is_available():
        raise SystemExit(f"no GPU: this benchmark times {timed} on one")


def checked_errors(error: float, bound: float) -> dict[str, float]:
    """The relative error of what is timed, and that of a bf16 attention on the same values, as results keep them.

    Raises:
        SystemExit: If ours is the larger one.
    """
    if not error <= bound:
        raise SystemExit(f"not timed: relative error {error:.2e}, a bf16 attention makes {bound:.2e}")
    return {"relative_error": error, "bf16_relative_error": bound}
