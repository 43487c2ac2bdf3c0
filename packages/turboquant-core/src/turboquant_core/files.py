"""Files that are written whole, so that a reader finds the old one or the new one, and that name their format."""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file in the same folder, which takes the place of `path` when it is complete.

    If it is not, for an error or Ctrl-C, it is removed, and what is at `path` stays. A file keeps its mode, and a link
    its target's place. What is no file, such as a pipe or /dev/stdout, is written to as it is.

    Args:
        path: The file to write.

    Yields:
        The path to write to.

    Raises:
        OSError: If a file cannot be written there, or not to its end, with the path and the reason in its message.
    """
    path = Path(path)
    # What a link points to is replaced, not the link.
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            if target.is_dir():
                raise IsADirectoryError("it is a folder")
            yield path
            return
        if target.is_file() and not os.access(target, os.W_OK):
            raise PermissionError("the file is read-only")
        # Not named after the target, whose name may be as long as names can be.
        unfinished = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            yield unfinished
            if target.is_file():
                shutil.copymode(target, unfinished)
            _flush_to_disk(unfinished)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}. Nothing there was changed.") from error


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file, text as UTF-8; one that is there is replaced once the new one is complete. See `replacing`.

    Raises:
        OSError: As there.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


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


def _flush_to_disk(path: Path) -> None:
    """Wait until a file is on the disk, or it may be empty after a power failure although it was renamed."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
