"""Writes the golden vectors beside this file: `python make_golden.py`.

The format is implemented here once more, in float64 and one vector at a time, from the package's
documentation; of the package only the rotation, the codebook and the seeded draws are used. Inputs
are multiples of 1/32 that every floating-point type holds, and such that no decision of the encoder
is close: arithmetic of float32 on any device and version has to find the same bytes.
"""

import json
import math
from pathlib import Path

import numpy as np

from turboquant_core import Rotation, grid_codebook
from turboquant_core._seeded import random_normal

NUM_VECTORS = 2
DECODED_STEP = 5

# Distance of every decision from its threshold: of coordinates in standard deviations, of scales in
# the float16 spacing.
COORDINATE_MARGIN = 1e-4
SCALE_MARGIN = 0.02

MSE = [("mse", bits, "norm") for bits in (1, 2, 3, 4, 5, 6, 8)]
CORRECTED = [("mse", 3, "unbiased"), ("mse", 3, "least_squares")]
PROD = [("prod", bits, "norm") for bits in (1, 2, 4)]
OUTLIER = [("outlier", 2.5, "norm"), ("outlier", 3.5, "norm")]
SPLIT = [("split", bits, "unbiased") for bits in (2, 3, 4)]
FILES = {
    "d64": (64, MSE + CORRECTED + PROD + OUTLIER),
    "d80": (80, MSE + CORRECTED + PROD),
    "d128": (128, MSE + CORRECTED + PROD + OUTLIER),
    "d256": (256, MSE + OUTLIER),
    "d64_split": (64, SPLIT),
    "d128_split": (128, SPLIT),
}


class TooCloseError(Exception):
    """A decision of the encoder that rounding could turn."""


def store_scale(scale):
    root = math.sqrt(scale)
    spacing = float(np.spacing(np.float16(root)))
    if abs(root / spacing % 1 - 0.5) < SCALE_MARGIN:
        raise TooCloseError
    return np.float16(root)


def pack(codes, bits):
    packed, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            fields = (codes >> shift & (2**width - 1)).reshape(8 // width, -1)
            packed.append(sum(field << i * width for i, field in enumerate(fields)))
            shift += width
    return np.concatenate(packed).astype(np.uint8)


def nearest(y, codebook):
    """Codes of the centroids nearest to y, and the centroids."""
    level = np.abs(np.abs(y)[:, None] - codebook.unit * np.array(codebook.levels)).argmin(1)
    decoded = np.where(y < 0, -1, 1) * codebook.unit * np.array(codebook.levels)[level]
    if codebook.bits <= 4:
        return level + np.where(y < 0, 2 ** (codebook.bits - 1), 0), decoded
    return np.where(y < 0, -1 - level, level) % 2**codebook.bits, decoded


def encode_mse(x, bits, rule):
    """Codes, packed bytes, stored scales and x̂."""
    head_dim, norm = len(x), np.linalg.norm(x)
    codebook, rotation = grid_codebook(head_dim, bits), Rotation(head_dim).matrix.numpy()
    y = rotation @ (x / norm)
    distance = np.abs(y[:, None] - codebook.boundaries.numpy()).min()
    if distance * math.sqrt(head_dim) < COORDINATE_MARGIN:
        raise TooCloseError
    codes, decoded = nearest(y, codebook)
    scale = {
        "norm": norm,
        "unbiased": norm / (decoded @ y),
        "least_squares": norm * (decoded @ y) / (decoded @ decoded),
    }[rule]
    stored = store_scale(scale)
    return codes, pack(codes, bits), [stored], float(stored) ** 2 * (rotation.T @ decoded)


def encode_prod(x, bits, rule):
    head_dim, norm = len(x), np.linalg.norm(x)
    codes, packed, coarse = np.zeros(0, int), np.zeros(0, np.uint8), np.zeros(head_dim)
    if bits > 1:
        codes, packed, _, coarse = encode_mse(x / norm, bits - 1, rule)
    residual = x / norm - coarse
    length = np.linalg.norm(residual)
    matrix = random_normal(f"sketch/{head_dim}/0", (head_dim, head_dim))
    sketch = matrix @ residual
    if np.abs(sketch).min() < COORDINATE_MARGIN * length:
        raise TooCloseError
    signs = (sketch > 0).astype(int)
    scales = [store_scale(norm), store_scale(norm * length)]
    gain = math.sqrt(math.pi / 2) / head_dim * float(scales[1]) ** 2
    decoded = float(scales[0]) ** 2 * coarse + gain * (matrix.T @ (2 * signs - 1))
    return codes, np.concatenate([packed, pack(signs, 1)]), scales, decoded


def encode_outlier(x, bits, rule, channel_order):
    outliers, others = np.split(np.asarray(channel_order), [len(x) // 4])
    high, low = {2.5: (4, 2), 3.5: (5, 3)}[bits]
    first, second = encode_mse(x[outliers], high, rule), encode_mse(x[others], low, rule)
    codes, packed = (np.concatenate(pair) for pair in zip(first[:2], second[:2], strict=True))
    decoded = np.empty_like(x)
    decoded[outliers], decoded[others] = first[3], second[3]
    return codes, packed, first[2] + second[2], decoded


def encode_split(x, bits, rule):
    halves = zip(np.split(x, 2), (bits + 1, bits - 1), strict=True)
    first, second = (encode_mse(half, width, rule) for half, width in halves)
    # One code for a channel of either half.
    codes = first[0] + (second[0] << bits + 1)
    return codes, pack(codes, 2 * bits), first[2] + second[2], np.concatenate([first[3], second[3]])


def encode(x, case, channel_order):
    quantizer, bits, rule = case
    if quantizer == "outlier":
        return encode_outlier(x, bits, rule, channel_order)
    return {"mse": encode_mse, "prod": encode_prod, "split": encode_split}[quantizer](x, bits, rule)


def draw(random, head_dim, outlier_channels):
    x = random.standard_normal(head_dim)
    x[outlier_channels] *= 2.5
    return np.clip(np.round(32 * x), -255, 255) / 32


def make(head_dim, cases):
    random = np.random.default_rng(head_dim)
    # Split vectors come in their order.
    channel_order = list(range(head_dim)) if cases is SPLIT else random.permutation(head_dim).tolist()
    vectors, encoded = [], []
    while len(vectors) < NUM_VECTORS:
        x = draw(random, head_dim, channel_order[: head_dim // 4])
        try:
            encoded.append([encode(x, case, channel_order) for case in cases])
        except TooCloseError:
            continue
        vectors.append(x)
    described = []
    for (quantizer, bits, rule), *results in zip(cases, *encoded, strict=True):
        described.append(
            {
                "quantizer": quantizer,
                "bits": bits,
                "scale": rule,
                "codes": [codes.tolist() for codes, _, _, _ in results],
                "packed": [packed.tobytes().hex() for _, packed, _, _ in results],
                "scales": [[f"{scale.view(np.uint16):04x}" for scale in scales] for _, _, scales, _ in results],
                "decoded": [
                    [round(value, 7) for value in decoded[::DECODED_STEP].tolist()] for _, _, _, decoded in results
                ],
            }
        )
    return {
        "head_dim": head_dim,
        "decoded_step": DECODED_STEP,
        "channel_order": channel_order,
        "vectors": [x.tolist() for x in vectors],
        "cases": described,
    }


def main():
    for name, (head_dim, cases) in FILES.items():
        golden = make(head_dim, cases)
        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in golden.pop("cases"))
        header = json.dumps(golden, separators=(",", ":"))[:-1]
        path = Path(__file__).with_name(f"{name}.json")
        path.write_text(f'{header},\n"cases":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
