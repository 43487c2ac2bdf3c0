"""Check the wheels and sdists of all packages in a folder: complete, real files, right bounds."""

import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
CORE = "turboquant-core"


@dataclass(frozen=True)
class Package:
    """A package of this workspace, as its pyproject.toml declares it."""

    folder: Path
    name: str
    version: str
    dependencies: tuple[str, ...]

    @classmethod
    def read(cls, pyproject: Path) -> "Package":
        """The package that a pyproject.toml declares."""
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        dependencies = tuple(project["dependencies"])
        return cls(pyproject.parent, project["name"], project["version"], dependencies)

    @property
    def module(self) -> str:
        """The import package."""
        return self.name.replace("-", "_")

    @property
    def stem(self) -> str:
        """What the names of its archives and of their folders begin with."""
        return f"{self.module}-{self.version}"

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        return f"{self.stem}-py3-none-any.whl"

    @property
    def sdist(self) -> str:
        """The sdist's file name."""
        return f"{self.stem}.tar.gz"

    def source_files(self) -> set[str]:
        """The files of the import package, relative to src/."""
        source = self.folder / "src"
        files = (path for path in source.rglob("*") if path.is_file())
        return {path.relative_to(source).as_posix() for path in files if "__pycache__" not in path.parts}


def problems(dist: Path) -> Iterator[str]:
    """Everything that is wrong with the archives in a folder."""
    packages = [Package.read(path) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
    expected = {name for package in packages for name in (package.wheel, package.sdist)}
    found = {path.name for path in dist.iterdir() if path.suffix in {".whl", ".gz"}}
    yield from (f"{name} is missing" for name in sorted(expected - found))
    yield from (f"{name} is not of this version; remove it" for name in sorted(found - expected))
    for package in packages:
        if package.wheel in found:
            yield from wheel_problems(package, dist / package.wheel)
        if package.sdist in found:
            yield from sdist_problems(package, dist / package.sdist)


def wheel_problems(package: Package, path: Path) -> Iterator[str]:
    """Everything that is wrong with a package's wheel."""
    information = f"{package.stem}.dist-info"
    with zipfile.ZipFile(path) as wheel:
        contents = {name: wheel.read(name) for name in wheel.namelist()}
    modules = {name for name in contents if not name.startswith(f"{information}/")}
    source = package.source_files()
    yield from (f"{path.name} lacks {name}" for name in sorted(source - modules))
    yield from (f"{path.name} holds {name}" for name in sorted(modules - source))
    if f"{package.module}/py.typed" not in modules:
        yield f"{path.name} lacks py.typed; add it to src/{package.module}"
    if any(is_test(name) for name in contents):
        yield f"{path.name} holds tests; keep them out of src"
    if contents.get(f"{information}/licenses/LICENSE") != license_text():
        yield f"{path.name} lacks the text of LICENSE"
    metadata = message_from_bytes(contents[f"{information}/METADATA"])
    yield from (f"{path.name}: {problem}" for problem in metadata_problems(package, metadata))


def metadata_problems(package: Package, metadata: Message) -> Iterator[str]:
    """Everything that is wrong with a wheel's metadata."""
    declared = (package.name, package.version)
    built = (metadata["Name"], metadata["Version"])
    if built != declared:
        yield f"is {built}, pyproject.toml says {declared}"
    if package.name == CORE:
        return
    source_bound = core_bound(package.dependencies)
    if not source_bound:
        yield f"pyproject.toml puts no bound on {CORE}; write one such as {CORE}>=1.2,<1.3"
    wheel_bound = core_bound(metadata.get_all("Requires-Dist", []))
    if wheel_bound != source_bound:
        yield f"requires {CORE}{wheel_bound}, pyproject.toml says {CORE}{source_bound}"


def core_bound(dependencies: tuple[str, ...] | list[str]) -> SpecifierSet:
    """The versions of core that a list of dependencies allows; empty if it sets no bound."""
    requirements = map(Requirement, dependencies)
    return next((item.specifier for item in requirements if item.name == CORE), SpecifierSet())


def sdist_problems(package: Package, path: Path) -> Iterator[str]:
    """Everything that is wrong with a package's sdist."""
    with tarfile.open(path) as sdist:
        members = {member.name: member for member in sdist.getmembers()}
        links = sorted(name for name, member in members.items() if not member.isfile())
        yield from (f"{path.name}: {name} is not a regular file" for name in links)
        yield from (
            f"{path.name} lacks src/{name}"
            for name in sorted(package.source_files())
            if f"{package.stem}/src/{name}" not in members
        )
        member = members.get(f"{package.stem}/LICENSE")
        text = sdist.extractfile(member) if member and member.isfile() else None
        if text is None or text.read() != license_text():
            yield f"{path.name} lacks the text of LICENSE"


def is_test(name: str) -> bool:
    """Whether a wheel's member belongs to a test suite."""
    path = Path(name)
    return "tests" in path.parts or path.name.startswith(("test_", "conftest"))


def license_text() -> bytes:
    """The license of this repository."""
    return (ROOT / "LICENSE").read_bytes()


def main() -> None:
    """Check the folder given as the only argument."""
    if len(sys.argv) != 2:
        sys.exit("usage: check_wheels.py FOLDER")
    if found := list(problems(Path(sys.argv[1]))):
        sys.exit("\n".join(f"error: {problem}" for problem in found))
    print("wheels and sdists are complete")


if __name__ == "__main__":
    main()
