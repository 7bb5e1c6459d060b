"""What a synthesis run was told so far, appended line by line, so that a run that was killed asks nothing twice.

One JSON object a line: a key (the hash of all that decides the reply), what it belongs to, the reply, and what had been
spent since the line before. A line that a kill cut short is the last one, and is taken off when the file is opened.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Any

import msgspec

from megarubric.errors import BadInput
from megarubric.rubrics.synthesis.costs import Spent

FORMAT = "megarubric synthesis journal 1"


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line: `value` is the reply in plain data; `spent` maps a model's identity to what it had cost since the line
    before, whatever prompt that was for."""

    key: str
    stage: str
    prompt: str
    value: dict[str, Any]
    spent: dict[str, Spent] = {}


class Journal:
    """The file, open and locked for this process; with `fresh`, emptied first.

    Raises:
        BadInput: another process has it; it is no journal; a line before the last cannot be read.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.spent_before: dict[str, Spent] = {}
        self.replayed = 0
        self._values: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BadInput(path, None, "another process is writing it") from None
            if fresh:
                self._file.truncate(0)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        whole = self._file.read()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            os.ftruncate(self._file.fileno(), len(kept))
        lines = kept.split(b"\n")[:-1]
        if not lines:
            self._file.write(msgspec.json.encode({"format": FORMAT}) + b"\n")
            self._file.flush()
            return
        try:
            first = msgspec.json.decode(lines[0])
        except msgspec.DecodeError:
            first = None
        if first != {"format": FORMAT}:
            raise BadInput(self.path, "line 1", f"this is no {FORMAT}")
        for number, line in enumerate(lines[1:], 2):
            try:
                entry = _decode(line)
            except (msgspec.MsgspecError, UnicodeError) as error:
                raise BadInput(self.path, f"line {number}", f"cannot be read: {error}") from None
            self._values[entry.key] = entry.value
            for model, spent in entry.spent.items():
                self.spent_before[model] = self.spent_before.get(model, Spent()) + spent

    def get(self, key: str) -> dict[str, Any] | None:
        """The value that was put under `key`, or None."""
        value = self._values.get(key)
        self.replayed += value is not None
        return value

    def put(self, entry: Entry) -> None:
        """Append a line. When this returns the kernel has it: a killed process loses nothing, a killed machine may."""
        self._values[entry.key] = entry.value
        self._file.write(_encode(entry) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode
