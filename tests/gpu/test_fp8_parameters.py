"""On a GPU, with Transformer Engine's own tensors: FP8 parameters follow from masters that are the checkpoint's, serve
what they stand for, leave the device whole and come back. tests/megatron/test_fp8_parameters.py has the same on a CPU,
with a stand-in for those tensors.

Not run yet: written without a GPU at hand.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import QWEN3_MOE, write_bf16_checkpoint

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
HERE = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.skipif(HERE < (8, 9), reason="needs a GPU with FP8"),
    pytest.mark.skipif(
        HERE >= (8, 9) and any(importlib.util.find_spec(p) is None for p in ("megatron", "transformer_engine")),
        reason="needs megatron-core and transformer-engine (requirements/gpu.lock, gpu-te.txt)",
    ),
]
HF_CONFIG = QWEN3_MOE | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "head_dim": 64,
}


def job(model_dir: str, out: str, recipe: str) -> dict[str, object]:
    """Load, step, reference, export, offload and back, save, step, load: what held, on one rank."""
    import numpy as np
    from safetensors.torch import load_file

    from megarubric.megatron.fp8_params import is_quantised, plain
    from megarubric.megatron.messages import LossSettings, TrainBatch, WorkerConfig
    from megarubric.megatron.trainer import Trainer

    config = {"dtype": "bfloat16", "fp8": recipe, "fp8_parameters": True, "fp8_bf16_layers": 1, "reference": True}
    trainer = Trainer(WorkerConfig(model_dir=model_dir, micro_batch_tokens=256, bucket_bytes=1 << 20, **config))
    parameters = list(trainer.model.parameters())
    files = load_file(Path(model_dir) / "model.safetensors")
    found: dict[str, object] = {"quantised": sum(is_quantised(p) for p in parameters), "of": len(parameters)}

    masters = True
    pieces = {id(piece.param): piece for piece in trainer.pieces if piece.shape == tuple(piece.param.shape)}
    for part in trainer.model._parts():
        for parameter in part.model_param_group_index_map:
            if id(parameter) in pieces:
                piece = pieces[id(parameter)]
                wanted = files[piece.hf_name][piece.hf_index].float()
                master = part._get_main_param_and_optimizer_states(parameter)["param"]
                masters &= torch.equal(master.detach().cpu().view(wanted.shape), wanted)
    found["masters"], found["whole"] = masters, len(pieces)

    rng = np.random.default_rng(1)
    lengths = np.full(8, 32, np.int32)
    mask = np.ones(256, np.float32)
    mask[::32] = 0
    advantages = np.repeat(rng.normal(size=8), 32).astype(np.float32)
    tokens = rng.integers(0, 512, 256).astype(np.int32)
    batch = TrainBatch(tokens, lengths, loss_mask=mask, advantages=advantages, weights=mask / mask.sum())
    first = trainer.logprobs(batch)[0]
    found["finite"] = bool(np.isfinite(first).all())
    found["reference"] = bool((trainer.logprobs(batch, "reference")[0] == first).all())
    (metrics,) = trainer.train(batch, LossSettings(), lr=1e-2)
    found["skipped"], found["grad_norm"] = metrics.skipped, metrics.grad_norm
    after = trainer.logprobs(batch)[0]
    found["stepped"] = not bool((after == first).all())
    trainer.logprobs(batch, "reference")
    found["policy_back"] = bool((trainer.logprobs(batch)[0] == after).all())

    values = [plain(p).cpu() for p in parameters]
    trainer.export_hf(f"{out}/hf")
    exported = load_file(f"{out}/hf/model.safetensors")
    found["exported"] = all(
        torch.equal(plain(piece.param)[piece.local_index].cpu(), exported[piece.hf_name][piece.hf_index])
        for piece in trainer.pieces
    )

    inside = torch.cuda.memory_allocated()
    trainer.offload()
    trainer.offload(parameters=True)
    found["stays"] = torch.cuda.memory_allocated() / inside
    trainer.onload()
    found["came_back"] = all(torch.equal(plain(p).cpu(), v) for p, v in zip(parameters, values))
    found["same_after"] = bool((trainer.logprobs(batch)[0] == after).all())

    trainer.save(f"{out}/checkpoint", "{}")
    trainer.train(batch, LossSettings(), lr=1e-2)
    trainer.load(f"{out}/checkpoint")
    found["loaded"] = bool((trainer.logprobs(batch)[0] == after).all())
    trainer.close()
    return found


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bf16_checkpoint(tmp_path_factory.mktemp("model"), HF_CONFIG, 0.05)


def recipes() -> list[str]:
    return ["mxfp8", "current"] if HERE >= (10, 0) else ["current", *(["blockwise"] if HERE == (9, 0) else [])]


@pytest.mark.parametrize("recipe", recipes())
def test_from_checkpoint_to_export_and_back(model_dir: str, tmp_path: Path, recipe: str) -> None:
    script = (
        "import importlib.util, json\n"
        f"spec = importlib.util.spec_from_file_location('job', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"print('RESULT ' + json.dumps(module.job({model_dir!r}, {str(tmp_path)!r}, {recipe!r})), flush=True)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/megatron")])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("RESULT "))
    print(found)
    assert found["quantised"] == 2 * (2 + 2 * 4)  # the two inner layers: qkv, proj, and fc1 and fc2 of four experts
    assert found["masters"] and found["whole"] > 10 and found["finite"]
    assert found["reference"] and found["stepped"] and not found["skipped"] and found["grad_norm"] > 0
    assert found["policy_back"] and found["exported"]
    assert found["stays"] < 0.05 and found["came_back"] and found["same_after"] and found["loaded"]
