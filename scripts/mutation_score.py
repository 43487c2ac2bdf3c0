"""Sum up what scripts/mutants.py found in the packages into benchmarks/results/mutants.json, and print the score."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.json"
LEAST_SCORE = 0.95


def change(package: Path, mutant: str) -> str:
    """What a mutant changes, as a diff without its head."""
    command = [sys.executable, "-m", "mutmut", "show", mutant]
    printed = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in printed.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def summary(package: Path, equivalent: set[str]) -> dict[str, Any]:
    """What was found in a package. Mutants whose change is listed as equivalent do not count."""
    mutants = package / "mutants"
    total = sum(
        len(json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]) for meta in mutants.rglob("*.meta")
    )
    lines = map(json.loads, (mutants / "results.jsonl").read_text(encoding="utf-8").splitlines())
    found = {line["mutant"]: line["caught_by"] for line in lines}
    changes = {name: change(package, name) for name, test in sorted(found.items()) if test is None}
    survived = {name: text for name, text in changes.items() if text not in equivalent}
    caught = len(found) - len(changes)
    sample = "" if len(found) == total else f" -- --sample {len(found)}"
    return {
        "command": f"nox -s 'mutants({package.name.removeprefix('turboquant-')})'{sample}",
        "mutmut": version("mutmut"),
        "mutants": total,
        "tried": len(found),
        "equivalent": len(changes) - len(survived),
        "caught": caught,
        "score": round(caught / max(1, caught + len(survived)), 4),
        "survived": survived,
    }


def main() -> None:
    """Replace the results of packages whose mutants were tried here, and hold all to the least score."""
    equivalent = {entry["change"] for entry in json.loads(EQUIVALENT.read_text(encoding="utf-8"))}
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for path in sorted((ROOT / "packages").glob("*/mutants/results.jsonl")):
        package = path.parent.parent
        results[package.name] = summary(package, equivalent)
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")
    for name, result in results.items():
        print(f"{name}: {result['caught']} of {result['caught'] + len(result['survived'])} mutants were caught")
    if low := [name for name, result in results.items() if result["score"] < LEAST_SCORE]:
        sys.exit(f"at least {100 * LEAST_SCORE:.0f} % are to be caught, and fewer were in {', '.join(low)}")


if __name__ == "__main__":
    main()
