"""The other hosts of a run as the controller sees them: an agent each, and what it has started."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from megarubric.errors import MegarubricError, ProcessDied
from megarubric.exchange.rpc import Client, CurveKeys
from megarubric.launch import agent, hosts
from megarubric.launch.agent import MEET_S, SILENT_S
from megarubric.launch.hosts import HostCard, Place
from megarubric.megatron.messages import WorkerConfig
from megarubric.observe.terminal import say
from megarubric.rollout.messages import EngineConfig

WATCH_S = 1.0
_LOST = 1000  # as a return code: sorts behind every process that is known to have ended


class RemoteChild:
    """A process on another host, as its agent last told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.returncode: int | None = None
        self._line = ""

    def status(self) -> str | None:
        """None while it lives, else one line, as `Child.status`."""
        return None if self.returncode is None else self._line

    def ended(self, returncode: int, line: str) -> None:
        """Note how it ended; the first word counts."""
        if self.returncode is None:
            self.returncode, self._line = returncode, line


class RemoteHost:
    """One agent. Processes are started without waiting: a start that fails is a process that has ended."""

    def __init__(self, card: HostCard, keys: CurveKeys) -> None:
        self.card = card
        self.children: list[RemoteChild] = []
        self.name = f"host {card.node} ({card.hostname})"
        self._client = Client(card.endpoint, agent.Reply, keys)
        self._ports = iter(card.ports)
        self._tasks: set[asyncio.Task[None]] = {asyncio.create_task(self._watch())}

    def start_rank(
        self, name: str, config: WorkerConfig, rank: int, world: int, local_rank: int, master: tuple[str, int]
    ) -> RemoteChild:
        """`master`: address and port at which rank 0 listens."""
        return self._start(agent.StartRank(name, config, rank, world, local_rank, *master))

    def start_engine(self, name: str, config: EngineConfig, index: int) -> tuple[RemoteChild, str]:
        """The process, and the endpoint on which it will serve."""
        endpoint = f"tcp://{self.card.address}:{next(self._ports)}"
        return self._start(agent.StartEngine(name, config, endpoint, index)), endpoint

    def _start(self, body: agent.StartRank | agent.StartEngine) -> RemoteChild:
        child = RemoteChild(body.name)
        self.children.append(child)
        self._spawn(self._ask(body, child))
        return child

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, body: agent.StartRank | agent.StartEngine, child: RemoteChild) -> None:
        try:
            await self._client.call(body, timeout_s=SILENT_S)
        except (MegarubricError, TimeoutError) as error:
            child.ended(1, f"{child.name} could not be started on {self.name}: {error}")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                reply, _ = await self._client.call(agent.Watch(), timeout_s=SILENT_S)
            except (MegarubricError, TimeoutError):
                for child in self.children:
                    child.ended(_LOST, f"{self.name} has not answered for {SILENT_S:g} s, and {child.name} was there")
                return
            for ended in reply.ended:
                for child in self.children:
                    if child.name == ended.name:
                        child.ended(ended.returncode, f"{self.name}: {ended.line}")

    async def end(self) -> None:
        """Have the agent end its processes and itself."""
        with contextlib.suppress(Exception):
            await self._client.call(agent.End(), timeout_s=20)
        for task in list(self._tasks):
            task.cancel()
        await self._client.close()


class Fleet:
    """The other hosts, in order, and what host 0 needs to deal with them. A run of one host has none."""

    def __init__(self, keys_file: Path, keys: CurveKeys, address: str, interface: str | None) -> None:
        self.keys_file, self.keys, self.address, self.interface = keys_file, keys, address, interface
        self.others: list[RemoteHost] = []

    @property
    def children(self) -> list[RemoteChild]:
        return [child for host in self.others for child in host.children]


@contextlib.asynccontextmanager
async def meeting(run_dir: Path, place: Place, interface: str | None) -> AsyncIterator[Fleet | None]:
    """Wait for the other hosts of `place`'s session; at the end of the block their agents end. None for one host.

    Raises ProcessDied when some do not come within `MEET_S`.
    """
    if place.nodes == 1:
        yield None
        return
    directory = hosts.session_dir(run_dir, place)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    keys, path = CurveKeys.generate(), directory / "keys"
    keys.save(path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)  # so that nobody reads half a file
    fleet = Fleet(path, keys, hosts.own_address(interface), interface)
    try:
        for card in await _cards(run_dir, place):
            fleet.others.append(RemoteHost(card, keys))
        yield fleet
    finally:
        await asyncio.gather(*(host.end() for host in fleet.others))
        shutil.rmtree(directory, ignore_errors=True)


async def _cards(run_dir: Path, place: Place) -> list[HostCard]:
    missing = list(range(1, place.nodes))
    cards: dict[int, HostCard] = {}
    began, said = time.monotonic(), False
    while missing:
        for node in missing:
            if (card := hosts.read_card(run_dir, place, node)) is not None:
                cards[node] = card
        missing = [node for node in missing if node not in cards]
        waited = time.monotonic() - began
        if missing and waited > MEET_S:
            raise ProcessDied(f"hosts {_list(missing)} of {place.nodes} did not come within {MEET_S:g} s")
        if missing and waited > 10 and not said:
            said = True
            say(f"waiting for hosts {_list(missing)} of {place.nodes}")
        if missing:
            await asyncio.sleep(0.2)
    return [cards[node] for node in sorted(cards)]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
