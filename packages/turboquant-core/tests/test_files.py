import errno
import os
import stat
from pathlib import Path

import pytest

from turboquant_core.files import replacing, write_atomically


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


def test_what_is_no_file_is_written_to():
    write_atomically(os.devnull, "new")
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_device_that_is_full():
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device"):
        write_atomically("/dev/full", "new")
