"""What --dry-run says of the shipped configurations, and of layouts that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarubric.cli import main
from megarubric.config import load_train
from megarubric.launch import plan

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = ["qwen3_30b_a3b_stage1", "qwen3_30b_a3b_stage2", "qwen3_235b_a22b"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_fit_their_devices(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"configs/{name}.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "not there; model.architecture is read instead" in out
    assert out.count("  fits  (") == 3 and "DOES NOT FIT" not in out
    config = load_train(f"configs/{name}.yaml")
    assert out.count("trainer-") == config.parallel.ranks
    assert config.rollout.engines * config.rollout.tensor_parallel == config.parallel.ranks
    if config.judge.kind == "frozen":  # no device is idle while answers are judged
        assert config.judge.engines * config.judge.tensor_parallel == config.parallel.ranks
        assert out.count("/logs/judge-") == config.judge.engines


def test_two_judges_on_one_gpu_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    for engines, words in (
        (2, "DOES NOT FIT: 32.2 GB too much  (policy 45% of the device, both judges 90%, two buckets)"),
        (1, "fits"),
    ):
        overrides = [f"judge.engines={engines}", "judge.second=Qwen3-30B-A3B"]
        assert main(["train", "configs/qwen3_30b_a3b_stage1.yaml", *overrides, "--dry-run"]) == 0
        line = next(n for n in capsys.readouterr().out.splitlines() if n.startswith("write and judge"))
        assert words in line, line


def test_what_lies_in_a_hosts_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "configs/qwen3_30b_a3b_stage1.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("    0 ")).split()
    said = float(next(line for line in out.splitlines() if line.startswith("a host's memory")).split()[3])
    assert said == pytest.approx(8 * (float(row[2]) + float(row[4]) + float(row[-1])), abs=0.2) and said > 500


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["train.optimizer_offload=false", "train.micro_batch_tokens=32768", "rollout.tensor_parallel=1"]
    assert main(["train", "configs/qwen3_30b_a3b_stage1.yaml", *changes, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "train" in out and "GB too much" in out
    assert "KV cache         DOES NOT FIT: the policy's weights are 61.1 GB a GPU" in out


BAD_LAYOUTS = [
    (["parallel.ranks=6", "parallel.ep=1", "parallel.tp=4"], "parallel.tp * cp * pp: 6 ranks cannot be divided"),
    (["parallel.ep=3"], "parallel.etp * ep * pp: 8 ranks cannot be divided by etp 1 * ep 3 * pp 1 = 3"),
    (["parallel.ranks=24", "parallel.ep=1", "parallel.tp=3"], "32 attention heads cannot be divided by tp 3"),
    (["parallel.ranks=40", "parallel.ep=5"], "parallel.ep: 128 experts cannot be divided by ep 5"),
    (["parallel.ranks=40", "parallel.ep=8", "parallel.pp=5"], "parallel.pp: 48 layers cannot be divided by pp 5"),
    (["parallel.pp=2", "parallel.ep=4", "parallel.vpp=2"], "parallel.vpp: interleaving needs pp of at least 3, not 2"),
    (["parallel.pp=4", "parallel.ep=2", "parallel.vpp=1"], "parallel.vpp: counts the chunks of a pipeline rank"),
    (["parallel.pp=4", "parallel.ep=2", "parallel.vpp=5"], "parallel.pp: 48 layers cannot be divided by pp 4 * vpp 5"),
    (["parallel.ranks=40", "parallel.ep=8", "parallel.etp=5"], "moe_intermediate_size 768 cannot be divided by etp 5"),
    (["parallel.cp=0"], "parallel.cp: must be"),
    (["parallel.ranks=12", "parallel.ep=4", "parallel.tp=12"], "32 attention heads cannot be divided by tp 12"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD_LAYOUTS, ids=[" ".join(c) for c, _ in BAD_LAYOUTS])
def test_layouts_that_cannot_be(changes: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "configs/qwen3_30b_a3b_stage1.yaml", *changes, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_engines_get_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "on_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [plan.engine_devices(i, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,5")
    assert plan.engine_devices(1, 1) == {"CUDA_VISIBLE_DEVICES": "7"}
    with pytest.raises(plan.BadInput, match="engine 1 of 2 needs more than the 3 visible"):
        plan.engine_devices(1, 2)


def test_weights_stay_on_the_devices_that_ranks_and_engines_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def through(*overrides: str) -> str:
        return plan.train_worker_config(load_train("configs/smoke.yaml", list(overrides))).exchange_through

    monkeypatch.setattr(plan, "on_gpu", lambda: False)
    assert through() == "host"
    assert plan.engine_config(load_train("configs/smoke.yaml", []), "policy").staging == "host"
    with pytest.raises(plan.BadInput, match=r"exchange.through: is device, and this host has no GPU"):
        through("exchange.through=device")
    monkeypatch.setattr(plan, "on_gpu", lambda: True)
    assert through() == "device"
    assert plan.engine_config(load_train("configs/smoke.yaml", []), "policy").staging == "direct"
    assert through("exchange.through=host") == through("rollout.engines=9") == through("exchange.delta=true") == "host"
