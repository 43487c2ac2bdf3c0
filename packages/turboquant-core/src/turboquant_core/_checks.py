"""What the codec covers, and the errors for what it does not."""

from numbers import Integral, Real
from typing import TypeGuard

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 512
MIN_BITS, MAX_BITS = 1, 8


def check_head_dim(head_dim: int, name: str = "head_dim") -> int:
    """Return `head_dim`, called `name` in errors, when the codec covers it.

    Raises:
        ValueError: If it is not a multiple of 8 from 8 to 512.
    """
    if not is_int(head_dim) or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
        raise ValueError(
            f"{name} is {head_dim}; it must be a multiple of 8 from {MIN_HEAD_DIM} to "
            f"{MAX_HEAD_DIM}. Leave layers of another size uncompressed."
        )
    return head_dim


def check_bits(bits: float) -> int:
    """Return `bits` when codes of that width exist.

    Raises:
        ValueError: If it is no int from 1 to 8.
    """
    if not is_int(bits) or bits not in range(MIN_BITS, MAX_BITS + 1):
        raise ValueError(f"bits is {bits}; codes have {MIN_BITS} to {MAX_BITS} whole bits")
    return int(bits)


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number by its type; True and False do not count as such."""
    # Operations ask at every call, and an abstract class answers slowly.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_int(name: str, value: object, least: int, most: int | None = None, remedy: str = "") -> int:
    """Return `value` when it is an int from `least` to `most`.

    Raises:
        ValueError: If it is not; 2.0 and True do not count as ints.
    """
    if is_int(value) and value >= least and (most is None or value <= most):
        return int(value)
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name} is {value!r}; it must be an int {limits}. {remedy}".rstrip())


def check_number(name: str, value: object, least: float, most: float, remedy: str = "") -> float:
    """Return `value` when it is a number from `least` to `most`.

    Raises:
        ValueError: If it is not; NaN and True do not count as numbers.
    """
    if isinstance(value, float | Real) and not isinstance(value, bool) and least <= float(value) <= most:
        return float(value)
    raise ValueError(f"{name} is {value!r}; it must be a number from {least:g} to {most:g}. {remedy}".rstrip())


def check_bool(name: str, value: object) -> None:
    """Raise ValueError unless a value is True or False; a string such as "no" would count as True."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be True or False")
