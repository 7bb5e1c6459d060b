"""`megarubric convert`: one conversion, with a bar and the time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from megarubric.errors import BadInput
from megarubric.megatron.convert import Options, Progress, convert, verify
from megarubric.megatron.dist_files import is_megatron

_LINE_S = 5.0  # between plain lines
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def run_convert(
    source: Path,
    target: Path,
    *,
    verified: bool = False,
    config: Path | None = None,
    processes: int = 0,
    max_shard_size: str | None = None,
    as_json: bool = False,
) -> int:
    """Convert, and with `verified` compare; a target that is there already is only compared. Exit status."""
    if processes < 0:
        raise BadInput("command line", "--processes", f"cannot be negative: {processes}")
    if not is_megatron(source) and (config or max_shard_size):
        option = "--config-from" if config else "--max-shard-size"
        raise BadInput("command line", option, "is for the way from Megatron to Hugging Face")
    options = Options(processes, config, None if max_shard_size is None else parse_size(max_shard_size))
    progress: Progress = Terminal() if sys.stderr.isatty() else Lines()
    result: dict[str, object] = {"source": str(source), "target": str(target)}
    if not (verified and target.exists()):
        began = time.monotonic()
        done = convert(source, target, options, progress)
        seconds = time.monotonic() - began
        result |= {"direction": done.direction, "tensors": done.tensors, "bytes": done.nbytes, "seconds": seconds}
        result["bytes_of_an_earlier_start"] = done.resumed
        if not as_json:
            earlier = f", {_size(done.resumed)} of them by an earlier start" if done.resumed else ""
            speed = f"{_size(round((done.nbytes - done.resumed) / max(seconds, 1e-9)))}/s"
            print(f"{done.direction}: {done.tensors} tensors, {_size(done.nbytes)}{earlier}, {seconds:.1f} s, {speed}")
    if verified:
        result["verified"] = verify(source, target, options, progress)
        if not as_json:
            print(f"verified: {result['verified']} tensors equal bit for bit, config and files as in the source")
    if as_json:
        print(json.dumps(result))
    return 0


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number. Raises BadInput."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or not float(match[1]) * _UNITS[match[2]] >= 1:
        raise BadInput("command line", "--max-shard-size", f"{text!r} is not a size such as 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


class Terminal:
    """A bar with speed and time left, on standard error or the console given."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Bar | None = None

    def start(self, what: str, total: int, done: int) -> None:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        # Drawn by `advance` alone: the conversion forks, and a thread that draws would be forked in the middle of it.
        self._bar = Bar(TextColumn("{task.description}"), *columns, console=self._console, auto_refresh=False)
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=done)

    def advance(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, refresh=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Lines:
    """A line every few seconds, on standard error."""

    def start(self, what: str, total: int, done: int) -> None:
        self._what, self._total, self._first = what, total, done
        self._began = self._said = time.monotonic()
        print(f"{what}: {_size(total)}" + (f", {_size(done)} done" if done else ""), file=sys.stderr, flush=True)

    def advance(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said < _LINE_S or done <= self._first:
            return
        self._said = now
        speed = (done - self._first) / (now - self._began)
        left = (self._total - done) / speed
        line = f"{self._what}: {_size(done)} of {_size(self._total)}, {_size(round(speed))}/s, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    def end(self) -> None: ...
