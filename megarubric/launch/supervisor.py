"""Starts the processes of a run, notices when one ends, and leaves none behind.

Every child leads its own session (Ctrl-C reaches only the controller), writes to its own log file, and dies with the
controller even when that is killed with -9: each child asks the kernel for it (`launch.process.die_with_parent`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megarubric.errors import BadInput, ProcessDied


class Child:
    """One started process and its log."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    @property
    def returncode(self) -> int | None:
        """None while it lives, else its exit status, or minus the signal that killed it."""
        return self.process.poll()

    def status(self) -> str | None:
        """None while it lives, else one line: who ended, how, its last words, and where its log is."""
        code = self.process.poll()
        if code is None:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        words = last_words(self.log)
        return f"{self.name} {how}{': ' + words if words else ''} (log: {self.log})"


def last_words(log: Path, limit: int = 300) -> str:
    """Last non-empty line of a log file, shortened to `limit` characters."""
    with contextlib.suppress(OSError), log.open("rb") as f:
        f.seek(0, os.SEEK_END)
        f.seek(max(0, f.tell() - 8192))
        lines = [line.strip() for line in f.read().decode("utf-8", "replace").splitlines()]
        spoken = [line for line in lines if line]
        if spoken:
            return spoken[-1][:limit]
    return ""


class Supervisor:
    """Context manager over the children of one run."""

    def __init__(self, log_dir: Path, processes: str = "processes.json") -> None:
        self.log_dir, self._processes = log_dir, processes
        self.children: list[Child] = []

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> Child:
        """Start `argv` with `env` on top of this process's environment; output goes to ``logs/NAME.log`` (appended).

        ``logs/processes.json`` (or the name given) maps names to process ids, for debuggers and profilers.
        """
        self.log_dir.mkdir(parents=True, exist_ok=True)
        log = self.log_dir / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )
        child = Child(name, process, log)
        self.children.append(child)
        pids = {child.name: child.process.pid for child in self.children}
        (self.log_dir / self._processes).write_text(json.dumps(pids, indent=1))
        return child

    def ended(self) -> str | None:
        """One line about the first child that ended, or None while all live."""
        return next((line for child in self.children if (line := child.status()) is not None), None)

    def all_ended(self) -> list[tuple[str, int, str]]:
        """Name, return code and line of every child that ended."""
        return [
            (child.name, child.returncode or 0, line) for child in self.children if (line := child.status()) is not None
        ]

    def check(self) -> None:
        """Raise ProcessDied when a child has ended."""
        if (line := self.ended()) is not None:
            raise ProcessDied(line)

    def stop(self, grace_s: float = 5.0) -> None:
        """Ask every living child to end, then kill what is left of its session."""
        for child in self.children:
            if child.process.poll() is None:
                _signal_session(child, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for child in self.children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            _signal_session(child, signal.SIGKILL)
            child.process.wait()
        self.children.clear()


def _signal_session(child: Child, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, number)


def free_port(wanted: int | None = None, key: str = "parallel.master_port") -> int:
    """A free TCP port of this host, or `wanted` itself when it is free.

    Raises BadInput naming `key` when `wanted` is in use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        try:
            s.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise BadInput("config", key, f"port {wanted} cannot be used: {error.strerror}") from None
        port: int = s.getsockname()[1]
        return port
