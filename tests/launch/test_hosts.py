"""Which host a process is on, how hosts meet, and an agent's part: real sockets, real keys, real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from megarubric.config import load_train
from megarubric.errors import BadInput
from megarubric.launch import hosts, plan, remote
from megarubric.launch.hosts import HostCard, Place
from megarubric.rollout.messages import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
SLURM = ("JOB_ID", "NNODES", "JOB_NUM_NODES", "STEP_NUM_NODES", "STEP_NUM_TASKS", "STEP_ID", "NODEID", "RESTART_COUNT")


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that speaks of no hosts."""
    for name in (*(f"SLURM_{n}" for n in SLURM), hosts.NODE, hosts.SESSION, hosts.ADDRESS, "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_host_needs_no_environment(env: pytest.MonkeyPatch) -> None:
    assert hosts.here(1) == Place(0, 1, "")
    env.setenv("SLURM_JOB_ID", "7")
    env.setenv("SLURM_NNODES", "1")
    assert hosts.here(1) == Place(0, 1, "")
    env.setenv("SLURM_NNODES", "4")  # one node's step of a larger job
    env.setenv("SLURM_STEP_NUM_NODES", "1")
    assert hosts.here(1) == Place(0, 1, "")


def test_a_place_under_slurm(env: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "7", "STEP_NUM_NODES": "2", "NODEID": "1", "STEP_ID": "0"}.items():
        env.setenv(f"SLURM_{name}", value)
    assert hosts.here(2) == Place(1, 2, "7.0.0")
    env.setenv("SLURM_RESTART_COUNT", "3")  # requeued: another session
    assert hosts.here(2).session == "7.3.0"


def test_a_place_by_hand(env: pytest.MonkeyPatch) -> None:
    env.setenv(hosts.NODE, "2")
    env.setenv(hosts.SESSION, "monday-1")
    assert hosts.here(4) == Place(2, 4, "monday-1")


@pytest.mark.parametrize(
    ("nodes", "variables", "words"),
    [
        (2, {}, "config: parallel.nodes: one of 2 hosts, but neither Slurm nor MEGARUBRIC_NODE"),
        (1, {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, "Slurm: 2 nodes: and parallel.nodes is 1"),
        (4, {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2"}, "start it with srun --nodes=4"),
        (2, {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "16"}, "Slurm: 16 tasks: on 2 nodes: one a node"),
        (2, {hosts.NODE: "2", hosts.SESSION: "a"}, "'2' is not a host of parallel.nodes 2: 0 to 1"),
        (2, {hosts.NODE: "x", hosts.SESSION: "a"}, "'x' is not a host"),
        (2, {hosts.NODE: "1"}, "MEGARUBRIC_SESSION: must be a word"),
        (2, {hosts.NODE: "1", hosts.SESSION: "../x"}, "MEGARUBRIC_SESSION: must be a word"),
    ],
)
def test_refused_in_one_line(env: pytest.MonkeyPatch, nodes: int, variables: dict[str, str], words: str) -> None:
    for name, value in variables.items():
        env.setenv(name, value)
    with pytest.raises(BadInput) as refused:
        hosts.here(nodes)
    assert words in str(refused.value)


def test_the_own_address(env: pytest.MonkeyPatch) -> None:
    assert hosts.own_address("lo") == "127.0.0.1"
    with pytest.raises(BadInput, match=r"parallel.interface: nothing0 has no IPv4 address here; with one: .*lo"):
        hosts.own_address("nothing0")
    assert hosts.network_environment("127.0.0.1", None) == {
        hosts.ADDRESS: "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    env.setenv("GLOO_SOCKET_IFNAME", "mine")
    assert hosts.network_environment("127.0.0.1", "lo")["GLOO_SOCKET_IFNAME"] == "mine"
    env.setenv(hosts.ADDRESS, "10.1.2.3")
    assert hosts.own_address("lo") == "10.1.2.3"


def test_a_reserved_port_is_given_to_nobody_else_and_can_be_bound() -> None:
    reserved = hosts.reserve_ports("127.0.0.1", 8)
    ports = [held.getsockname()[1] for held in reserved]
    others = hosts.reserve_ports("127.0.0.1", 64)
    assert len(set(ports)) == 8 and not set(ports) & {held.getsockname()[1] for held in others}
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.bind(f"tcp://127.0.0.1:{ports[3]}")
    for held in (*reserved, *others):
        held.close()


def test_cards_are_whole_or_absent(tmp_path: Path) -> None:
    place = Place(1, 2, "s")
    assert hosts.read_card(tmp_path, place, 1) is None
    card = HostCard(1, "n1", "127.0.0.1", "tcp://127.0.0.1:5", (7, 8))
    hosts.write_card(tmp_path, place, card)
    assert hosts.read_card(tmp_path, place, 1) == card
    hosts.card_path(tmp_path, place, 1).write_text('{"node": 1}')
    with pytest.raises(BadInput, match=r"host_1\.json"):
        hosts.read_card(tmp_path, place, 1)


# --- an agent and the controller that it serves ---

AGENT = """
import sys
from pathlib import Path
from megarubric.launch import agent
from megarubric.launch.hosts import Place
agent.SILENT_S = float(sys.argv[2])
sys.exit(agent.run_agent(Path(sys.argv[1]), Place(1, 2, "test"), "lo"))
"""


def start_agent(run_dir: Path, silent_s: float = 60) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", AGENT, str(run_dir), str(silent_s)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


async def until(condition, seconds: float = 60) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.05)


def test_an_agent_starts_reports_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WATCH_S", 0.1)
    process = start_agent(tmp_path)

    async def controller() -> None:
        async with remote.meeting(tmp_path, Place(0, 2, "test"), "lo") as fleet:
            assert fleet is not None and len(fleet.others) == 1
            assert stat.S_IMODE(fleet.keys_file.stat().st_mode) == 0o600
            host = fleet.others[0]
            # No such model: a real engine process that ends by itself with one line.
            child, endpoint = host.start_engine("policy-1", EngineConfig(model_dir="nowhere"), 0)
            assert endpoint.startswith("tcp://127.0.0.1:") and child.status() is None
            process.send_signal(signal.SIGUSR1)  # Slurm's warning goes to all hosts: the controller decides
            process.send_signal(signal.SIGTERM)
            await until(lambda: child.status() is not None)
            line = child.status() or ""
            assert line.startswith("host 1 (") and "policy-1 ended with status 2" in line and "nowhere" in line
            assert child.returncode == 2 and "policy-1" in (tmp_path / "logs/processes-host1.json").read_text()
            assert process.poll() is None

    asyncio.run(controller())
    words, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "host 1: done" in words
    assert not (tmp_path / "hosts/test").exists()


def test_an_agent_whose_controller_has_gone_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WATCH_S", 3600)  # a controller that hangs asks nothing
    process = start_agent(tmp_path, silent_s=1)

    async def controller() -> str:
        async with remote.meeting(tmp_path, Place(0, 2, "test"), "lo") as fleet:
            assert fleet is not None
            fleet.others[0].start_engine("policy-1", EngineConfig(model_dir="nowhere"), 0)
            words, _ = await asyncio.to_thread(process.communicate, timeout=60)
            return words

    monkeypatch.setattr(remote.RemoteHost, "end", lambda self: asyncio.sleep(0))
    assert "host 0 has been silent for 1 s" in asyncio.run(controller())
    assert process.returncode != 0


def test_a_host_that_is_lost_ends_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WATCH_S", 0.1)
    monkeypatch.setattr(remote, "SILENT_S", 1.0)
    process = start_agent(tmp_path)

    async def controller() -> str:
        async with remote.meeting(tmp_path, Place(0, 2, "test"), "lo") as fleet:
            assert fleet is not None
            child, _ = fleet.others[0].start_engine("policy-1", EngineConfig(model_dir="nowhere"), 0)
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: child.status() is not None)
            return child.status() or ""

    monkeypatch.setattr(remote.RemoteHost, "end", lambda self: asyncio.sleep(0))
    line = asyncio.run(controller())
    process.communicate(timeout=30)
    assert "policy-1" in line and ("has not answered for 1 s" in line or "no answer within 1 s" in line)


def test_hosts_that_do_not_come_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MEET_S", 0.3)

    async def controller() -> None:
        async with remote.meeting(tmp_path, Place(0, 3, "test"), "lo"):
            pass

    with pytest.raises(Exception, match=r"hosts 1, 2 of 3 did not come within 0.3 s"):
        asyncio.run(controller())
    assert not (tmp_path / "hosts/test").exists()


def test_a_verb_without_a_trainer_takes_one_hosts_share_of_the_engines() -> None:
    config = load_train(str(ROOT / "configs/qwen3_30b_a3b_stage2.yaml"), [])
    alone = plan.on_one_host(config)
    assert (config.rollout.engines, config.judge.engines, config.parallel.nodes) == (8, 8, 4)
    assert (alone.rollout.engines, alone.judge.engines) == (2, 2)
    assert plan.on_one_host(load_train(str(ROOT / "configs/quickstart.yaml"), [])).rollout.engines == 1
