"""Files that are written whole, so that a reader finds the old one or the new one, and that name their format."""

import os
from collections.abc import Mapping
from pathlib import Path


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file; one that is there is replaced once the new one is complete."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_format(header: Mapping[str, object], name: str, version: object) -> None:
    """Refuse a file of another format.

    Args:
        header: What the file says of itself, its "format" and "format_version" among it.
        name: The format that is read.
        version: The version of it that is read.

    Raises:
        ValueError: If the header names others, or none.
    """
    if header.get("format") != name:
        raise ValueError(f"its format is {header.get('format')!r}, not {name!r}")
    if header.get("format_version") != version:
        raise ValueError(
            f"its format version is {header.get('format_version')}, and this version of turboquant-core reads {version}"
        )
