"""Device memory that processes of one host share: allocated with cudaMalloc, handed over as one CUDA IPC handle.

The allocation belongs to no pool of torch's. Memory of a virtual-memory allocator (expandable segments, the engine's
sleep mode) is refused by cudaIpcGetMemHandle, and a tensor of torch's ordinary pool is cut out of a block that the
handle names as a whole. What is allocated here is neither, so both may be in use beside it.

The CUDA runtime is the one that torch has loaded, called through ctypes; ``MEGARUBRIC_CUDART`` names another library.
Without a GPU, tests name a stand-in that keeps "device" memory in the host's, and everything here runs as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megarubric.errors import MegarubricError

if TYPE_CHECKING:
    import torch

HANDLE_BYTES = 64  # CUDA_IPC_HANDLE_SIZE
# A handle opens the whole block that cudaMalloc cut the allocation from; whole blocks of 2 MiB share with nobody.
GRANULE = 2 << 20
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess, the only flag there is
# cudaDeviceProp begins with `char name[256]; cudaUUID_t uuid;` in every CUDA since 10; how long it is differs (1008
# bytes in 13, 1032 in 12), so there is room to spare.
_PROPERTIES_BYTES, _UUID_AT = 4096, 256


class CudaError(MegarubricError):
    """A CUDA call that failed, with CUDA's own words, or a CUDA runtime that is not there."""


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t. cudaIpcOpenMemHandle takes it by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


_SIGNATURES: dict[str, list[Any]] = {
    "cudaGetDevice": [ctypes.POINTER(ctypes.c_int)],
    "cudaSetDevice": [ctypes.c_int],
    "cudaGetDeviceProperties": [ctypes.c_void_p, ctypes.c_int],
    "cudaMalloc": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t],
    "cudaFree": [ctypes.c_void_p],
    "cudaIpcGetMemHandle": [ctypes.POINTER(_Handle), ctypes.c_void_p],
    "cudaIpcOpenMemHandle": [ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint],
    "cudaIpcCloseMemHandle": [ctypes.c_void_p],
    "cudaGetLastError": [],
}


class CudaRuntime:
    """The few calls of the CUDA runtime that are needed here. Every method raises CudaError."""

    def __init__(self, library: str | os.PathLike[str] | None = None) -> None:
        """Load `library`; None: what ``MEGARUBRIC_CUDART`` names, else the runtime that torch has loaded."""
        path = os.fspath(library or os.environ.get("MEGARUBRIC_CUDART") or loaded_runtime())
        try:
            self._library = ctypes.CDLL(path)
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = ctypes.c_int, arguments
            self._library.cudaGetErrorString.restype = ctypes.c_char_p
            self._library.cudaGetErrorString.argtypes = [ctypes.c_int]
        except (OSError, AttributeError) as error:
            raise CudaError(f"{path} is no CUDA runtime: {error}") from error

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            self._library.cudaGetLastError()  # or torch's next check would report it once more, as its own
            text = self._library.cudaGetErrorString(code).decode(errors="replace")
            raise CudaError(f"{name}: {text} (CUDA error {code})")

    @contextlib.contextmanager
    def on_device(self, ordinal: int) -> Iterator[None]:
        """Make `ordinal` this thread's current device for the duration."""
        before = ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(before))
        self._call("cudaSetDevice", ordinal)
        try:
            yield
        finally:
            self._call("cudaSetDevice", before.value)

    def uuid(self, ordinal: int) -> str:
        """Which piece of hardware `ordinal` is: 32 hex digits, the same in every process.

        Ordinals are not: CUDA_VISIBLE_DEVICES counts anew.
        """
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, ordinal)
        return properties.raw[_UUID_AT : _UUID_AT + 16].hex()

    def allocate(self, nbytes: int, ordinal: int) -> int:
        """Address of `nbytes` new bytes on a device."""
        pointer = ctypes.c_void_p()
        with self.on_device(ordinal):
            self._call("cudaMalloc", ctypes.byref(pointer), nbytes)
        return pointer.value or 0

    def free(self, pointer: int, ordinal: int) -> None:
        """Give an allocation back; waits for what the device still does."""
        with self.on_device(ordinal):
            self._call("cudaFree", pointer)

    def export(self, pointer: int, ordinal: int) -> bytes:
        """The handle of an allocation on a device, for other processes."""
        handle = _Handle()
        with self.on_device(ordinal):
            self._call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)  # a field of chars would end at its first zero

    def open(self, handle: bytes, ordinal: int) -> int:
        """Address of another process' allocation, mapped for a device."""
        if len(handle) != HANDLE_BYTES:
            raise CudaError(f"a CUDA IPC handle has {HANDLE_BYTES} bytes, this one {len(handle)}")
        pointer = ctypes.c_void_p()
        with self.on_device(ordinal):
            value = _Handle.from_buffer_copy(handle)
            self._call("cudaIpcOpenMemHandle", ctypes.byref(pointer), value, _LAZY_PEER_ACCESS)
        return pointer.value or 0

    def close(self, pointer: int, ordinal: int) -> None:
        """Unmap what `open` mapped."""
        with self.on_device(ordinal):
            self._call("cudaIpcCloseMemHandle", pointer)


def loaded_runtime() -> str:
    """Path of the CUDA runtime that torch has loaded into this process. Raises CudaError when there is none."""
    import torch

    wanted = (torch.version.cuda or "").split(".")[0]
    mapped = Path("/proc/self/maps").read_text()
    found: set[str] = set(re.findall(r"\s(/\S*/libcudart\S*\.so\S*)$", mapped, re.MULTILINE))
    for path in sorted(found):  # a process may hold two, of another CUDA for another library
        if f".so.{wanted}" in path:
            return path
    raise CudaError("no CUDA runtime is loaded: this torch is built without CUDA, or links it statically")


class DeviceBuffer:
    """`nbytes` of one device's memory as a torch tensor: made here (`create`), or another process' (`open`).

    `tensor` is uint8[nbytes] on `device` and shares the memory. Views of it must be gone before `close`.
    """

    def __init__(self, runtime: CudaRuntime, pointer: int, nbytes: int, device: torch.device, handle: bytes) -> None:
        self.device, self.nbytes, self.handle = device, nbytes, handle
        self._runtime, self._pointer, self._opened = runtime, pointer, False
        self.tensor = as_tensor(pointer, nbytes, device)

    @classmethod
    def create(cls, nbytes: int, device: torch.device, runtime: CudaRuntime) -> Self:
        """Allocate at least `nbytes` on `device`. Raises CudaError, naming the size when there is no room."""
        whole = -(-max(nbytes, 1) // GRANULE) * GRANULE
        try:
            pointer = runtime.allocate(whole, ordinal(device))
        except CudaError as error:
            raise CudaError(f"a weight buffer of {whole} bytes on {device}: {error}") from error
        try:
            return cls(runtime, pointer, whole, device, runtime.export(pointer, ordinal(device)))
        except BaseException:
            runtime.free(pointer, ordinal(device))
            raise

    @classmethod
    def open(cls, handle: bytes, nbytes: int, device: torch.device, runtime: CudaRuntime) -> Self:
        """Map the buffer of another process, which lies on the same `device`. Raises CudaError.

        CUDA maps a handle once in a process: keep what this returns, and close it before the other process frees it.
        """
        pointer = runtime.open(handle, ordinal(device))
        try:
            made = cls(runtime, pointer, nbytes, device, handle)
        except BaseException:
            runtime.close(pointer, ordinal(device))
            raise
        made._opened = True
        return made

    @property
    def address(self) -> int:
        """First address of the buffer in this process."""
        return self._pointer

    def close(self) -> None:
        """Free what was created, unmap what was opened. A second call does nothing."""
        if self._pointer:
            pointer, self._pointer = self._pointer, 0
            del self.tensor
            (self._runtime.close if self._opened else self._runtime.free)(pointer, ordinal(self.device))


def ordinal(device: torch.device) -> int:
    """Number of `device` among those this process sees."""
    return device.index or 0


class _Foreign:
    """Memory that torch did not allocate, in the form in which it takes such."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
        }


def as_tensor(pointer: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8[nbytes] at `pointer`, which stays whose it is. (On a "cpu" device the runtime is the tests' stand-in.)"""
    import torch

    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(pointer), dtype=torch.uint8)
    tensor = torch.as_tensor(_Foreign(pointer, nbytes), device=device)
    if tensor.data_ptr() != pointer:
        raise CudaError(f"torch copied the memory of a weight buffer, it seems to lie on another device than {device}")
    return tensor
