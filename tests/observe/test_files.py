"""Files are whole or absent; links and devices stay what they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from megarubric.errors import BadInput
from megarubric.observe.files import check_writable, whole_file


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    with pytest.raises(RuntimeError), whole_file(out) as f:
        f.write("half")
        raise RuntimeError
    assert out.read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("new", "newer"):
        with whole_file(link) as f:
            f.write(text)
        assert link.is_symlink() and target.read_text() == text


def test_a_pipe_is_written_to_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    with whole_file(pipe) as f:
        f.write("through")
    reader.join(10)
    assert read == ["through"] and pipe.is_fifo()


def test_what_cannot_be_written_is_known_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "out")
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    for path, why in ((tmp_path, "is a directory"), (tmp_path / "file" / "out", "cannot be written: Not a directory")):
        with pytest.raises(BadInput) as caught:
            check_writable(path)
        assert str(caught.value) == f"{path}: {why}"


def test_an_error_names_the_file_that_was_asked_for() -> None:
    with pytest.raises(OSError) as caught, whole_file(Path("/proc/no-such-place")) as f:
        f.write("x")
    assert caught.value.filename == "/proc/no-such-place"
