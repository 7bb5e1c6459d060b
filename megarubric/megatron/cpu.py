"""Let Megatron-Core 0.19 run where there is no CUDA: the one place in this project that replaces parts of torch.

Megatron-Core's arithmetic is device-neutral, but it names CUDA throughout: the current device, random number states,
streams, ``device="cuda"`` in the optimizer, type strings. Each replacement below answers one of them with the CPU's
equivalent; nothing of Megatron itself is changed. With CUDA present `install` refuses: there the real thing runs.

A process that imports megatron calls `ensure` first. Modules of this package that import megatron do so themselves.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch.utils import _device as _device_context

_installed = False


def ensure() -> None:
    """`install` where there is no CUDA; nothing where there is."""
    if not torch.cuda.is_available():
        install()


def installed() -> bool:
    """Whether this process runs Megatron on the CPU through the bridge."""
    return _installed


def install() -> None:
    """Replace the parts of torch that Megatron-Core expects CUDA behind. Idempotent.

    Raises RuntimeError with CUDA present, or when megatron was imported before: it would hold on to the originals.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU bridge of Megatron-Core must not be installed where CUDA is available")
    if "megatron.core" in sys.modules:
        raise RuntimeError("megarubric.megatron.cpu.ensure() must run before megatron.core is imported")
    _bridge_devices()
    _bridge_random()
    _bridge_types()
    _bridge_collectives()
    _skip_compilation()
    _installed = True


# ---------------------------------------------------------------------------------------------------------- devices

CPU = torch.device("cpu")


class _Stream:
    """The CPU runs everything in order: a stream to wait for is one that has nothing left to do."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_STREAM = _Stream()


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _no_op() -> Callable[..., None]:
    # A new function each time: torch's compiler, should someone import it, refuses one object under two names.
    return lambda *_, **__: None


def _bridge_devices() -> None:
    cuda = torch.cuda
    # Used as `device=torch.cuda.current_device()` for every buffer Megatron allocates.
    cuda.current_device = lambda: CPU
    # The pipeline schedules and the gradient buffers synchronise and order streams.
    cuda.set_device = _no_op()
    cuda.synchronize = _no_op()
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.stream = _stream_context
    cuda.current_stream = lambda device=None: _STREAM
    cuda.default_stream = lambda device=None: _STREAM
    cuda.is_current_stream_capturing = lambda: False
    # Optimizer scalars, token counts of the schedules: `torch.zeros(1, device="cuda")`. Functions are wrapped one by
    # one because a TorchFunctionMode would tax every operation and every `.shape` of the training step.
    # `torch.device(...)` used as a context compares functions by identity, so it has to see the originals first.
    _device_context._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # Offload and reload of optimizer state and gradients.
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = CPU
        return function(*args, **kwargs)

    return wrapped


# ---------------------------------------------------------------------------------------------------- random numbers


class _Generators:
    """`torch.cuda.default_generators[device]`, with the one generator there is."""

    def __getitem__(self, device: object) -> torch.Generator:
        return torch.default_generator


def _bridge_random() -> None:
    # Megatron's tracker keeps one named CUDA state per purpose (data, tensor and expert parallel, recompute) and swaps
    # them in and out; on the CPU they are states of the default generator.
    cuda = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.default_generators = _Generators()
    # Setting a state goes through torch's queue of calls to make once CUDA initialises, which is never.
    cuda._lazy_call = lambda call, **_: call()
    cuda._lazy_init = _no_op()


# ------------------------------------------------------------------------------------------------------------- types


def _bridge_types() -> None:
    # `isinstance` checks of mixed-precision modules, against types that a build without a driver cannot instantiate.
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(torch.cuda, name, getattr(torch, name))
    # The optimizers sort parameters by `param.type() == "torch.cuda.FloatTensor"`.
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and answer.startswith("torch.") and not answer.startswith("torch.cuda."):
            return "torch.cuda." + answer.removeprefix("torch.")
        return answer

    torch.Tensor.type = type_


# ------------------------------------------------------------------------------------------------------- collectives


def _bridge_collectives() -> None:
    dist = torch.distributed
    # Token dispatch gives the split sizes as tensors; NCCL's binding converts them, gloo's wants lists.
    all_to_all = dist.all_to_all_single

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    @functools.wraps(all_to_all)
    def all_to_all_single(
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        return all_to_all(output, input, as_list(output_split_sizes), as_list(input_split_sizes), *rest, **kwargs)

    # Expert tensor parallelism gathers, and scatters back, a different number of tokens from each rank. NCCL's process
    # group takes unequal sizes as one broadcast or reduction a rank; gloo refuses them, so the same is done here.
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def unequal(tensors: list[torch.Tensor]) -> bool:
        return len({tensor.shape for tensor in tensors}) > 1

    @functools.wraps(all_gather)
    def all_gather_unequal(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any
    ) -> Any:
        if not unequal(tensor_list):
            return all_gather(tensor_list, tensor, group=group, **kwargs)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            dist.broadcast(part, group=group, group_src=rank)
        return None

    @functools.wraps(reduce_scatter)
    def reduce_scatter_unequal(output: torch.Tensor, input_list: list[torch.Tensor], *rest: Any, **kwargs: Any) -> Any:
        if not unequal(input_list):
            return reduce_scatter(output, input_list, *rest, **kwargs)
        if rest or kwargs.keys() - {"group"}:
            raise NotImplementedError("reduce_scatter of unequal parts: only a sum over a group, synchronously")
        group = kwargs.get("group")
        for rank, part in enumerate(input_list):
            total = part.clone()
            dist.reduce(total, group=group, group_dst=rank)
            if rank == dist.get_rank(group):
                output.copy_(total)
        return None

    dist.all_to_all_single = all_to_all_single
    dist.all_gather = all_gather_unequal
    dist.reduce_scatter = reduce_scatter_unequal


# ------------------------------------------------------------------------------------------------------- compilation


def _skip_compilation() -> None:
    # Megatron decorates its pointwise fusions with torch.compile at import. On the CPU that costs four seconds of
    # importing the compiler and, at the first call, a C++ compiler that may not be there. Others' use stays as it is.
    compile_ = torch.compile

    @functools.wraps(compile_)
    def compile_unless_megatron(model: Any = None, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return model if model is not None else (lambda function: function)
        return compile_(model, **kwargs)

    torch.compile = compile_unless_megatron
