"""Triton kernels and their launches. Importing a module of this package imports Triton."""

try:
    import triton
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the kernels need triton 3.6 or newer, which torch 2.11 and newer bring on Linux with CUDA; "
        "path='reference' needs no kernels"
    ) from error

MIN_TRITON = (3, 6)

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
    raise ImportError(
        f"triton is {triton.__version__}; the kernels need {'.'.join(map(str, MIN_TRITON))} or newer, which torch 2.11 "
        "and newer bring. path='reference' needs no kernels"
    )
