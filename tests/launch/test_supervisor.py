"""Processes of a run: logs, deaths noticed with their last words, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarubric.errors import BadInput, ProcessDied
from megarubric.launch.supervisor import Supervisor, free_port, last_words


def wait_until(condition, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_death_is_noticed_with_its_last_words(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as s:
        child = s.start("engine-0", [sys.executable, "-c", "print('loading'); raise SystemExit('no model there')"], {})
        assert wait_until(lambda: child.status() is not None)
        line = child.status()
        assert line and "engine-0 ended with status 1: no model there" in line and "engine-0.log" in line
        with pytest.raises(ProcessDied, match="no model there"):
            s.check()


def test_killed_by_signal_is_named(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as s:
        child = s.start("trainer-1", [sys.executable, "-c", "import time; time.sleep(60)"], {})
        os.kill(child.process.pid, signal.SIGKILL)
        assert wait_until(lambda: child.status() is not None)
        assert "trainer-1 was killed by SIGKILL" in (child.status() or "")


def test_stop_kills_grandchildren_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    s = Supervisor(tmp_path)
    child = s.start("stubborn", [sys.executable, "-c", code], {})
    assert wait_until(lambda: last_words(child.log).isdigit())
    grandchild = int(last_words(child.log))
    assert alive(grandchild)
    s.stop(grace_s=0.3)
    assert wait_until(lambda: not alive(grandchild) and not alive(child.process.pid))


def test_children_die_with_a_killed_controller(tmp_path: Path) -> None:
    """kill -9 of the controller: a child that asked for it (as every trainer rank and engine does) is gone too."""
    child = (
        "import time; from megarubric.launch.process import die_with_parent; die_with_parent();"
        "print('ready', flush=True); time.sleep(60)"
    )
    controller = (
        "import sys, time; from pathlib import Path; from megarubric.launch.supervisor import Supervisor;"
        f"c = Supervisor(Path(sys.argv[1])).start('child', [sys.executable, '-c', {child!r}], {{}});"
        "print(c.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", controller, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert wait_until(lambda: last_words(tmp_path / "child.log") == "ready")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not alive(pid))


def test_a_port_in_use_is_refused_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"parallel.master_port: port {port} cannot be used"):
            free_port(port)
    assert free_port() > 0
