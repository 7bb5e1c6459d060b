"""Checkpoints: 2 + 2 steps are 4 steps bit for bit, and what is not whole is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import grpo_batch, write_config

HF_CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def make_trainer(model_dir: str, **config: Any) -> Any:
    from megarubric.megatron.messages import WorkerConfig
    from megarubric.megatron.trainer import Trainer

    config = {"micro_batch_tokens": 64, "shm_prefix": f"mrckpt-{os.getppid()}", "weight_decay": 0.1} | config
    return Trainer(WorkerConfig(model_dir=model_dir, init="random", timeout_s=60, **config))


def steps(trainer: Any, first: int, last: int) -> list[dict[str, Any]]:
    """Train on the batches number `first` to `last` - 1."""
    import msgspec

    from megarubric.recipe.algorithms import algorithm

    metrics = []
    for number in range(first, last):
        batch = grpo_batch(number, HF_CONFIG["vocab_size"])
        metrics += [msgspec.to_builtins(u) for u in trainer.train(batch, algorithm("grpo").settings(), 1e-3)]
    return metrics


def straight(model_dir: str, path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Four steps in one go, a checkpoint after two of them, and one of step 0."""
    trainer = make_trainer(model_dir, **config)
    trainer.save(path + "-0", "{}")
    first = steps(trainer, 0, 2)
    nbytes = trainer.save(path, '{"position": 2}')
    last = steps(trainer, 2, 4)
    result = {"metrics": first + last, "checksum": trainer.sender.checksum(), "steps": trainer.steps, "nbytes": nbytes}
    trainer.barrier()
    trainer.close()
    return result


def resumed(model_dir: str, path: str, config: dict[str, Any]) -> dict[str, Any]:
    """A new process: first another history, so that nothing but the checkpoint can explain equality."""
    import torch

    trainer = make_trainer(model_dir, **config)
    steps(trainer, 7, 8)
    extra = trainer.load(path)
    drawn = torch.rand(3).tolist()
    last = steps(trainer, 2, 4)
    result = {"metrics": last, "checksum": trainer.sender.checksum(), "steps": trainer.steps, "extra": extra}
    trainer.load(path)
    result["same_draws"] = torch.rand(3).tolist() == drawn
    trainer.load(path + "-0")
    result["from_zero"] = steps(trainer, 0, 2)
    trainer.barrier()
    trainer.close()
    return result


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("model"), HF_CONFIG)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("world", "config"),
    [(1, {"dtype": "bfloat16"}), (2, {"ep": 2}), (2, {"pp": 2})],
    ids=["one rank bf16", "EP2", "PP2"],
)
def test_two_and_two_steps_are_four_bit_for_bit(ranks, model_dir, tmp_path, world, config):
    path = str(tmp_path / "step_2")
    whole = ranks(world, straight, model_dir=model_dir, path=path, config=config)[0]
    again = ranks(world, resumed, model_dir=model_dir, path=path, config=config)[0]
    assert again["metrics"] == whole["metrics"][2:]
    assert again["from_zero"] == whole["metrics"][:2]
    assert again["checksum"] == whole["checksum"]
    assert again["steps"] == whole["steps"] == 4
    assert json.loads(again["extra"]) == {"position": 2} and again["same_draws"]
    files = Path(path).rglob("*")
    assert whole["nbytes"] == sum(f.stat().st_size for f in files if f.is_file() and f.name != "manifest.json")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []  # no partial directory stays


# ------------------------------------------------------------------------------------------------- in the background


def saved_while_training(model_dir: str, path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Two steps, a save begun, two more steps before it is finished; then one that is begun and never finished."""
    trainer = make_trainer(model_dir, **config)
    first = steps(trainer, 0, 2)
    trainer.begin_save(path, '{"position": 2}')
    there = Path(path).exists()
    last = steps(trainer, 2, 4)
    while (saved := trainer.finish_save(wait=False)) is None:
        pass
    nothing = trainer.finish_save(wait=True)
    trainer.begin_save(path + "-never", "{}")
    trainer.barrier()
    result = {
        "metrics": first + last,
        "checksum": trainer.sender.checksum(),
        "early": there,
        "saved": list(saved),
        "nothing": nothing,
    }
    trainer.barrier()
    trainer.close()
    return result


@pytest.mark.engine
@pytest.mark.parametrize(("world", "config"), [(1, {"dtype": "bfloat16"}), (2, {"ep": 2})], ids=["one rank", "EP2"])
def test_a_save_in_the_background_has_the_state_of_its_beginning(ranks, model_dir, tmp_path, world, config):
    path = str(tmp_path / "step_2")
    whole = ranks(world, saved_while_training, model_dir=model_dir, path=path, config=config)[0]
    assert not whole["early"] and whole["saved"][0] == path and whole["nothing"] is None
    assert not Path(path + "-never").exists()  # no checkpoint before it is finished
    shutil.copytree(path, path + "-0")
    again = ranks(world, resumed, model_dir=model_dir, path=path, config=config)[0]
    assert again["metrics"] == whole["metrics"][2:] and again["checksum"] == whole["checksum"]
    assert json.loads(again["extra"]) == {"position": 2}


# ------------------------------------------------------------------------------------------------------ resharding


def saved_on(model_dir: str, path: str, config: dict[str, Any]) -> dict[str, Any]:
    trainer = make_trainer(model_dir, **config)
    steps(trainer, 0, 2)
    trainer.save(path, "{}")
    last = steps(trainer, 2, 5)
    trainer.export_hf(path + "-end")
    trainer.barrier()
    trainer.close()
    return {"metrics": last}


def loaded_on(model_dir: str, path: str, config: dict[str, Any], again: str) -> dict[str, Any]:
    """On another layout: another history first, then the checkpoint, saved again at once, then the same three steps."""
    trainer = make_trainer(model_dir, **config)
    steps(trainer, 7, 8)
    trainer.load(path)
    trainer.save(again, "{}")
    last = steps(trainer, 2, 5)
    trainer.export_hf(again + "-end")
    trainer.barrier()
    trainer.close()
    return {"metrics": last, "steps": trainer.steps}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "DP2": (2, {}),
    "EP2": (2, {"ep": 2}),
    "PP2": (2, {"pp": 2}),
    "TP2": (2, {"tp": 2}),
    "EP2xPP2": (4, {"ep": 2, "pp": 2}),
    "CP2xEP2": (2, {"cp": 2, "ep": 2}),
}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("EP2", "PP2"),
        ("PP2", "EP2"),
        ("EP2xPP2", "TP2"),
        ("TP2", "one rank"),
        ("one rank", "DP2"),
        ("CP2xEP2", "one rank"),
    ],
    ids=lambda name: name,
)
def test_another_layout_goes_on_with_the_same_numbers(ranks, model_dir, tmp_path, first, second):
    from safetensors.numpy import load_file

    path, again = str(tmp_path / "a"), str(tmp_path / "b")
    world, config = LAYOUTS[first]
    whole = ranks(world, saved_on, model_dir=model_dir, path=path, config=config)[0]
    world, config = LAYOUTS[second]
    resumed = ranks(world, loaded_on, model_dir=model_dir, path=path, config=config, again=again)[0]
    assert resumed["steps"] == 5
    for ours, theirs in zip(resumed["metrics"], whole["metrics"], strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    ends = [load_file(Path(f"{p}-end") / "model.safetensors") for p in (path, again)]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert np.allclose(tensor, ends[1][name], rtol=1e-4, atol=2e-6), name
    assert optimizer_tensors(path) == optimizer_tensors(again)  # what was loaded is what was saved, to the last bit


def optimizer_tensors(path: str) -> dict[str, str]:
    """A digest of every master and moment in a checkpoint, read by torch's own reader, without Megatron."""
    import hashlib

    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(Path(path) / "weights")
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith("optimizer.") and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    vocabulary = HF_CONFIG["vocab_size"]  # rows behind it pad it on some layouts
    cut = {name: tensor[:vocabulary] if "word_embeddings" in name else tensor for name, tensor in state.items()}
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in cut.items()}


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def saved(ranks, model_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "step_2"
    ranks(1, straight, model_dir=model_dir, path=str(path), config={})
    return path


def load_each(model_dir: str, paths: list[str], config: dict[str, Any]) -> list[str]:
    """What loading each path says; the trainer must be as it was after all of them."""
    from megarubric.errors import BadInput

    trainer = make_trainer(model_dir, **config)
    before = trainer.sender.checksum()
    said = []
    for path in paths:
        try:
            trainer.load(path)
            said.append("loaded")
        except BadInput as error:
            said.append(str(error))
    unchanged = trainer.sender.checksum() == before
    trainer.barrier()
    trainer.close()
    return [*said, str(unchanged)]


def broken(saved: Path, place: Path) -> dict[str, Path]:
    """Copies of a good checkpoint, each with one fault."""
    copies = {}
    for name in ("flipped", "short", "gone", "unmarked", "future", "foreign"):
        copies[name] = shutil.copytree(saved, place / name)
    data = next(copies["flipped"].glob("weights/*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    data = copies["short"] / "weights" / data.name
    data.write_bytes(data.read_bytes()[:-10])
    (copies["gone"] / "extra.json").unlink()
    (copies["unmarked"] / "manifest.json").unlink()
    manifest = copies["future"] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))

    class Command:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    foreign = copies["foreign"] / "weights" / ".metadata"
    foreign.write_bytes(pickle.dumps(Command()))
    manifest = copies["foreign"] / "manifest.json"
    written = json.loads(manifest.read_text())
    import xxhash

    written["files"]["weights/.metadata"] = {
        "nbytes": foreign.stat().st_size,
        "xxh3_128": xxhash.xxh3_128(foreign.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(written))
    return copies


@pytest.mark.engine
def test_what_is_not_whole_is_refused_by_name(ranks, model_dir, saved, tmp_path):
    from megarubric.errors import BadInput
    from megarubric.megatron.checkpoint import check

    copies = broken(saved, tmp_path)
    paths = [str(p) for p in copies.values()]
    (said,) = ranks(1, load_each, model_dir=model_dir, paths=paths, config={})
    flipped, short, gone, unmarked, future, foreign, unchanged = said
    assert unchanged == "True"
    assert flipped.startswith(f"{copies['flipped']}: weights/__0_") and "is corrupt" in flipped
    assert short.startswith(f"{copies['short']}: weights/__0_") and "bytes, the manifest says" in short
    assert gone == f"{copies['gone']}: extra.json: is missing"
    assert unmarked == f"{copies['unmarked']}: manifest.json: is missing: the checkpoint is incomplete"
    assert future == f"{copies['future']}: manifest.json: has format 99, this version reads 2"
    assert "weights/.metadata: is refused: names posix.system" in foreign

    assert check(saved).steps == 2
    for name in ("flipped", "short", "gone", "unmarked", "future"):  # the controller asks without any rank
        with pytest.raises(BadInput):
            check(copies[name])


@pytest.mark.engine
def test_another_dtype_is_refused(ranks, model_dir, saved, tmp_path):
    for said in ranks(1, load_each, model_dir=model_dir, paths=[str(saved)], config={"dtype": "bfloat16"}):
        assert said == [f"{saved}: dtype: is float32, this run's is bfloat16", "True"]


def save_with_little_room(model_dir: str, path: str, limit: int) -> dict[str, Any]:
    """Save where every file ends at `limit` bytes (RLIMIT_FSIZE stands in for a disk that fills up while writing)."""
    import resource

    from megarubric.errors import BadInput

    trainer = make_trainer(model_dir)
    trainer.save(path, '{"good": 1}')
    said = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for target, extra in ((path + "-next", "{}"), (path, "{}"), (path + "-x", "not json")):
        try:
            trainer.save(target, extra)
            said.append("saved")
        except BadInput as error:
            said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    extra = trainer.load(path)
    trainer.save(path + "-next", "{}")
    trainer.close()
    return {"said": said, "extra": extra, "left": sorted(p.name for p in Path(path).parent.iterdir())}


@pytest.mark.engine
def test_a_full_disk_leaves_the_old_checkpoint_and_no_partial_one(ranks, model_dir, tmp_path):
    path = str(tmp_path / "step_1")
    (got,) = ranks(1, save_with_little_room, model_dir=model_dir, path=path, limit=100_000)
    full, taken, not_json = got["said"]
    assert full == f"{path}-next: cannot be written: a rank could not write its weights; is the disk full?"
    assert taken == f"{path}: cannot be written: exists already"
    assert not_json.startswith(f"{path}-x: cannot be written: ")
    assert got["extra"] == '{"good": 1}'
    assert got["left"] == ["step_1", "step_1-next"]
