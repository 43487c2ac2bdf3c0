import hashlib
from statistics import NormalDist

import numpy as np

from turboquant_core._seeded import random_normal, random_signs


def shake_bytes(label: str, count: int) -> bytes:
    return hashlib.shake_256(b"turboquant/1/" + label.encode()).digest(count)


def test_signs_are_the_bits_of_the_stream():
    stream = int.from_bytes(shake_bytes("a label", 3), "little")
    expected = [-1.0 if stream >> i & 1 else 1.0 for i in range(19)]
    assert random_signs("a label", 19).tolist() == expected


def test_normals_invert_the_distribution_function_at_the_words_of_the_stream():
    stream = shake_bytes("a label", 8 * 600)
    words = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(600)]
    expected = [NormalDist().inv_cdf(((word >> 11) + 0.5) / 2**53) for word in words]
    drawn = random_normal("a label", (20, 30))
    assert drawn.shape == (20, 30)
    np.testing.assert_allclose(drawn.ravel(), expected, rtol=1e-9)


def test_labels_give_unrelated_draws():
    first, second = random_normal("first", (4000,)), random_normal("second", (4000,))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert abs(first.mean()) < 0.06
    assert abs(first.std() - 1) < 0.05
