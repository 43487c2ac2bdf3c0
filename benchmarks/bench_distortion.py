"""Mean square error of the codec on easy and hard inputs, beside the codebooks' and the bounds; makes the plot."""

import argparse
import math
from pathlib import Path

import matplotlib as mpl

from results_file import write_result
from turboquant_core import MSEQuantizer, grid_codebook
from turboquant_core.testing import INPUT_KINDS
from turboquant_core.testing.lloyd_max import lloyd_max_mse

HEAD_DIMS = (64, 80, 96, 128, 256)
BITS = (1, 2, 3, 4, 5, 6, 8)
PLOT = Path(__file__).parent.parent / "docs" / "assets" / "distortion.svg"


def measure(kind: str, head_dim: int, bits: int, num_rotations: int, num_vectors: int) -> float:
    """Mean of ‖x - x̂‖² / ‖x‖² over inputs and rotations."""
    total = 0.0
    for seed in range(num_rotations):
        x = INPUT_KINDS[kind](num_vectors, head_dim, 1000 + seed)
        quantizer = MSEQuantizer(head_dim, bits, seed=seed)
        error = x - quantizer.dequantize(quantizer.quantize(x))
        total += float((error.square().sum(-1) / x.square().sum(-1)).mean())
    return total / num_rotations


def upper_bound(bits: int) -> float:
    """The paper's Theorem 1."""
    return math.sqrt(3) * math.pi / 2 * 4.0**-bits


def plot(rows: list[dict[str, float | int | str]], head_dim: int) -> None:
    """Draw error against bits at one head_dim, relative to 4^-bits, which is the lower bound."""
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "turboquant"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(BITS, [upper_bound(b) * 4.0**b for b in BITS], "k--", label="upper bound (Theorem 1)")
    axes.plot(
        BITS,
        [lloyd_max_mse(head_dim, b) * 4.0**b for b in BITS],
        color="0.5",
        label="Lloyd-Max",
    )
    for kind, marker in zip(INPUT_KINDS, "osD^v", strict=True):
        values = [
            float(row["mse"]) * 4.0 ** int(row["bits"])
            for row in rows
            if (row["head_dim"], row["kind"]) == (head_dim, kind)
        ]
        axes.plot(BITS, values, marker, label=kind.replace("_", "-"), fillstyle="none")
    axes.axhline(1, color="k", linestyle=":", label="lower bound (Theorem 3)")
    axes.set(xlabel="bits per coordinate", ylabel="mean square error times 4^bits", ylim=(0, 6))
    axes.set_title(f"Measured error of unit vectors, head_dim {head_dim}")
    axes.legend(ncols=2, fontsize="small", loc="lower right")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    """Measure, write results/distortion.json and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-rotations", type=int, default=32)
    parser.add_argument("--num-vectors", type=int, default=1000)
    arguments = parser.parse_args()
    rows: list[dict[str, float | int | str]] = []
    for head_dim in HEAD_DIMS:
        for bits in BITS:
            expected = grid_codebook(head_dim, bits).mse
            for kind in INPUT_KINDS:
                mse = measure(kind, head_dim, bits, arguments.num_rotations, arguments.num_vectors)
                ratio = mse / expected
                rows.append({"head_dim": head_dim, "bits": bits, "kind": kind, "mse": mse, "over_codebook": ratio})
            worst = max(float(row["over_codebook"]) for row in rows[-len(INPUT_KINDS) :])
            print(f"head_dim {head_dim:3d}  {bits} bits  codebook {expected:.6f}  worst input {worst:.3f}")
    path = write_result("distortion", {**vars(arguments), "rows": rows})
    plot(rows, head_dim=128)
    print(path)


if __name__ == "__main__":
    main()
