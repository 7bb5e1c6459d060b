"""Files that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from megarubric.errors import BadInput


def check_writable(path: Path) -> None:
    """Find out whether `whole_file(path)` will work, before hours of work whose result goes there.

    Makes the directory. Raises BadInput for a directory or a place where nothing can be written.
    """
    if path.is_dir():
        raise BadInput(path, None, "is a directory")
    if path.exists() and not path.is_file():
        return
    try:
        parent = Path(os.path.realpath(path)).parent
        if not parent.exists():
            parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise BadInput(path, None, f"cannot be written: {error.strerror}") from None


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Text file that appears at `path` only when the block ends without an error.

    A link is followed, and what is no file (a pipe, a device) is written to as it is: neither is replaced by a file.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as f:
            yield f
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):  # a name that nobody has heard of
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
