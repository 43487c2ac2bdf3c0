import os

import pytest

from turboquant_core.command_output import CommandError
from turboquant_hf.tools.inputs import MAX_TEXT_BYTES, read_text


def test_a_text_is_read_with_one_kind_of_line_ends(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("naïve\r\nverse\n".encode())
    assert read_text(path) == "naïve\nverse\n"


def test_a_text_as_large_as_it_may_be_and_one_larger(tmp_path):
    path = tmp_path / "text"
    with path.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES)
    assert len(read_text(path)) == MAX_TEXT_BYTES
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CommandError, match=r"cannot read .*text: it has more than 67,108,864 bytes\. Pass --text"):
        read_text(path)


def test_what_is_no_text_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff")
    for path, reason in (
        (tmp_path / "pipe", "it is no file"),
        (tmp_path, "it is no file"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "bytes", "can't decode byte 0xff"),
    ):
        with pytest.raises(CommandError, match=f"cannot read .*{reason}.* Pass --text with a UTF-8 text file"):
            read_text(path)
