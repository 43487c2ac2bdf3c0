"""Sum up what scripts/mutants.py found in the packages into benchmarks/results/mutants.json, and print the score."""

import json
import re
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.json"
LEAST_SCORE = 0.95


@cache
def equivalent() -> list[dict[str, str]]:
    """Changes, or patterns of them, with the reason why no test can notice them."""
    entries: list[dict[str, str]] = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    return entries


def is_equivalent(change: str) -> bool:
    """Whether a change is listed, or a pattern that is the whole of it."""
    return any(
        change == entry["change"] if "change" in entry else re.fullmatch(entry["pattern"], change)
        for entry in equivalent()
    )


def summary(package: Path) -> dict[str, Any]:
    """What was found in a package. Mutants whose change is listed as equivalent do not count."""
    found = json.loads((package / "mutants" / "summary.json").read_text(encoding="utf-8"))
    survived = {name: text for name, text in found["survived"].items() if not is_equivalent(text)}
    caught = found["tried"] - len(found["survived"])
    arguments = "".join(f" {argument}" for argument in found["arguments"] and ["--", *found["arguments"]])
    return {
        "command": f"nox -s 'mutants({package.name.removeprefix('turboquant-')})'{arguments}",
        "mutmut": version("mutmut"),
        "mutants": found["mutants"],
        "tried": found["tried"],
        "equivalent": len(found["survived"]) - len(survived),
        "caught": caught,
        "score": round(caught / max(1, caught + len(survived)), 4),
        "survived": survived,
    }


def main() -> None:
    """Replace the results of packages whose mutants were tried here, and hold all to the least score."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for path in sorted((ROOT / "packages").glob("*/mutants/summary.json")):
        package = path.parent.parent
        results[package.name] = summary(package)
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")
    for name, result in results.items():
        print(f"{name}: {result['caught']} of {result['caught'] + len(result['survived'])} mutants were caught")
    if low := [name for name, result in results.items() if result["score"] < LEAST_SCORE]:
        sys.exit(f"at least {100 * LEAST_SCORE:.0f} % are to be caught, and fewer were in {', '.join(low)}")


if __name__ == "__main__":
    main()
