"""Files are written whole, so that a reader finds the old one or the new one, and nothing in them is trusted."""

import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

MAX_JSON_BYTES = 1 << 24
MAX_JSON_DEPTH = 64
MAX_REASON = 500
_MAX_JSON_INTEGER = 2**63 - 1


@contextmanager
def replacing(path: str | os.PathLike[str], *, wait_for_disk: bool = True) -> Iterator[Path]:
    """A new file in the same folder, which takes the place of `path` when it is complete.

    If it is not, for an error or Ctrl-C, it is removed, and what is at `path` stays. A file keeps its mode, and a link
    its target's place. What is no file, such as a pipe or a device, is never replaced: it is sent what was written.

    Args:
        path: The file to write.
        wait_for_disk: Wait until it is on the disk, or it may be empty after a power failure.

    Yields:
        The path to write to.

    Raises:
        OSError: If a file cannot be written there, or not to its end, with the path and the reason in its message.
    """
    path = Path(path)
    # What a link points to is replaced, not the link.
    target = Path(os.path.realpath(path))
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        # /dev/stdout leads to what may have no name, or no longer this one.
        if path.exists() and not (target.is_file() and target.samefile(path)):
            with _sent_to(path) as unfinished:
                yield unfinished
            return
        if target.is_file() and not os.access(target, os.W_OK):
            raise PermissionError("the file is read-only")
        # Not named after the target, whose name may be as long as names can be.
        unfinished = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            yield unfinished
            if target.is_file():
                shutil.copymode(target, unfinished)
            if wait_for_disk:
                _flush_to_disk(unfinished)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}. Nothing there was changed.") from error


@contextmanager
def _sent_to(path: Path) -> Iterator[Path]:
    """A new file elsewhere, of which what is at `path` is sent a copy when it is complete.

    Whoever writes the file may put another in its place, as safetensors does, and never gets to see `path`.
    """
    with tempfile.TemporaryDirectory() as folder:
        unfinished = Path(folder) / "unfinished"
        yield unfinished
        # Neither made nor emptied, should it be another one by now.
        with unfinished.open("rb") as written, open(os.open(path, os.O_WRONLY), "wb") as sent_to:  # noqa: PTH123
            shutil.copyfileobj(written, sent_to)


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file, text as UTF-8; one that is there is replaced once the new one is complete. See `replacing`.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def reading(path: Path, content: str, remedy: str) -> Iterator[None]:
    """Name a file in all that is refused of it.

    Args:
        path: The file, which has to be there.
        content: What it is to hold, such as "calibration".
        remedy: What to do about a file that is missing or refused, a sentence.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For every ValueError in the block.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, and so no {content}. {remedy}")
    try:
        yield
    except ValueError as error:
        said = str(error)
        # What a message quotes of a file may be as long as the file.
        said = said if len(said) <= MAX_REASON else f"{said[:MAX_REASON]}..."
        raise ValueError(f"{path} holds no {content} that can be used: {said}. {remedy}") from error


def read_json(path: Path, *, strict: bool = True) -> Any:
    """What a JSON file says.

    Args:
        path: The file.
        strict: See `parse_json`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is refused.
    """
    with path.open("rb") as file:
        # Not all of a file that is too large.
        return parse_json(file.read(MAX_JSON_BYTES + 1), strict=strict)


def parse_json(data: bytes | str, max_bytes: int = MAX_JSON_BYTES, *, strict: bool = True) -> Any:
    """What JSON from elsewhere says.

    Args:
        data: JSON, in UTF-8.
        max_bytes: Bytes that it may have.
        strict: Refuse also numbers that are not finite and keys that are there twice, which Python reads.

    Raises:
        ValueError: If it is damaged, has integers of more than 64 bits or text that is no Unicode, or is larger or
            deeper than what anybody writes.
    """
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes of JSON")
    hooks: dict[str, Any] = {"parse_int": _integer}
    if strict:
        hooks |= {"parse_float": _finite, "parse_constant": _no_number, "object_pairs_hook": _object}
    try:
        parsed = json.loads(data.decode() if isinstance(data, bytes) else data, **hooks)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is no JSON, or is truncated: {error}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(parsed)
    _check_text(parsed)
    return parsed


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, as `safe_open` opens it on the CPU.

    No tensor of it has more bytes than the file: the library compares the header with the file's size.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is something else, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file, or is truncated: {error}") from None


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
    with path.open("rb") as file:
        os.fsync(file.fileno())


_TOO_DEEP = f"its JSON is nested more than {MAX_JSON_DEPTH} deep"


def _integer(text: str) -> int:
    # Python refuses to read thousands of digits, and few of more than 19 are of use to anyone.
    number = int(text) if len(text) <= len(str(-_MAX_JSON_INTEGER)) else None
    if number is None or abs(number) > _MAX_JSON_INTEGER:
        raise ValueError(f"it has the number {text[:24]}{'...' if len(text) > 24 else ''}, which has more than 64 bits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _no_number(text)
    return number


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it has the number {text[:24]}, which is not finite")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has the key {twice!r} twice in one object")
    return parsed


def _check_depth(parsed: Any) -> None:
    level = [parsed]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_text(parsed: Any) -> None:
    """Refuse halves of surrogate pairs, which no output can print."""
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"its text has {error.object[error.start : error.end]!r}, which is no Unicode") from None
