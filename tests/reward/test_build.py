"""setup.py: what it says when it cannot compile, and that the package installs without the ops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "NVCC", "MEGARUBRIC_NATIVE")}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**clean, **env})


def test_no_compiler_is_one_clear_line(tmp_path: Path) -> None:
    done = build(tmp_path, PATH=str(tmp_path))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "no C++ compiler" in last and "MEGARUBRIC_NATIVE=0" in last


def test_native_off_needs_no_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, PATH=str(tmp_path), MEGARUBRIC_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
