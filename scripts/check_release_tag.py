"""Check that a release tag names a package and its version: turboquant-core-v1.2.3."""

import re
import sys
import tomllib
from pathlib import Path

PACKAGES = Path(__file__).resolve().parent.parent / "packages"
TAG = re.compile(r"(?P<package>[a-z][a-z-]*)-v(?P<version>\d+\.\d+\.\d+\S*)")


def released_package(tag: str, packages: Path = PACKAGES) -> str:
    """The package that a tag releases.

    Raises:
        ValueError: If the tag names no package of this repository, or not its version.
    """
    match = TAG.fullmatch(tag)
    if match is None:
        raise ValueError(
            f"tag {tag!r} is not of the form <package>-v<major>.<minor>.<patch>; tag for example turboquant-core-v1.2.3"
        )
    package, version = match["package"], match["version"]
    known = sorted(path.parent.name for path in packages.glob("*/pyproject.toml"))
    if package not in known:
        raise ValueError(f"tag {tag!r} names {package!r}; tag one of {', '.join(known)}")
    declared = declared_version(packages / package / "pyproject.toml")
    if version != declared:
        raise ValueError(
            f"tag {tag!r} says version {version}, packages/{package}/pyproject.toml says "
            f"{declared}; set the version there first, or tag {package}-v{declared}"
        )
    return package


def declared_version(pyproject: Path) -> str:
    """The static version in a pyproject.toml."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    if "version" not in project:
        raise ValueError(f"{pyproject} has no static project.version; write one")
    return str(project["version"])


def main() -> None:
    """Print the package that the tag given as the only argument releases."""
    if len(sys.argv) != 2:
        sys.exit("usage: check_release_tag.py TAG")
    try:
        print(released_package(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
