"""How an engine process starts, refuses to start, and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq


def write_config(path: Path, **settings: object) -> Path:
    path.write_text(json.dumps(settings))
    return path


def start(config: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megarubric.rollout.engine", "--endpoint", endpoint, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_dir": "/nowhere/model"}, "/nowhere/model: config.json: No such file or directory"),
        ({"model_dir": "."}, ".: config.json: No such file or directory"),
        ({"model_dir": "m", "mdoel": 1}, "unknown field `mdoel`"),
        ({"role": "policy"}, "missing required field `model_dir`"),
        ({"model_dir": "m", "max_model_len": 0}, "max_model_len is 0, needs at least 1"),
        ({"model_dir": "m", "dtype": "int8"}, "Invalid enum value 'int8'"),
    ],
)
def test_a_bad_configuration_is_one_line_and_status_2(tmp_path, socket_directory, monkeypatch, settings, reason):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.chdir(tmp_path)
    result = start(write_config(tmp_path / "engine.json", **settings), f"ipc://{socket_directory}/e")
    assert result.returncode == 2
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_configuration_that_is_not_there(tmp_path, socket_directory):
    result = start(tmp_path / "none.json", f"ipc://{socket_directory}/e")
    assert result.returncode == 2
    assert result.stderr == f"engine: {tmp_path}/none.json: No such file or directory\n"


def test_a_port_in_use_is_one_line(tmp_path, tiny_models, socket_directory):
    context = zmq.Context()
    taken = context.socket(zmq.ROUTER)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    config = write_config(tmp_path / "engine.json", model_dir=str(tiny_models[0]), max_model_len=256)
    result = start(config, f"tcp://127.0.0.1:{port}")
    assert result.returncode == 2 and "CURVE keys" in result.stderr
    from megarubric.exchange.rpc import CurveKeys

    CurveKeys.generate().save(tmp_path / "keys")
    command = ["--endpoint", f"tcp://127.0.0.1:{port}", "--config", str(config), "--keys", str(tmp_path / "keys")]
    result = subprocess.run(
        [sys.executable, "-m", "megarubric.rollout.engine", *command], capture_output=True, text=True, timeout=120
    )
    taken.close()
    context.term()
    assert result.returncode == 2
    assert result.stderr.startswith(f"engine: cannot bind tcp://127.0.0.1:{port}: Address already in use")
    assert result.stderr.count("\n") == 1


@pytest.mark.engine
def test_a_model_that_vllm_cannot_load_ends_with_one_line(tmp_path, tiny_models, socket_directory):
    """Weights of another shape than config.json says."""
    broken = tmp_path / "model"
    broken.mkdir()
    for path in tiny_models[0].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "vocab_size": 640}))
    result = start(
        write_config(tmp_path / "engine.json", model_dir=str(broken), max_model_len=256, kv_cache_gib=0.05),
        f"ipc://{socket_directory}/e",
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"engine: {broken}: the engine cannot start: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_model_len": 4096}, "max_model_len: 4096, the model reads 1024 tokens"),
        ({"max_model_len": 256, "kv_cache_gib": 1e6}, "engine config: kv_cache_gib: 1e+06 GiB, this machine has"),
        ({"max_model_len": 256, "device": "cuda"}, "engine config: device: cuda, but vLLM is built for cpu"),
    ],
)
def test_what_cannot_run_is_refused_before_vllm_is_loaded(tmp_path, tiny_models, socket_directory, settings, reason):
    result = start(
        write_config(tmp_path / "engine.json", model_dir=str(tiny_models[0]), **settings),
        f"ipc://{socket_directory}/e",
    )
    assert result.returncode == 2
    assert reason in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.engine
def test_the_engine_dies_with_its_parent(tmp_path, tiny_models, socket_directory):
    """Not even kill -9 of whoever started it leaves an engine behind."""
    config = write_config(tmp_path / "engine.json", model_dir=str(tiny_models[0]), max_model_len=256)
    command = [sys.executable, "-m", "megarubric.rollout.engine", "--config", str(config)]
    command += ["--endpoint", f"ipc://{socket_directory}/e"]
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys, time\n"
         "p = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
         "print(p.pid, flush=True)\ntime.sleep(600)", *command],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while not (socket_directory / "e").exists():  # past the point where it asked to die with its parent
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    for _ in range(200):
        try:
            state = Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(engine, signal.SIGKILL)
        pytest.fail("the engine outlived its parent by 10 s")
