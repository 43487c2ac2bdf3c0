"""Whether tensors share memory."""

import torch


def check_no_overlap(name: str, x: torch.Tensor) -> None:
    """Raise ValueError if a row of x [n, m, size], whose last stride is 1, shares memory with another."""
    starts = _row_starts(x).sort().values
    if (starts.diff() < x.shape[-1]).any():
        raise ValueError(
            f"{name} has strides {list(x.stride())} for {list(x.shape)}: some of its memory is written more than once. "
            "Give a tensor whose elements lie apart, or None."
        )


def extent(x: torch.Tensor) -> int:
    """Bytes from the first element of x to the end of its last."""
    if not x.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether a row of x shares memory with one of y, both [n, m, size] of one type with a last stride of 1."""
    size, width = x.shape[-1], x.element_size()
    starts = _row_starts(x).sort().values
    others = _row_starts(y) + (y.data_ptr() - x.data_ptr()) // width
    # Rows of x that start after a row of y could reach, less those that start too early to reach it.
    reaching = torch.searchsorted(starts, others + size) - torch.searchsorted(starts, others - size, right=True)
    return bool((reaching > 0).any())


def _row_starts(x: torch.Tensor) -> torch.Tensor:
    """Where every row of x [n, m, size] starts, in elements from its first."""
    first, second, _ = x.stride()
    rows, columns = (torch.arange(size, device="cpu") for size in x.shape[:2])
    return (rows[:, None] * first + columns * second).flatten()
