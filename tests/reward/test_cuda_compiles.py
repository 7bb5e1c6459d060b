"""What nvcc makes of the kernels for sm_90: no spills, 128-bit loads, no fused multiply-add. Needs nvcc, no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which(os.environ.get("NVCC", "nvcc"))
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc not found")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """(ptxas' report, PTX by file) of all kernels, with the flags setup.py uses."""
    keep = tmp_path_factory.mktemp("nvcc")
    command = [
        *(NVCC, "-std=c++17", "-O3", "--fmad=false", "-gencode=arch=compute_90,code=sm_90", "-Xptxas", "-v"),
        *(f"-I{CSRC}", "--keep", "--keep-dir", str(keep), "-c", *map(str, sorted(CSRC.glob("*.cu")))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=keep)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, {p.stem: p.read_text() for p in keep.glob("*.ptx")}


def test_no_kernel_spills(compiled) -> None:
    report, _ = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= 11 and set(spills) == {("0", "0", "0")}, report


def test_scores_and_logits_are_loaded_sixteen_bytes_at_a_time(compiled) -> None:
    _, ptx = compiled
    assert "ld.global.cs.v4.f32" in ptx["aggregate_cuda"]
    assert re.search(r"ld\.global\.cs\.v4\.[bu]32", ptx["tier_expectation_cuda"])
    assert re.search(r"ld\.global\.cs\.v4\.[bu]32", ptx["weight_digest_cuda"])
    # rubric records come as whole quarters too
    assert re.search(r"ld\.global(\.nc)?\.v4\.", ptx["aggregate_cuda"].replace("ld.global.cs.v4.f32", ""))


def test_nothing_is_fused_or_approximate(compiled) -> None:
    """The promise of equal bits rests on this. Division and square root are library code that rounds correctly."""
    _, ptx = compiled
    for name, text in ptx.items():
        assert not re.search(
            r"\b(ex2|lg2|rcp|rsqrt|sin|cos)\.approx|div\.(approx|full)|\bmad\.f32|\bfma\.approx", text
        ), name
        assert name == "weight_digest_cuda" or "div.rn.f" in text, name  # which computes with integers only
        assert not re.search(r"\bfma\.rn\.f(32|64)", text), name
