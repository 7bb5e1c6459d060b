"""FP8 parameters: masters come from the checkpoint, weights from the masters, and what the weights stand for goes out.

Transformer Engine's quantised tensors need a GPU (tests/gpu/test_fp8_parameters.py). Here a tensor subclass with their
interface stands in for them, in the trainer as it is: Megatron's buffers, its distributed optimizer, our loading,
exchange, export, reference and checkpoints. One float32 scale a matrix, like current scaling.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import QWEN3_MOE, write_bf16_checkpoint
from torch import Tensor

from megarubric.megatron.fp8_params import drop_copies, is_quantised, loadable, plain, stow, unstow

FP8 = torch.float8_e4m3fn


def scale_of(values: Tensor) -> Tensor:
    amax = values.abs().amax().float().reshape(1)
    return torch.where(amax > 0, amax / 448, 1.0)


def to_bytes(values: Tensor, scale: Tensor) -> Tensor:
    return (values.float() / scale).clamp(-448, 448).to(FP8).view(torch.uint8)


class Scaled(torch.Tensor):
    """bf16 to the outside; uint8 values and a float32 scale inside."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    _data: Tensor
    _scale_inv: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Scaled:
        made = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)
        made._data, made._scale_inv = data, scale
        return made

    @classmethod
    def of(cls, values: Tensor) -> Scaled:
        scale = scale_of(values)
        return cls(to_bytes(values, scale), scale)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return (self._data.view(FP8).float() * self._scale_inv).bfloat16()

    def quantize_(self, values: Tensor) -> Scaled:
        self._scale_inv.copy_(scale_of(values))
        self._data.copy_(to_bytes(values, self._scale_inv))
        return self

    def get_metadata(self) -> dict[str, Any]:
        return {"data": self._data, "fp8_scale_inv": self._scale_inv, "data_transpose": None, "quantizer": None}

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._data, args[0]._scale_inv)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].quantize_(plain(args[1]))
            return args[0]
        assert not func._schema.is_mutable or not isinstance(args[0], cls), func
        flat = torch.utils._pytree.tree_map(lambda a: a.dequantize() if isinstance(a, cls) else a, (args, kwargs or {}))
        return func(*flat[0], **flat[1])


def keeping(values: Tensor) -> torch.nn.Parameter:
    """A quantised parameter that keeps the values it was made from, as Transformer Engine's init context makes it."""
    made = torch.nn.Parameter(Scaled.of(values))
    kept = [values]
    made.get_high_precision_init_val = lambda: kept[0] if kept else None  # type: ignore[attr-defined]
    made.clear_high_precision_init_val = kept.clear  # type: ignore[attr-defined]
    return made


# ------------------------------------------------------------------------------------------------------- one parameter


def test_loading_reaches_the_masters_and_reading_the_weights() -> None:
    values = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    parameter = keeping(torch.zeros(8, 16, dtype=torch.bfloat16))
    assert is_quantised(parameter) and not is_quantised(torch.nn.Parameter(values))
    loadable(parameter)[:].copy_(values)
    assert torch.equal(parameter.get_high_precision_init_val(), values)  # what Megatron makes the masters from
    assert not plain(parameter).any()  # FP8 follows from the masters only
    with torch.no_grad():
        parameter.copy_(values)
    assert torch.equal(plain(parameter), Scaled.of(values).dequantize()) and not torch.equal(plain(parameter), values)
    parameter.clear_high_precision_init_val()
    with pytest.raises(ValueError, match="loaded through its masters"):
        loadable(parameter)


def test_storages_are_emptied_and_filled_again() -> None:
    parameters = [keeping(torch.randn(8, 16).bfloat16()) for _ in range(3)]
    moved = parameters[1]._data  # type: ignore[attr-defined]
    before = [plain(p).clone() for p in parameters]
    bytes_moved = moved.clone()
    moved.untyped_storage().resize_(0)  # as Megatron's buffer does
    stowed = stow([*parameters, torch.nn.Parameter(torch.ones(4))])
    assert len(stowed) == 5 and sum(s.bytes.numel() for s in stowed) == 2 * 128 + 3 * 4
    assert all(p._data.untyped_storage().nbytes() == 0 for p in parameters)  # type: ignore[attr-defined]
    moved.untyped_storage().resize_(128)
    moved.copy_(bytes_moved)
    unstow(stowed)
    assert all(torch.equal(plain(p), b) for p, b in zip(parameters, before))


def test_copies_of_bf16_weights_are_dropped() -> None:
    linear = torch.nn.Linear(2, 2)
    linear._fp8_workspaces = {"weight": torch.ones(4)}  # type: ignore[assignment]
    drop_copies([torch.nn.Sequential(linear, torch.nn.ReLU())])
    assert not linear._fp8_workspaces


# --------------------------------------------------------------------------------------------------------- the trainer


def megatron_with_stand_in() -> None:
    """Let Megatron take `Scaled` for Transformer Engine's class, with its casts of storage and of shards of masters."""
    import torch.distributed as dist
    from megatron.core import fp8_utils
    from megatron.core.distributed import param_and_grad_buffer

    def modify(tensor: Any, new: Tensor) -> None:
        new.detach().copy_(tensor._data)
        tensor._data = new

    def cast(
        parameters: Sequence[Any], masters: Sequence[Tensor | None], starts: Sequence[Any], group: Any, _: Any = None
    ) -> None:
        for parameter, master, start in zip(parameters, masters, starts):
            parameter.clear_high_precision_init_val()
            values = torch.zeros(1) if master is None else master.bfloat16()
            amax = values.abs().amax().float()
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
            parameter._scale_inv.copy_(scale_of(amax))
            if master is not None:
                place = parameter._data.view(-1)[start : start + master.numel()]
                place.copy_(to_bytes(values, parameter._scale_inv))

    fp8_utils.HAVE_TE_FP8_TENSOR_CLASS, fp8_utils.FP8_TENSOR_CLASS = True, Scaled
    fp8_utils._modify_underlying_storage_impl, fp8_utils._quantize_param_shard_impl = modify, cast
    fp8_utils.is_te_min_version = lambda *_: True
    # One call gathers uint8 and bf16 buffers, which gloo, other than NCCL, would join into one tensor: call by call.
    param_and_grad_buffer._coalescing_manager = lambda *_, **__: nullcontext()


def quantise_linears(models: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """Weights of attention's and the experts' linears, as built, become FP8 parameters."""
    for model in models:
        for name, module in model.named_modules():
            if name.split(".")[-1] in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
                made = keeping(torch.zeros_like(module.weight))
                for key, value in vars(module.weight).items():
                    setattr(made, key, value)
                module.weight = made
    return list(models)


def make_batch() -> Any:
    from megarubric.megatron.messages import TrainBatch

    rng = np.random.default_rng(3)
    lengths = rng.integers(6, 20, size=8).astype(np.int32)
    n = int(lengths.sum())
    mask = np.ones(n, np.float32)
    mask[np.cumsum(lengths) - lengths] = 0  # nothing predicts a first token
    return TrainBatch(
        tokens=rng.integers(0, QWEN3_MOE["vocab_size"], size=n).astype(np.int32),
        lengths=lengths,
        loss_mask=mask,
        advantages=np.repeat(rng.normal(size=8), lengths).astype(np.float32),
        weights=np.full(n, 1 / n, np.float32),
    )


def make_trainer(model_dir: str, quantised: bool, layout: dict[str, int]) -> Any:
    from megarubric.megatron import trainer
    from megarubric.megatron.messages import WorkerConfig

    if quantised:
        megatron_with_stand_in()
        build = trainer.build_model
        trainer.build_model = lambda *a, **k: quantise_linears(build(*a, **k))
    config = {"micro_batch_tokens": 64, "bucket_bytes": 1 << 16, "shm_prefix": f"mrfp8-{os.getppid()}"} | layout
    return trainer.Trainer(
        WorkerConfig(model_dir=model_dir, dtype="bfloat16", reference=quantised, timeout_s=60, **config)
    )


def masters(trainer: Any) -> dict[int, tuple[Tensor, int]]:
    """For parameters by number: this rank's shard of the masters, float32, and where it begins."""
    out = {}
    for number, parameter in enumerate(trainer.model.parameters()):
        for part in trainer.model._parts():
            if parameter in part.model_param_gbuf_map and parameter in part.model_param_group_index_map:
                shard = part._get_main_param_and_optimizer_states(parameter)["param"]
                out[number] = shard.detach(), part._get_model_param_range_map(parameter)["param"].start
    return out


def whole_parameters(trainer: Any, tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """What the parameters by number are, cut from whole tensors."""
    numbers = {id(p): n for n, p in enumerate(trainer.model.parameters())}
    out = {n: torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in enumerate(trainer.model.parameters())}
    for piece in trainer.pieces:
        out[numbers[id(piece.param)]][piece.local_index] = tensors[piece.hf_name][piece.hf_index]
    return out


def published(trainer: Any) -> dict[str, Tensor]:
    """The weights as an engine gets them; on rank 0."""
    from megarubric.exchange.buckets import Segment, tensor_view

    trainer.sender.begin(1)
    out = {}
    for index in range(len(trainer.sender.table.buckets)):
        bucket = trainer.sender.fill(1, index)
        if bucket is not None:
            segment = Segment.open(bucket.segment)
            out |= {entry.name: tensor_view(segment.buffer, entry).clone() for entry in bucket.entries}
            segment.close()
        trainer.barrier()
    trainer.sender.end(1)
    return out


def follow_from_masters(trainer: Any) -> bool:
    """Whether the part of every weight that this rank has masters of is what they quantise to."""
    parameters = list(trainer.model.parameters())
    good = True
    for number, (shard, start) in masters(trainer).items():
        parameter = parameters[number]
        here = slice(start, start + shard.numel())
        wanted = shard.bfloat16()
        if is_quantised(parameter):
            small = to_bytes(wanted, parameter._scale_inv).view(FP8)  # type: ignore[attr-defined]
            wanted = (small.float() * parameter._scale_inv).bfloat16()  # type: ignore[attr-defined]
        good &= torch.equal(plain(parameter).reshape(-1)[here], wanted)
    return good


def fp8_run(model_dir: str, out: str, layout: dict[str, int]) -> dict[str, Any]:
    from safetensors.torch import load_file

    from megarubric.megatron.messages import LossSettings

    trainer = make_trainer(model_dir, True, layout)
    found: dict[str, Any] = {}
    parameters = list(trainer.model.parameters())
    found["quantised"] = sum(is_quantised(p) for p in parameters)
    found["buffers"] = sorted({str(b.param_dtype) for b in trainer.model.chunks[0].buffers})

    # The checkpoint is in the masters, bit for bit, and the weights follow from them.
    loaded = whole_parameters(trainer, load_file(Path(model_dir) / "model.safetensors"))
    shards = masters(trainer)
    found["masters"] = all(
        torch.equal(shard, loaded[n].reshape(-1)[start : start + shard.numel()].float())
        for n, (shard, start) in shards.items()
    )
    found["n_masters"] = len(shards)
    found["scales"] = all(
        torch.equal(parameters[n]._scale_inv, scale_of(values))  # type: ignore[attr-defined]
        for n, values in loaded.items()
        if is_quantised(parameters[n])
    )
    found["follow"] = [follow_from_masters(trainer)]

    # The reference is the policy before the first step; after it, it is not, and the policy comes back.
    batch = make_batch()
    first = trainer.logprobs(batch)[0]
    found["reference"] = bool((trainer.logprobs(batch, "reference")[0] == first).all())
    (metrics,) = trainer.train(batch, LossSettings(), lr=0.05)
    found["follow"].append(follow_from_masters(trainer))
    after = trainer.logprobs(batch)[0]
    found["stepped"] = bool(metrics.grad_norm > 0) and not bool((after == first).all())
    found["reference_later"] = bool((trainer.logprobs(batch, "reference")[0] == first).all())
    found["policy_back"] = bool((trainer.logprobs(batch)[0] == after).all())

    # Engines and files get what the weights stand for.
    sent = published(trainer)
    trainer.export_hf(f"{out}/hf")
    exported = load_file(f"{out}/hf/model.safetensors")
    cut = whole_parameters(trainer, exported)
    found["exported"] = all(torch.equal(plain(p), cut[n]) for n, p in enumerate(parameters))
    found["sent"] = all(torch.equal(sent[name], tensor) for name, tensor in exported.items()) if sent else None

    # A checkpoint brings masters and weights back.
    trainer.begin_save(f"{out}/checkpoint", "{}")
    trainer.finish_save(wait=True)
    trainer.train(batch, LossSettings(), lr=0.05)
    found["moved_on"] = not bool((trainer.logprobs(batch)[0] == after).all())
    trainer.load(f"{out}/checkpoint")
    found["follow"].append(follow_from_masters(trainer))
    found["loaded"] = bool((trainer.logprobs(batch)[0] == after).all())
    trainer.close()
    return found


def bf16_run(model_dir: str, checkpoint: str, layout: dict[str, int]) -> dict[str, Any]:
    """Go on from a checkpoint with FP8 weights in a run without: the weights are the masters' again."""
    trainer = make_trainer(model_dir, False, layout)
    trainer.load(checkpoint)
    found = {"quantised": trainer.model.quantised, "follow": follow_from_masters(trainer), "n": len(masters(trainer))}
    trainer.close()
    return found


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of random bf16 weights."""
    return write_bf16_checkpoint(tmp_path_factory.mktemp("model"), QWEN3_MOE, 0.2)


@pytest.mark.engine
@pytest.mark.parametrize(("layout", "n_quantised"), [({}, 20), ({"tp": 2, "ep": 2}, 12)])
def test_from_checkpoint_to_engine_and_back(
    ranks: Any, model_dir: str, tmp_path: Path, layout: dict[str, int], n_quantised: int
) -> None:
    found = ranks(2, fp8_run, model_dir=model_dir, out=str(tmp_path), layout=layout)
    for one in found:
        assert one["quantised"] == n_quantised  # of 2 layers: qkv, proj, and fc1 and fc2 of this rank's experts
        assert one["buffers"] == ["torch.bfloat16", "torch.uint8"]
        assert one["masters"] and one["n_masters"] > 5 and one["scales"]
        assert one["follow"] == [True] * 3
        assert one["reference"] and one["reference_later"] and one["policy_back"]
        assert one["stepped"] and one["moved_on"] and one["loaded"] and one["exported"]
    assert found[0]["sent"] is True
    for one in ranks(2, bf16_run, model_dir=model_dir, checkpoint=f"{tmp_path}/checkpoint", layout={"tp": 2}):
        assert one["follow"] and not one["quantised"] and one["n"] > 5
