"""Damaged files, for tests of what reads them."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

AWKWARD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**400, -0.5, 2.0, 1e308, "", "two", "[/x]", "\ud800", "x" * 5000,
    [], [[]], {}, {"a": 1}, [None] * 70,
)  # fmt: skip
"""JSON values where others are expected; nested ones and numbers that are not finite are made by `damaged_json`."""

MAX_REFUSAL = 1000
_LENGTH_BYTES = 8


def damaged_bytes(content: bytes, random: Random) -> bytes:
    """A file that was cut off, or some of whose bytes changed, went missing or are too many."""
    at, length = random.randrange(len(content) + 1), random.randrange(1, 40)
    noise = random.randbytes(length)
    return random.choice(
        [
            content[:at],
            content[:at] + bytes(byte ^ 1 << random.randrange(8) for byte in content[at : at + 1]) + content[at + 1 :],
            content[:at] + noise + content[at + length :],
            content[:at] + noise + content[at:],
            content[:at] + content[at + length :],
            content + noise,
            noise,
            random.randbytes(_LENGTH_BYTES) + content[_LENGTH_BYTES:],
            (random.randrange(1 << 34)).to_bytes(_LENGTH_BYTES, "little") + content[_LENGTH_BYTES:],
        ]
    )


def damaged_json(data: Any, random: Random) -> str:
    """JSON in which one value became another, is missing, or was added; or that is no JSON in one place."""
    data = deepcopy(data)
    places = list(_places(data))
    holder, key = random.choice(places)
    marker = "the place of what json.dumps cannot write"
    change = random.randrange(5)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[str(random.choice(AWKWARD_VALUES))] = holder[key]
    elif change == 2:
        holder[key] = deepcopy(random.choice(places)[0])
    elif change == 3:
        holder[key] = marker
    else:
        holder[key] = random.choice(AWKWARD_VALUES)
    raw = random.choice(["NaN", "-Infinity", "1e999", "[" * 100 + "]" * 100, "[" * 100_000, '{"a":' * 100_000, "", '"'])
    return json.dumps(data).replace(json.dumps(marker), raw)


def read_or_refused(read: Callable[[Path], Any], path: Path, content: bytes, remedy: str) -> Any:
    """What a file with this content says; None when it is refused as it should be: by name, shortly, with a remedy.

    Args:
        read: Reads the file.
        path: The file, which is written.
        content: What is written.
        remedy: What a refusal says to do.

    Raises:
        AssertionError: If a refusal lacks anything.
        Exception: Whatever else `read` raises.
    """
    path.write_bytes(content)
    try:
        return read(path)
    except ValueError as error:
        said = str(error)
        assert str(path) in said, said
        assert remedy in said, said
        assert len(said) < MAX_REFUSAL, said
        return None


def with_header(content: bytes, header: str) -> bytes:
    """A safetensors file with another header before its tensors."""
    encoded = header.encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded + content[_body(content) :]


def header_of(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    header: dict[str, Any] = json.loads(content[_LENGTH_BYTES : _body(content)])
    return header


def _body(content: bytes) -> int:
    return _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")


def _places(data: Any) -> Any:
    """Every (holder, key) of a tree."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)
