"""Write the figures of README.md and docs/ from benchmarks/results/; with --check, name those that differ.

What stands between `<!-- figure: NAME -->` and `<!-- end -->` is what NAME in FIGURES gives: of the benchmark that
wrote the file, or of command_results.py for what a command wrote. A plot names the files that it was drawn from and
their checksums, so that one drawn from others is found too.
"""

import re
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import command_results  # noqa: E402

import bench_cache_update  # noqa: E402
import bench_decode_attention  # noqa: E402
import bench_hf_decode  # noqa: E402
import bench_raw_copies  # noqa: E402
import engine_tables  # noqa: E402
import eval_cache_options  # noqa: E402
import eval_calibration  # noqa: E402
import eval_centring  # noqa: E402
import eval_engine  # noqa: E402
import eval_left_out  # noqa: E402
import eval_left_padding  # noqa: E402
import eval_output_error  # noqa: E402
import side_by_side.table  # noqa: E402
from results_file import RESULTS  # noqa: E402

PLACE = re.compile(r"(<!-- figure: (\S+) -->)(.*?)(<!-- end -->)", re.DOTALL)
# Markdown takes a line that begins with a comment for HTML.
BEGINS_A_LINE = re.compile(r"^ *<!-- figure: (\S+) -->.", re.MULTILINE)
DRAWN_FROM = re.compile(r"<dc:source>(.*?)</dc:source>", re.DOTALL)

FIGURES: dict[str, Callable[[], str]] = {
    **bench_cache_update.FIGURES,
    **bench_decode_attention.FIGURES,
    **bench_hf_decode.FIGURES,
    **bench_raw_copies.FIGURES,
    **command_results.FIGURES,
    **engine_tables.FIGURES,
    **eval_cache_options.FIGURES,
    **eval_calibration.FIGURES,
    **eval_centring.FIGURES,
    **eval_engine.FIGURES,
    **eval_left_out.FIGURES,
    **eval_left_padding.FIGURES,
    **eval_output_error.FIGURES,
    **side_by_side.table.FIGURES,
}


def filled(text: str) -> str:
    """A page with the figures of now."""
    if misplaced := BEGINS_A_LINE.search(text):
        raise SystemExit(f"the figure {misplaced[1]} begins a line of text; put a word before it")
    return PLACE.sub(lambda match: f"{match[1]}{figure(match[2])}{match[4]}", text)


def figure(name: str) -> str:
    """What stands at a place: a number, or lines with an empty one before and after them."""
    if ":" in name:
        return side_by_side.table.of_cache(name)
    if name not in FIGURES:
        raise SystemExit(f"there is no figure {name}; there are {', '.join(FIGURES)}")
    text = FIGURES[name]()
    return f"\n\n{text}\n\n" if "\n" in text else text


def checksum(name: str) -> str:
    """What a plot carries of a file it was drawn from."""
    return f"{name} {sha256((RESULTS / name).read_bytes()).hexdigest()[:12]}"


def stale_plots() -> Iterator[Path]:
    """Plots that were drawn from other files than those that are there."""
    for plot in sorted((ROOT / "docs" / "assets").glob("*.svg")):
        source = DRAWN_FROM.search(plot.read_text(encoding="utf-8"))
        entries = [entry.strip() for entry in source[1].split(",")] if source else []
        if any(entry != checksum(entry.split()[0]) for entry in entries):
            yield plot


def main() -> None:
    """Write the figures, or check them."""
    is_check = sys.argv[1:] == ["--check"]
    stale = list(stale_plots())
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        now = filled(text)
        if now != text and is_check:
            stale.append(page)
        elif now != text:
            page.write_text(now, encoding="utf-8")
    if stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        raise SystemExit(f"not of benchmarks/results as it is: {names}. Run `nox -s figures`.")


if __name__ == "__main__":
    main()
