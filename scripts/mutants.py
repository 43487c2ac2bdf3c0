"""Try the mutants that mutmut makes of the package in the working directory.

Each runs in a fork of one process, which has collected the tests: those that reach the changed function, first the ones
that caught another of its mutants, then its module's own, and of all the quickest, a test's later variants as if they
took as often its time. What was found is kept in mutants/, and not tried again.
"""

import argparse
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from mutation_score import is_equivalent
from mutmut.__main__ import collect_source_file_mutation_data, create_mutants
from mutmut.configuration import config
from mutmut.mutation.diff_apply import find_mutant, get_diff_for_mutant
from mutmut.state import state
from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir
from mutmut.utils.format_utils import mangled_name_from_mutant_name

RESULTS = "results.jsonl"
MAX_BYTES = 32 << 30
MAX_SLOWDOWN = 10
MIN_TIMEOUT_S = 20


class Trials:
    """Pytest's loop, which tries mutants instead of running every test once."""

    def __init__(self, folder: Path, mutants: list[str], budget: float) -> None:
        """Try mutants with tests that take no longer than a budget in seconds together, the first excepted."""
        self._folder = folder
        self._mutants = mutants
        self._budget = budget
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notice a failure."""
        self._failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try all mutants."""
        session.config.pluginmanager.unregister(name="terminalreporter")
        # The first failure of a test imports it: once, instead of in every fork.
        importlib.import_module("torch._inductor.standalone_compile")
        items = {item.nodeid: item for item in session.items}
        tests = {test["test"]: test for test in self._measured(session.items) if test["passed"]}
        reaching: dict[str, list[str]] = {}
        variants: Counter[str] = Counter()
        cost = {}
        for name in sorted(tests.keys() & items.keys(), key=lambda name: tests[name]["seconds"]):
            for function in tests[name]["functions"]:
                reaching.setdefault(function, []).append(name)
            variants[name.partition("[")[0]] += 1
            cost[name] = tests[name]["seconds"] * variants[name.partition("[")[0]]
        catching: dict[str, set[str | None]] = {}
        for result in read_lines(self._folder / RESULTS):
            catching.setdefault(mangled_name_from_mutant_name(result["mutant"]), set()).add(result["caught_by"])
        for number, mutant in enumerate(self._mutants, 1):
            function = mangled_name_from_mutant_name(mutant)
            caught = catching.setdefault(function, set())
            own_file = f"test_{function.rsplit('.', 2)[1]}.py"
            chosen: list[str] = []
            seconds = 0.0
            for name in sorted(
                reaching.get(function, []), key=lambda name: (name not in caught, own_file not in name, cost[name])
            ):
                seconds += tests[name]["seconds"]
                if chosen and seconds > self._budget:
                    break
                chosen.append(name)
            timeouts = [round(MIN_TIMEOUT_S + MAX_SLOWDOWN * tests[name]["seconds"]) for name in chosen]
            by = self._try(mutant, [items[name] for name in chosen], timeouts)
            caught.add(by)
            add_line(self._folder / RESULTS, {"mutant": mutant, "caught_by": by, "tests": len(chosen)})
            print(f"{number}/{len(self._mutants)} {mutant}: {by or 'SURVIVED'}", flush=True)
        return True

    def _measured(self, items: list[pytest.Item]) -> list[dict[str, Any]]:
        """Of every test without a mutant: its seconds, whether it passed, and the functions that it reached."""
        path = self._folder / "reached.jsonl"
        known = {line["test"] for line in read_lines(path)}
        new = [item for item in items if item.nodeid not in known]

        def measure() -> None:
            for item, following in with_next(new):
                state()._stats.clear()
                os.environ["MUTANT_UNDER_TEST"] = "stats"
                seconds, passed = self._run(item, following)
                functions = sorted(state()._stats)
                if not passed:
                    # What is compiled cannot be watched.
                    os.environ["MUTANT_UNDER_TEST"] = ""
                    seconds, passed = self._run(item, following)
                add_line(path, {"test": item.nodeid, "seconds": seconds, "passed": passed, "functions": functions})

        if not run_forked(measure):
            raise RuntimeError("the tests without a mutant did not come to their end")
        return read_lines(path)

    def _try(self, mutant: str, items: list[pytest.Item], timeouts: list[int]) -> str | None:
        """Which test caught a mutant, by a failure, a crash or endless work; None if none did."""
        begun = mmap(-1, 8)

        def attempt() -> None:
            os.environ["MUTANT_UNDER_TEST"] = mutant
            for i, (item, following) in enumerate(with_next(items)):
                begun[:] = i.to_bytes(8)
                signal.alarm(timeouts[i])
                if not self._run(item, following)[1]:
                    os._exit(1)

        return None if run_forked(attempt) else items[int.from_bytes(begun[:])].nodeid

    def _run(self, item: pytest.Item, following: pytest.Item | None) -> tuple[float, bool]:
        """Run a test: its seconds, and whether it passed."""
        self._failed = False
        start = time.monotonic()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return round(time.monotonic() - start, 3), not self._failed


def with_next(items: list[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    """Every test with the one after it."""
    return zip(items, [*items[1:], None], strict=False)


def run_forked(work: Callable[[], None]) -> bool:
    """Do work in a fork with bounded memory, and say whether it came to its end."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status == 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, if there is one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Add a JSON object to a file of lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def check_paths() -> None:
    """Exit where the configuration names sources or tests that are not there."""
    for path in [*config().only_mutate, *config().pytest_add_cli_args_test_selection]:
        if not any(Path().glob(path.partition("::")[0])):
            sys.exit(f"[tool.mutmut] of {Path('pyproject.toml').resolve()} names {path}, and there is no such file")


def draw(names: list[str], seed: int, sample: int | None) -> list[str]:
    """As many mutants as were asked for, in an order that a seed gives; others that come or go leave it as it is."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:sample]


def make_mutants() -> list[str]:
    """Write the changed sources to mutants/, and give the mutants' names."""
    os.environ["MUTANT_UNDER_TEST"] = "mutant_generation"
    Path("mutants").mkdir(exist_ok=True)
    copy_src_dir()
    copy_also_copy_files()
    create_mutants(os.cpu_count() or 1)
    return [name for _, name, _ in collect_source_file_mutation_data(mutant_names=())[0]]


def change(mutant: str) -> str:
    """What a mutant changes, as a diff without its head."""
    lines = get_diff_for_mutant(mutant, path=find_mutant(mutant).path).splitlines()
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def main() -> None:
    """Make the mutants, and try those that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="try so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--survivors", action="store_true", help="try those again that nobody noticed, but equivalent ones"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds of tests for one mutant")
    arguments = parser.parse_args()
    check_paths()
    names = make_mutants()
    folder = Path("mutants").resolve()
    drawn = draw(names, arguments.seed, arguments.sample)
    found = {line["mutant"]: line["caught_by"] for line in read_lines(folder / RESULTS)}
    if arguments.survivors:
        survivors = (name for name in drawn if name in found and found[name] is None)
        mutants = [name for name in survivors if not is_equivalent(change(name))]
    else:
        mutants = [name for name in drawn if name not in found]
    print(f"{len(names)} mutants, {len(mutants)} to try")
    os.environ["MUTANT_UNDER_TEST"] = ""
    sources = str(folder / "src")
    os.environ["PYTHONPATH"] = os.pathsep.join([sources, os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, sources)
    hypothesis.settings.register_profile(
        "mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate], database=None, derandomize=True
    )
    hypothesis.settings.load_profile("mutants")
    os.chdir(folder)
    options = ["--rootdir=.", "--tb=no", "-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}"]
    options += [*config().pytest_add_cli_args_test_selection, *config().pytest_add_cli_args]
    status = pytest.main(options, plugins=[Trials(folder, mutants, arguments.budget)])
    os.chdir(folder.parent)
    found = {line["mutant"]: line["caught_by"] for line in read_lines(folder / RESULTS)}
    tried = sorted(name for name in drawn if name in found)
    survived = {name: change(name) for name in tried if found[name] is None}
    given = [argument for argument in sys.argv[1:] if argument != "--survivors"]
    summary = {"arguments": given, "mutants": len(names), "tried": len(tried), "survived": survived}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    sys.exit(status)


if __name__ == "__main__":
    main()
