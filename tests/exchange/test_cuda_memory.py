"""Buffers between processes by CUDA IPC: the real sequence of calls, answered by the stand-in runtime."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megarubric.exchange.cuda_memory import GRANULE, HANDLE_BYTES, CudaError, CudaRuntime, DeviceBuffer

DEVICE = torch.device("cpu", 0)  # where the stand-in's memory lies
OPENER = """
import os, sys, torch
from megarubric.exchange.cuda_memory import CudaRuntime, DeviceBuffer
runtime = CudaRuntime()
for line in sys.stdin:
    handle, nbytes, ordinal, os.environ["STANDIN_DEVICES"] = line.split()
    try:
        buffer = DeviceBuffer.open(bytes.fromhex(handle), int(nbytes), torch.device("cpu", int(ordinal)), runtime)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        continue
    first, same = bytes(buffer.tensor[:4].tolist()).hex(), buffer.tensor.data_ptr() == buffer.address
    buffer.tensor[4:8] = torch.tensor([9, 8, 7, 6], dtype=torch.uint8)
    buffer.close()
    buffer.close()
    print(runtime.uuid(int(ordinal)), first, same, flush=True)
"""


@pytest.fixture
def runtime(cudart: Path, monkeypatch: pytest.MonkeyPatch) -> CudaRuntime:
    for name in ("STANDIN_DEVICES", "STANDIN_BYTES", "MEGARUBRIC_CUDART"):
        monkeypatch.delenv(name, raising=False)
    return CudaRuntime(cudart)


class Opener:
    """Another process, which opens handles and says what it finds."""

    def __init__(self, cudart: Path) -> None:
        env = {**os.environ, "MEGARUBRIC_CUDART": str(cudart)}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", OPENER], stdin=pipe, stdout=pipe, text=True, env=env)

    def __call__(self, handle: bytes, nbytes: int, ordinal: int, devices: str) -> str:
        """Open `handle` on the `ordinal`-th of `devices`, which is what the process sees."""
        print(handle.hex(), nbytes, ordinal, devices, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


@pytest.fixture
def opened(cudart: Path) -> Iterator[Opener]:
    opener = Opener(cudart)
    yield opener
    opener.process.communicate(timeout=30)


def test_another_process_reads_and_writes_the_same_memory(runtime, opened, monkeypatch) -> None:
    monkeypatch.setenv("STANDIN_DEVICES", "4,2")
    device = torch.device("cpu", 1)
    buffer = DeviceBuffer.create(1000, device, runtime)
    assert buffer.nbytes == GRANULE and len(buffer.tensor) == GRANULE  # no other allocation shares the block
    assert len(buffer.handle) == HANDLE_BYTES and buffer.handle[:1] == b"\0" and buffer.handle[-1:] != b"\0"
    buffer.tensor[:8] = torch.arange(1, 9, dtype=torch.uint8)
    # The other process sees the devices in another order, and knows the same one by the same UUID.
    uuid, first, shared = opened(buffer.handle, buffer.nbytes, ordinal=0, devices="2,4").split()
    assert (uuid, first, shared) == (runtime.uuid(1), "01020304", "True")
    assert runtime.uuid(0) != runtime.uuid(1)
    assert buffer.tensor[:8].tolist() == [1, 2, 3, 4, 9, 8, 7, 6]
    assert "invalid resource handle" in opened(buffer.handle, buffer.nbytes, ordinal=1, devices="2,4")
    handle = buffer.handle
    buffer.close()
    buffer.close()
    assert opened(handle, GRANULE, 0, devices="2") == (
        "CudaError: cudaIpcOpenMemHandle: mapping of buffer object failed (CUDA error 205)"
    )


def test_the_current_device_stays_what_it_was(runtime, monkeypatch) -> None:
    monkeypatch.setenv("STANDIN_DEVICES", "0,1")
    current = ctypes.c_int(-1)
    with runtime.on_device(1):
        buffer = DeviceBuffer.create(10, torch.device("cpu", 0), runtime)
        with pytest.raises(CudaError):
            DeviceBuffer.open(buffer.handle, 10, torch.device("cpu", 0), runtime)
        runtime._call("cudaGetDevice", ctypes.byref(current))
        assert current.value == 1
        buffer.close()
    runtime._call("cudaGetDevice", ctypes.byref(current))
    assert current.value == 0


def test_faults_are_one_line_in_cudas_words(runtime, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("STANDIN_BYTES", str(2 * GRANULE))
    kept = DeviceBuffer.create(1, DEVICE, runtime)
    with pytest.raises(CudaError, match=r"^a weight buffer of 4194304 bytes on cpu:0: cudaMalloc: out of memory \(.*"):
        DeviceBuffer.create(GRANULE + 1, DEVICE, runtime)
    second = DeviceBuffer.create(1, DEVICE, runtime)  # what failed took nothing
    second.close()
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle: invalid device context"):
        DeviceBuffer.open(kept.handle, 1, DEVICE, runtime)
    with pytest.raises(CudaError, match="has 64 bytes, this one 3"):
        runtime.open(b"abc", 0)
    with pytest.raises(CudaError, match="cudaGetDeviceProperties: invalid device ordinal"):
        runtime.uuid(7)
    with pytest.raises(CudaError, match="cudaSetDevice: invalid device ordinal"):
        DeviceBuffer.create(1, torch.device("cpu", 7), runtime)
    with pytest.raises(CudaError, match="cudaIpcGetMemHandle: invalid argument"):
        runtime.export(kept.address + 256, 0)
    assert runtime._library.cudaGetLastError() == 0  # nothing left for torch to trip over
    kept.close()
    for path in (tmp_path / "nothing.so", Path(ctypes.util.find_library("m") or "libm.so.6")):
        with pytest.raises(CudaError, match="is no CUDA runtime"):
            CudaRuntime(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_machine_without_a_gpu_says_so(monkeypatch) -> None:
    """With a CUDA build of torch the real runtime answers, which has no driver; without one there is no runtime."""
    monkeypatch.delenv("MEGARUBRIC_CUDART", raising=False)
    with pytest.raises(CudaError, match=r"CUDA runtime|no CUDA-capable device") as caught:
        DeviceBuffer.create(1, torch.device("cuda", 0), CudaRuntime())
    assert "\n" not in str(caught.value)


def test_the_stand_in_has_cudas_signatures(tmp_path) -> None:
    """Its definitions compile against the declarations and struct layouts of the toolkit's header."""
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        pytest.skip("nvcc not found")
    source = Path(__file__).parent / "host_cuda" / "cudart.c"
    command = [nvcc, "-DMEGARUBRIC_CUDA_HEADER", "-c", "-o", str(tmp_path / "cudart.o"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
