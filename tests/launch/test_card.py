"""A run meant for a GPU says so in one line where there is none, and starts nothing; a dry run does not mind."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarubric.cli import main
from megarubric.errors import BadInput
from megarubric.launch import plan
from megarubric.megatron.messages import WorkerConfig

CONFIG = Path(__file__).parents[2] / "configs/qwen3_30b_a3b_stage1.yaml"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "on_gpu", lambda: False)


def test_a_run_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIG.parents[1])
    assert main(["train", str(CONFIG), f"runs_dir={tmp_path}/runs"]) == 2
    line = capsys.readouterr().err.strip()
    assert (
        line
        == f"megarubric train: {CONFIG}: parallel.card: is h100, and this host has no GPU; --dry-run plans without one"
    )
    assert not (tmp_path / "runs").exists()
    assert main(["train", str(CONFIG), "--dry-run"]) == 0
    assert "a GPU of 80 GB, phase by phase" in capsys.readouterr().out


def test_a_supervised_run_too(tmp_path: Path) -> None:
    from megarubric.sft import run_sft

    path = tmp_path / "sft.yaml"
    path.write_text("name: t\nmodel: {path: m}\ndata: {train: [d.jsonl]}\nparallel: {card: a100}\n")
    with pytest.raises(BadInput, match=r"parallel\.card: is a100, and this host has no GPU"):
        run_sft(str(path), [], fresh=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"card": "h100"}, "trainer: parallel.card: is h100, and this rank sees no GPU"),
        ({"fp8": "current"}, "trainer: fp8: current needs a GPU, and this rank has none"),
        ({"optimizer_offload": True}, "trainer: optimizer_offload: the model is in the host's memory already"),
    ],
)
def test_a_rank_looks_itself(config: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megarubric.megatron import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput) as caught:
        device.check(WorkerConfig(model_dir="m", **config))  # type: ignore[arg-type]
    assert str(caught.value).startswith(words)


def test_a_rank_on_another_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    import torch

    from megarubric.megatron import device

    found = SimpleNamespace(name="NVIDIA B200", total_memory=191 * 10**9, major=10, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    device.check(WorkerConfig(model_dir="m", card="h100"))
    assert "parallel.card is h100, and this GPU is another one: NVIDIA B200 (sm_100, 191 GB)" in caplog.text
    with pytest.raises(BadInput, match="blockwise is for sm_90 cards, this GPU is sm_100: use mxfp8"):
        device.check(WorkerConfig(model_dir="m", card="h100", dtype="bfloat16", fp8="blockwise"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="current needs Transformer Engine, which is not installed"):
        device.check(WorkerConfig(model_dir="m", card="h100", dtype="bfloat16", fp8="current"))
    found.major, found.total_memory = 9, 80 * 10**9
    with pytest.raises(BadInput, match=r"parallel\.card: is b200, sm_100, and this GPU is older"):
        device.check(WorkerConfig(model_dir="m", card="b200"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(BadInput, match=r"parallel\.ranks: local rank 1 needs a GPU of its own, this host has 1"):
        device.check(WorkerConfig(model_dir="m"))
