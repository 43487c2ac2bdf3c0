import errno
import os
import stat
from pathlib import Path

import pytest

from turboquant_core.files import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    open_safetensors,
    parse_json,
    read_json,
    reading,
    replacing,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("content", "written"), [(b"\x00\xff", b"\x00\xff"), ("naïve\n", "naïve\n".encode())])
def test_bytes_and_text_are_written(tmp_path, content, written):
    write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == written
    assert names(tmp_path) == ["file"]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as unfinished:
        unfinished.write_text("ne")
        assert path.read_text() == "old"
        assert unfinished.parent == tmp_path
    assert path.read_text() == "ne"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError("the disk is full")])
def test_what_fails_leaves_nothing_behind(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error if isinstance(error, type) else OSError), replacing(path) as unfinished:  # noqa: PT012
        unfinished.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_named_and_the_error_stays_of_its_kind(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*file: No space left on device\. Nothing there was changed"):  # noqa: SIM117
        with replacing(tmp_path / "file"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match=r"cannot write .*file: No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "file", "new")
    with pytest.raises(IsADirectoryError, match=r"cannot write .*: it is a folder"):
        write_atomically(tmp_path, "new")
    assert names(tmp_path) == []


def test_a_file_keeps_its_mode_and_a_new_one_has_that_of_any_other(tmp_path):
    (tmp_path / "other").write_text("")
    write_atomically(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    write_atomically(tmp_path / "new", "again")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everything")
def test_a_read_only_file_or_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o400)
    with pytest.raises(PermissionError, match=r"cannot write .*file: the file is read-only"):
        write_atomically(path, "new")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"cannot write .*another: Permission denied"):
        write_atomically(tmp_path / "another", "new")
    tmp_path.chmod(0o700)
    assert path.read_text() == "old"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_a_name_as_long_as_names_can_be(tmp_path):
    write_atomically(tmp_path / ("x" * 255), "new")
    assert names(tmp_path) == ["x" * 255]


@pytest.fixture
def pipe(tmp_path):
    """A pipe with a name, and what was written to it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    # Open for both, so that nobody waits for the other end.
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield path, lambda: os.read(end, 1 << 16)
    os.close(end)


def test_a_pipe_is_written_to_and_stays_one(pipe):
    path, read = pipe
    write_atomically(path, "new")
    assert read() == b"new"
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert names(path.parent) == ["pipe"]


def test_a_writer_that_puts_another_file_in_its_place_replaces_no_pipe(pipe):
    path, read = pipe
    other = path.with_name("other")
    link = path.with_name("link")
    link.symlink_to(path)
    for name in (path, link):
        with replacing(name) as unfinished:
            other.write_text("new")
            other.replace(unfinished)
        assert read() == b"new"
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert link.is_symlink()
    assert names(path.parent) == ["link", "pipe"]


def test_a_pipe_is_sent_nothing_that_is_not_complete(pipe):
    path, read = pipe
    with pytest.raises(ValueError, match="stop"), replacing(path) as unfinished:  # noqa: PT012
        unfinished.write_text("ne")
        raise ValueError("stop")
    with pytest.raises(BlockingIOError):
        read()


def test_an_open_file_without_a_name_is_written_to():
    reader, writer = os.pipe()
    try:
        write_atomically(f"/dev/fd/{writer}", "new")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_device_that_is_full():
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device"):
        write_atomically("/dev/full", "new")


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, null, true, "\\u00e9"]}', {"a": [1, 2.5, None, True, "é"]}),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775807", 1 - 2**63),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        (nested(2), [[]]),
    ],
)
def test_json_is_read(text, value):
    assert parse_json(text) == value
    assert parse_json(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON, or is truncated"),
        ('{"a": 1', "no JSON, or is truncated"),
        (b"\xff", "no JSON, or is truncated"),
        ("[NaN]", "NaN, which is not finite"),
        ("-Infinity", "-Infinity, which is not finite"),
        ("1e999", "1e999, which is not finite"),
        ("9223372036854775808", "more than 64 bits"),
        ("1" * 100_000, "more than 64 bits"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' twice"),
        (r'["\ud800"]', "no Unicode"),
        (r'{"\ud800": 1}', "no Unicode"),
        (nested(MAX_JSON_DEPTH + 2), "nested more than 64 deep"),
        (nested(200_000), "nested more than 64 deep"),
        ('{"a":' * 200_000, "nested more than 64 deep"),
        ("1" + " " * MAX_JSON_BYTES, "more than 16,777,216 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_is_refused(text, said):
    with pytest.raises(ValueError, match=said) as error:
        parse_json(text)
    assert len(str(error.value)) < 200


def test_json_as_deep_as_it_may_be():
    value = parse_json(nested(MAX_JSON_DEPTH))
    for _ in range(MAX_JSON_DEPTH - 1):
        (value,) = value
    assert value == []


def test_a_large_file_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than 16,777,216 bytes"):
        read_json(tmp_path / "file")


def test_what_is_refused_is_named(tmp_path):
    (tmp_path / "file").write_text("{")
    with pytest.raises(ValueError, match=r"file holds no bits that can be used: it is no JSON.*\. Write it again\."):  # noqa: SIM117
        with reading(tmp_path / "file", "bits", "Write it again."):
            read_json(tmp_path / "file")
    for missing in (tmp_path / "none", tmp_path, Path("/dev/zero")):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*, and so no bits\. Write it again\."):  # noqa: SIM117
            with reading(missing, "bits", "Write it again."):
                pass


@pytest.mark.parametrize("content", [b"", b"[" * 100, (2**63).to_bytes(8, "little") + b"{}", b"\0" * 100])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file, or is truncated"), open_safetensors(tmp_path / "file"):
        pass
