"""Builds the reward ops (csrc/) into one library that torch loads: C++ always, CUDA when nvcc is there.

The library uses only torch's stable ABI, so it needs torch's headers to compile but no particular torch build.

    MEGARUBRIC_NATIVE=0   install without compiled ops; the Python reference is used
    MEGARUBRIC_CUDA=0     leave the CUDA kernels out even when nvcc is found
    CXX, NVCC             compilers (default: g++ or clang++, and nvcc, from PATH)
    MAX_JOBS              compilers run at once (default: one a core)

Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
TARGET_TORCH = "0x020a000000000000"  # stable ABI of torch 2.10: what the bindings use, nothing newer
ARCHITECTURES = ("80", "90", "100")  # A100, H100 and H200, B200; as far as this nvcc knows them
# No contraction into fused multiply-adds and no fast-math anywhere: the ops promise the reference's bits.
COMMON = ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized")
INSTRUCTION_SETS = {
    "baseline": (),
    "avx2": ("-mavx2",),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


def stop(reason: str, hint: str = "MEGARUBRIC_NATIVE=0 installs without the compiled ops") -> NoReturn:
    raise SystemExit(f"megarubric: {reason} ({hint})")


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")  # finds it without the seconds an import takes
    if spec is None or spec.origin is None:
        stop("torch is not installed where the ops are built; install it first and use --no-build-isolation")
    return Path(spec.origin).parent


def cxx_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    stop("no C++ compiler: neither $CXX nor g++ nor clang++ is on PATH")


def cuda_compiler() -> str | None:
    if os.environ.get("MEGARUBRIC_CUDA") == "0":
        return None
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def cuda_architectures(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [a for a in ARCHITECTURES if f"compute_{a}" in listed]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr)
        on = next((Path(c).name for c in command if c.startswith(str(SOURCES))), "linking")
        if "nvcc" in Path(command[0]).name:
            stop(f"nvcc failed on {on}", "MEGARUBRIC_CUDA=0 leaves the CUDA kernels out")
        stop(f"{command[0]} failed on {on}")


class BuildOps(build_ext):
    """Compiles what changed, links one shared library."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python version in the name: it is no Python module

    def build_extension(self, ext: Extension) -> None:
        torch, cxx, nvcc = torch_directory(), cxx_compiler(), cuda_compiler()
        include = [f"-I{torch / 'include'}", f"-I{SOURCES}"]
        base = [cxx, "-std=c++20", "-O3", *COMMON, *include, f"-DTORCH_TARGET_VERSION={TARGET_TORCH}"]
        commands: dict[str, list[str]] = {}
        kernels = sorted(SOURCES.glob("*.cu"))
        architectures = cuda_architectures(nvcc) if nvcc and kernels else []
        cuda = [f'-DMEGARUBRIC_CUDA="{",".join("sm_" + a for a in architectures)}"'] if architectures else []
        commands["bindings"] = [*base, *cuda, "-DUSE_CUDA" if cuda else "-UUSE_CUDA", str(SOURCES / "bindings.cpp")]
        commands["group_advantages"] = [*base, str(SOURCES / "group_advantages_cpu.cpp")]
        sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ()}
        for isa, flags in sets.items():
            for name in ("aggregate", "tier_expectation", "weight_digest"):
                source = str(SOURCES / f"{name}_cpu.cpp")
                commands[f"{name}_{isa}"] = [*base, *flags, f"-DMEGARUBRIC_ISA={isa}", source]
        if nvcc and architectures:
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
            newest = architectures[-1]
            codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")  # PTX for cards to come
            host = ["-Xcompiler", ",".join(("-fPIC", "-fvisibility=hidden", "-ffp-contract=off"))]
            for source_file in kernels:
                commands[source_file.stem] = [
                    *(nvcc, "-std=c++17", "-O3", "--fmad=false", "-lineinfo", f"-ccbin={cxx}", *codes, *host),
                    *(f"-I{SOURCES}", *cuda, str(source_file)),
                ]

        objects = ROOT / "build" / "ops"  # not build_temp: pip throws that away, and every install would compile anew
        objects.mkdir(parents=True, exist_ok=True)
        headers = b"".join(p.read_bytes() for p in sorted(SOURCES.glob("*.h")))
        stale = [name for name, command in commands.items() if self.is_stale(objects / name, command, headers)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(lambda name: self.compile(objects / name, commands[name], headers), stale))

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        linker = [nvcc, "-shared", "-cudart=static", f"-ccbin={cxx}"] if nvcc and architectures else [cxx, "-shared"]
        inputs = [str(objects / f"{name}.o") for name in commands]
        libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        run([*linker, *inputs, *libraries, "-o", f"{target}.tmp"])
        os.replace(f"{target}.tmp", target)  # a process that has the old library mapped keeps it

    @staticmethod
    def key(command: list[str], headers: bytes) -> str:
        return hashlib.sha256("\0".join(command).encode() + Path(command[-1]).read_bytes() + headers).hexdigest()

    def is_stale(self, base: Path, command: list[str], headers: bytes) -> bool:
        key, compiled = base.with_suffix(".key"), base.with_suffix(".o")
        return not (compiled.exists() and key.exists() and key.read_text() == self.key(command, headers))

    def compile(self, base: Path, command: list[str], headers: bytes) -> None:
        run([*command, "-c", "-o", str(base.with_suffix(".o"))])
        base.with_suffix(".key").write_text(self.key(command, headers))


native = os.environ.get("MEGARUBRIC_NATIVE", "1") != "0"
setup(
    ext_modules=[Extension("megarubric.reward._ops", sources=["csrc/bindings.cpp"])] if native else [],
    cmdclass={"build_ext": BuildOps},
)
