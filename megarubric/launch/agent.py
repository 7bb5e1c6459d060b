"""The agent: what ``megarubric train`` becomes on every host but the first (docs/hosts.md).

It starts trainer ranks and engines on its host when the controller tells it to, says which of them have ended, and ends
them all when it is told to, or when the controller has been silent for `SILENT_S`. Requests are settings of those two
kinds of process, nothing else: no command line and no code crosses the wire, which is encrypted with the run's keys.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import msgspec

from megarubric.errors import BadInput, MegarubricError, ProcessDied
from megarubric.exchange.rpc import Call, CurveKeys, Server
from megarubric.launch import hosts
from megarubric.launch.hosts import HostCard, Place
from megarubric.launch.local import LocalHost
from megarubric.launch.supervisor import Supervisor
from megarubric.megatron.messages import WorkerConfig
from megarubric.observe.terminal import say
from megarubric.rollout.messages import EngineConfig

MEET_S = 600.0  # how long hosts wait for each other at the start
SILENT_S = 180.0  # a controller that asks nothing for so long has gone
_IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # Slurm sends them to every host; the controller decides


class StartRank(msgspec.Struct, frozen=True, tag=True):
    """Start trainer rank `rank` of `world`, the `local_rank`-th here; rank 0 listens at `master_address`:`port`."""

    name: str
    config: WorkerConfig
    rank: int
    world: int
    local_rank: int
    master_address: str
    port: int


class StartEngine(msgspec.Struct, frozen=True, tag=True):
    """Start an engine that serves on `endpoint`, the `index`-th of its kind here."""

    name: str
    config: EngineConfig
    endpoint: str
    index: int


class Watch(msgspec.Struct, frozen=True, tag=True):
    """Say which processes have ended. Asked about once a second: also the sign that the controller lives."""


class End(msgspec.Struct, frozen=True, tag=True):
    """End all processes, then this one."""


class EndedProcess(msgspec.Struct, frozen=True):
    """A process that ended: its status (negative: the signal) and the line that `Child.status` gives."""

    name: str
    returncode: int
    line: str


class Watched(msgspec.Struct, frozen=True, tag=True):
    """The processes of this host that have ended."""

    ended: tuple[EndedProcess, ...] = ()


Request = StartRank | StartEngine | Watch | End
Reply = Watched


class Agent:
    """Serves requests for one host; `interface` as in ``parallel.interface``."""

    def __init__(self, run_dir: Path, place: Place, keys: Path, interface: str | None) -> None:
        self.address = hosts.own_address(interface)
        supervisor = Supervisor(run_dir / "logs", f"processes-host{place.node}.json")
        network = hosts.network_environment(self.address, interface)
        self.host = LocalHost(supervisor, f"trainer-host{place.node}.json", keys, network)
        self._reserved = hosts.reserve_ports(self.address, hosts.ENGINE_PORTS)
        self.server: Server[Request] = Server(f"tcp://{self.address}:*", Request, CurveKeys.load(keys))
        ports = tuple(int(held.getsockname()[1]) for held in self._reserved)
        card = HostCard(place.node, socket.gethostname(), self.address, self.server.endpoint, ports)
        hosts.write_card(run_dir, place, card)

    def serve(self) -> None:
        """Until told to end. Raises ProcessDied when the controller has gone."""
        heard, limit = time.monotonic(), MEET_S
        while True:
            call = self.server.receive(1.0)
            if call is not None:
                heard, limit = time.monotonic(), SILENT_S
                if self._answer(call):
                    return
            elif time.monotonic() - heard > limit:
                raise ProcessDied(f"host 0 has been silent for {limit:g} s: its controller has ended or hangs")

    def _answer(self, call: Call) -> bool:
        """Answer one request; True when it was the last."""
        body = call.body
        try:
            if isinstance(body, StartRank):
                self.host.start_rank(
                    body.name,
                    body.config,
                    "none",  # only rank 0 answers a controller, and it is never here
                    rank=body.rank,
                    world=body.world,
                    local_rank=body.local_rank,
                    master=(body.master_address, body.port),
                )
            elif isinstance(body, StartEngine):
                self.host.start_engine(body.name, body.config, body.endpoint, body.index)
            elif isinstance(body, End):
                self.host.stop()
        except (MegarubricError, OSError) as error:
            call.fail(error)
            return False
        call.reply(Watched(tuple(EndedProcess(*found) for found in self.host.supervisor.all_ended())))
        return isinstance(body, End)

    def close(self) -> None:
        self.host.stop()
        for held in self._reserved:
            held.close()
        self.server.close()


def run_agent(run_dir: Path, place: Place, interface: str | None) -> int:
    """This host's part in a run whose controller is on host 0; the exit status, 0 when the run ended by itself.

    Raises BadInput when host 0 does not come to the meeting, ProcessDied when it goes away.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    say(f"host {place.node} of {place.nodes} ({socket.gethostname()}): waiting for the controller on host 0")
    keys = hosts.session_dir(run_dir, place) / "keys"
    deadline = time.monotonic() + MEET_S
    while not _there(keys):
        if time.monotonic() > deadline:
            raise BadInput(keys, None, f"host 0 did not write it within {MEET_S:g} s")
        time.sleep(0.2)
    agent = Agent(run_dir, place, keys, interface)
    try:
        say(f"host {place.node}: serving the controller at {agent.address}")
        agent.serve()
    finally:
        agent.close()
    say(f"host {place.node}: done")
    return 0


def _there(path: Path) -> bool:
    """Whether the file exists, as its directory says: a network file system may remember that it did not."""
    with contextlib.suppress(FileNotFoundError):
        return path.name in os.listdir(path.parent)
    return False
