"""On a GPU: buffers between two processes beside torch's pools, the digest kernel, whole exchanges through the device.

Not run yet: written without a GPU at hand. Everything but CUDA itself runs in tests/exchange.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
GPU = torch.cuda.is_available()
needed = ("msgspec", "xxhash")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="needs a GPU"),
    pytest.mark.skipif(any(importlib.util.find_spec(n) is None for n in needed), reason=f"needs {', '.join(needed)}"),
]
whole = all(importlib.util.find_spec(name) for name in ("vllm", "megatron", "transformer_engine"))

OPENER = """
import sys, torch
from megarubric.exchange.cuda_memory import CudaRuntime, DeviceBuffer
from megarubric.exchange.digest import sum128_of
device = torch.device("cuda", 0)
torch.ones(1 << 20, device=device)  # torch's own allocator is in use here as well
buffer = DeviceBuffer.open(bytes.fromhex(sys.argv[1]), int(sys.argv[2]), device, CudaRuntime())
print(CudaRuntime().uuid(0), sum128_of(buffer.tensor, [(0, buffer.nbytes)])[0].hex(), flush=True)
buffer.tensor[:4] = torch.tensor([4, 3, 2, 1], dtype=torch.uint8, device=device)
torch.cuda.synchronize()
buffer.close()
"""


def opened(handle: bytes, nbytes: int, **environment: str) -> list[str]:
    """What another process finds in a buffer, into which it then writes 4, 3, 2, 1."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    command = [sys.executable, "-c", OPENER, handle.hex(), str(nbytes)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("segments", ["expandable_segments:False", "expandable_segments:True"])
def test_another_process_opens_a_buffer(segments: str) -> None:
    """Also where that process' torch maps its memory piecewise, which has no handles."""
    from megarubric.exchange.cuda_memory import CudaRuntime, DeviceBuffer
    from megarubric.exchange.digest import sum128

    runtime, device = CudaRuntime(), torch.device("cuda", torch.cuda.device_count() - 1)
    buffer = DeviceBuffer.create(3 << 20, device, runtime)
    buffer.tensor.copy_(torch.randint(0, 256, (buffer.nbytes,), dtype=torch.uint8))
    torch.cuda.synchronize()
    wanted = [runtime.uuid(device.index), sum128(buffer.tensor.cpu().numpy().data).hex()]
    # The other process sees this device alone: another ordinal, the same UUID.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    last = visible.split(",")[-1]
    assert opened(buffer.handle, buffer.nbytes, CUDA_VISIBLE_DEVICES=last, PYTORCH_CUDA_ALLOC_CONF=segments) == wanted
    assert buffer.tensor[:4].tolist() == [4, 3, 2, 1]
    buffer.close()


def test_the_uuid_is_torchs() -> None:
    from megarubric.exchange.cuda_memory import CudaRuntime

    for ordinal in range(torch.cuda.device_count()):
        uuid = str(torch.cuda.get_device_properties(ordinal).uuid).replace("-", "")
        assert CudaRuntime().uuid(ordinal) == uuid


def test_a_buffer_is_made_while_a_pool_of_mapped_memory_is_current() -> None:
    """What vLLM does around loading: torch allocates from a pool of another allocator. These buffers do not."""
    from megarubric.exchange.cuda_memory import CudaRuntime, DeviceBuffer

    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
        buffer = DeviceBuffer.create(1, torch.device("cuda", 0), CudaRuntime())
    assert len(buffer.handle) == 64
    buffer.close()


@pytest.mark.parametrize("native", [True, False])
def test_digests(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel and torch fallback against the definition: aligned or not, any tail, nothing at all; twice the same."""
    from megarubric.exchange.digest import sum128, sum128_of
    from megarubric.reward import ops

    if native and not ops.cuda_architectures():
        pytest.skip("CUDA ops not compiled")
    monkeypatch.setattr(ops, "available", lambda: native)
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8))
    spans = [(0, 2_000_000), (2_000_128, 0), (2_000_128, 32_768), (2_032_896, 32_769), (2_100_001, 777_777), (5, 7)]
    wanted = [sum128(data[o : o + n].numpy().data) for o, n in spans]
    assert sum128_of(data.cuda(), spans) == wanted == sum128_of(data.cuda(), spans)


@pytest.mark.parametrize("nbytes", [64 << 20, 1 << 30])
def test_speed_of_the_digest(nbytes: int) -> None:
    """Printed, and not judged."""
    from megarubric.exchange.digest import sum128_of

    buffer = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda")
    spans = [(at, nbytes // 64) for at in range(0, nbytes, nbytes // 64)]
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        sum128_of(buffer, spans)
        seconds.append(time.perf_counter() - began)
    print(
        f"sum128 of {nbytes >> 20} MiB in 64 tensors: {nbytes / min(seconds) / 1e9:.0f} GB/s, the answer's way included"
    )


def rank() -> None:
    """One of two ranks: both publish halves, and find the same whole in their own device's buffer."""
    import torch.distributed as dist

    from megarubric.exchange.device_sender import DeviceSender
    from megarubric.exchange.digest import sum128_of
    from megarubric.megatron.pieces import Piece

    number = int(os.environ["RANK"])
    torch.cuda.set_device(number)
    device = torch.device("cuda", number)
    dist.init_process_group("nccl", device_id=device)
    shape = (4096, 8192)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    found = []
    for index in ((slice(0, 2048), slice(0, 8192)), (slice(0, 4096), slice(0, 4096))):  # rows, then columns
        other = tuple(slice(s.stop, n) if s.stop != n else s for s, n in zip(index, shape))
        mine = other if number else index
        part = values[mine].contiguous().to(device)
        here = tuple(slice(0, n) for n in part.shape)
        sender = DeviceSender(
            {"w": shape},
            torch.bfloat16,
            [Piece("w", shape, mine, part, here, True)],
            group=dist.new_group(backend="gloo"),
            device=device,
            name="mr-test",
            bucket_bytes=64 << 20,
        )
        sender.begin(1)
        began = time.perf_counter()
        sender.fill(1, 0)
        seconds = time.perf_counter() - began
        sender.end(1)
        whole = sender._buffers[0].tensor[: 2 * values.numel()]
        assert torch.equal(whole.view(torch.bfloat16).view(shape).cpu(), values)
        found.append((sum128_of(whole, [(0, len(whole))])[0].hex(), len(sender.devices.handles)))
        print(json.dumps({"rank": number, "fill_s": seconds}), file=sys.stderr)
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


@pytest.mark.skipif(not GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_sum_their_halves() -> None:
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    command = [sys.executable, "-c", f"import {Path(__file__).stem} as t; t.rank()"]
    running = [
        subprocess.Popen(command, env={**env, "RANK": str(r)}, stdout=subprocess.PIPE, text=True) for r in range(2)
    ]
    first, second = (json.loads(p.communicate(timeout=300)[0].splitlines()[-1]) for p in running)
    assert first == second and all(handles == 2 for _, handles in first)


@pytest.mark.skipif(not whole, reason="needs the GPU environment")
@pytest.mark.parametrize("through", ["host", "device"])
def test_a_run_exchanges_and_verifies(tmp_path: Path, through: str) -> None:
    """A run whose every exchange is verified by checksum; the next rollouts agree with the trainer."""
    settings = ["parallel.card=h100", "rollout.gpu_memory_utilization=0.3", "judge.gpu_memory_utilization=0.3"]
    settings += [f"runs_dir={tmp_path}", "--fresh", "model.dtype=bfloat16", f"exchange.through={through}"]
    command = [sys.executable, "-m", "megarubric", "train", "configs/smoke.yaml", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "smoke/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    for row in steps:
        assert row["train/logprob_abs_diff"] < 0.2
        print(through, f"{row['perf/exchange_bytes'] / 1e6:.1f} MB in {row['perf/exchange_s']:.3f} s")
    assert len(steps) == 2
