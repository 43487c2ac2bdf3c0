"""Random draws that are the same on every machine, library version and language.

Library generators may change their streams between releases, and a test that seeds its inputs with the number that also
seeded a rotation measures the generating matrix against itself. The draws here come from SHAKE-256 over a label of our
own, so they are a specification rather than a seed, and no test data can coincide with them.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri


def _stream(label: str, num_bytes: int) -> npt.NDArray[np.uint8]:
    digest = hashlib.shake_256(f"turboquant/1/{label}".encode()).digest(num_bytes)
    return np.frombuffer(digest, dtype=np.uint8)


def random_signs(label: str, count: int) -> npt.NDArray[np.float64]:
    """`count` fair signs, ±1, as float64 [count]."""
    bits = np.unpackbits(_stream(label, -(-count // 8)), count=count, bitorder="little")
    return 1.0 - 2.0 * bits.astype(np.float64)


def random_normal(label: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Independent standard normal draws, float64, of the given shape."""
    words = _stream(label, 8 * int(np.prod(shape))).view("<u8")
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(ndtri(uniform), dtype=np.float64).reshape(shape)
