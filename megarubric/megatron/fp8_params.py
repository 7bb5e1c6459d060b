"""Parameters that Transformer Engine keeps in FP8 (`train.fp8_parameters`): what they stand for, and where they lie.

A quantised parameter is a tensor subclass that holds FP8 values and scales. Made under Megatron's init context it also
keeps the values it was made from, in the model's dtype, in host memory, until the optimizer has copied its float32
masters from them. So weights are loaded into those values and not into the parameter: the masters are the checkpoint's
bit for bit, and FP8 follows from the masters, at the start as after every step (`TrainedModel.weights_from_masters`).

What leaves the trainer - exchange, export, checkpoints' model part - is what the FP8 values stand for, not the masters:
engines are to write with the weights that the trainer computes log-probabilities with. Masters are in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def is_quantised(parameter: Tensor) -> bool:
    """Whether it is one of Transformer Engine's quantised tensors, told by the method that quantises into them."""
    return hasattr(type(parameter), "quantize_")


def plain(parameter: Tensor) -> Tensor:
    """What a parameter stands for, no gradient, in its dtype: itself (live), of a quantised one a copy."""
    return parameter.dequantize() if is_quantised(parameter) else parameter.detach()


def loadable(parameter: Tensor) -> Tensor:
    """Where weights are loaded to: the parameter itself, of a quantised one the values its masters will come from.

    Raises ValueError when the masters have been made.
    """
    if not is_quantised(parameter):
        return parameter.detach()
    values = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if values is None:
        raise ValueError("an FP8 parameter is loaded through its masters once the optimizer is there")
    return values  # type: ignore[no-any-return]


@dataclass
class Stowed:
    """A storage whose bytes are in host memory for now."""

    storage: torch.UntypedStorage
    bytes: Tensor


def stow(parameters: Iterable[Tensor]) -> list[Stowed]:
    """Empty the storages of quantised parameters, into host memory.

    Those that Megatron's parameter buffers have moved already are empty and left alone; what remains are transposes and
    scales, and with MXFP8, which those buffers do not hold, all of it.
    """
    out: list[Stowed] = []
    for parameter in parameters:
        if not is_quantised(parameter):
            continue
        for value in parameter.get_metadata().values():  # type: ignore[attr-defined]
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage.nbytes() > 0:
                out.append(empty(storage, pin=value.is_cuda))
    return out


def empty(storage: torch.UntypedStorage, *, pin: bool) -> Stowed:
    """Move a storage's bytes to host memory; tensors keep it, with nothing in it. `pin` takes page-locked memory."""
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pin)
    host.copy_(_all_bytes(storage))
    storage.resize_(0)
    return Stowed(storage, host)


def unstow(stowed: Iterable[Stowed]) -> None:
    """Undo `stow` and `empty`."""
    for one in stowed:
        one.storage.resize_(one.bytes.numel())
        _all_bytes(one.storage).copy_(one.bytes)


def _all_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload,no-any-return]


def drop_copies(models: Iterable[torch.nn.Module]) -> None:
    """Free the FP8 copies of bf16 weights that Transformer Engine's modules keep between the micro-batches of a step;
    the first micro-batch of the next makes them anew."""
    for model in models:
        for module in model.modules():
            copies = getattr(module, "_fp8_workspaces", None)
            if copies:
                copies.clear()
