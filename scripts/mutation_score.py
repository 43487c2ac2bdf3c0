"""Write what `mutmut run` found in the packages to benchmarks/results/mutants.json, and print the score."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.json"
LEAST_SCORE = 0.95


def survivors(package: Path) -> list[str]:
    """The names of a package's mutants that no test noticed."""
    command = [sys.executable, "-m", "mutmut", "results"]
    printed = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout
    lines = [line.strip().rsplit(": ", 1) for line in printed.splitlines() if ": " in line]
    return sorted(name for name, status in lines if status in ("survived", "no tests"))


def change(package: Path, mutant: str) -> str:
    """What a mutant changes, as a diff without its head."""
    command = [sys.executable, "-m", "mutmut", "show", mutant]
    printed = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in printed.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def main() -> None:
    """Count the mutants of all packages; those whose change is listed as equivalent do not count."""
    equivalent = {entry["change"] for entry in json.loads(EQUIVALENT.read_text(encoding="utf-8"))}
    found, killed, total = {}, 0, 0
    for package in sorted((ROOT / "packages").iterdir()):
        stats = package / "mutants" / "mutmut-cicd-stats.json"
        if not stats.is_file():
            continue
        counted = json.loads(stats.read_text(encoding="utf-8"))
        changes = {name: change(package, name) for name in survivors(package)}
        alive = {name: text for name, text in changes.items() if text not in equivalent}
        total += counted["total"] - (len(changes) - len(alive))
        killed += counted["total"] - len(changes)
        found[package.name] = {"total": counted["total"], "equivalent": len(changes) - len(alive), "survived": alive}
    if not total:
        sys.exit("there are no results of mutmut; run nox -s mutants")
    score = killed / total
    result = {"command": "nox -s mutants", "mutmut": version("mutmut"), "score": round(score, 4), "packages": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{killed} of {total} mutants that are not equivalent were caught: {100 * score:.1f} %")
    if score < LEAST_SCORE:
        sys.exit(f"at least {100 * LEAST_SCORE:.0f} % are to be")


if __name__ == "__main__":
    main()
