"""The running parts of one run: trainer ranks, policy engines, judge; started together, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal

from megarubric.config import TrainConfig
from megarubric.errors import MegarubricError, ProcessDied
from megarubric.exchange.rpc import ipc_endpoint
from megarubric.exchange.update import ExchangeReport, exchange
from megarubric.judging.judge import Judge
from megarubric.launch import hosts, plan
from megarubric.launch.hosts import Place
from megarubric.launch.judge import make_judge
from megarubric.launch.local import LocalHost
from megarubric.launch.remote import Fleet, RemoteChild, meeting
from megarubric.launch.supervisor import Child, Supervisor, free_port
from megarubric.megatron.client import TrainerClient
from megarubric.megatron.messages import WorkerConfig
from megarubric.rollout.client import EngineClient
from megarubric.rollout.messages import EngineConfig

ALONE = Place()


class StartFailed(MegarubricError):
    """A part of the run ended before it was ready; the message has its last words."""


class System:
    """Handles on the processes of a run. `trainer` is None in an evaluation, `policies` is empty when rollouts are
    replayed, `judge` always answers (without a backend it judges by checks and stored judgements only). `fleet` has the
    run's other hosts; without it everything is started here."""

    def __init__(self, supervisor: Supervisor, sockets: Path, fleet: Fleet | None = None) -> None:
        self.supervisor, self.sockets, self.fleet = supervisor, sockets, fleet
        network = hosts.network_environment(fleet.address, fleet.interface) if fleet else None
        self.host = LocalHost(supervisor, keys=fleet.keys_file if fleet else None, network=network)
        self.trainer: TrainerClient | None = None
        self.policies: list[EngineClient] = []
        self.judge_engines: list[EngineClient] = []
        self.judge: Judge | None = None
        self.weight_version = 0
        self.weights = ""  # names the policy's weights in service: the checksum of the last exchange
        self.at_end = contextlib.AsyncExitStack()  # what the judge holds open: cache, connections
        self.shares_devices = False  # engines and trainer on the same GPUs: they take turns (`training`)

    @property
    def nodes(self) -> int:
        return 1 + (len(self.fleet.others) if self.fleet else 0)

    @property
    def children(self) -> list[Child | RemoteChild]:
        """Every process of the run, on all hosts."""
        return [*self.supervisor.children, *(self.fleet.children if self.fleet else ())]

    def start_engine(self, name: str, config: EngineConfig, index: int = 0) -> EngineClient:
        """Start one engine process; it answers when the model is loaded. The `index`-th of its kind goes to host
        ``index % nodes`` and gets the GPUs at its place there."""
        node, index = index % self.nodes, index // self.nodes
        if node > 0:
            assert self.fleet is not None
            child, endpoint = self.fleet.others[node - 1].start_engine(name, config, index)
            return EngineClient(endpoint, self.fleet.keys, child.status, host=node)
        endpoint = ipc_endpoint(self.sockets, name)
        return EngineClient(endpoint, peer_status=self.host.start_engine(name, config, endpoint, index).status)

    def start_trainer(self, config: WorkerConfig, ranks: int, port: int | None) -> TrainerClient:
        """Start `ranks` trainer ranks, an equal share on each host; rank 0, on this one, answers when all have built
        the model."""
        endpoint = ipc_endpoint(self.sockets, "trainer")
        share = ranks // self.nodes
        master = self.fleet.address if self.fleet else "127.0.0.1", free_port(port)
        children: list[Child | RemoteChild] = []
        for rank in range(ranks):
            name, (node, local_rank) = f"trainer-{rank}", divmod(rank, share)
            if node == 0:
                children.append(
                    self.host.start_rank(
                        name, config, endpoint, rank=rank, world=ranks, local_rank=local_rank, master=master
                    )
                )
            else:
                assert self.fleet is not None
                other = self.fleet.others[node - 1]
                children.append(other.start_rank(name, config, rank, ranks, local_rank, master))
        return TrainerClient(endpoint, peer_status=lambda: first_ended(children))

    async def ready(self) -> None:
        """Wait until every part has loaded its model. Raises ProcessDied with the part's last words otherwise."""
        engines = [*self.policies, *self.judge_engines]
        waits = asyncio.gather(*(engine.ready() for engine in engines))
        if self.trainer is None:
            await waits
            return
        trainer, _ = await asyncio.gather(self.trainer.describe(), waits)
        self.shares_devices = bool(engines) and trainer.device != "cpu"

    async def engines_started(self) -> None:
        """On a GPU, before an engine is started that may share it: wait for those that were. What an engine takes up,
        and so what is left of its share for the KV cache, vLLM measures as what disappears from the device's free
        memory while it starts, whoever took it."""
        if plan.on_gpu():
            await asyncio.gather(*(engine.ready() for engine in (*self.policies, *self.judge_engines)))

    async def engines_first(self) -> None:
        """On a GPU, before the trainer is started: an engine measures what is free when it starts, so it starts on a
        device without the trainer, and sleeps while that builds its model."""
        await self.engines_started()
        await self._sleep(policy_level=1)

    async def training(self) -> None:
        """The devices go to the trainer: the policy drops its weights (they come back by exchange), the frozen judge
        keeps its in host memory. On a CPU there is nothing to hand over."""
        if self.shares_devices:
            await self._sleep(policy_level=2)
            assert self.trainer is not None
            await self.trainer.onload()

    @contextlib.asynccontextmanager
    async def trainer_at_home(self) -> AsyncIterator[TrainerClient]:
        """The trainer with everything on its devices, to be saved or restored; the engines sleep meanwhile, and keep
        their weights."""
        assert self.trainer is not None
        if self.shares_devices:
            await self._sleep(policy_level=1)
            await self.trainer.onload()
        yield self.trainer
        if self.shares_devices:
            await self.trainer.offload(parameters=True)
            await asyncio.gather(*(engine.wake() for engine in (*self.policies, *self.judge_engines)))

    async def _sleep(self, policy_level: Literal[1, 2]) -> None:
        await asyncio.gather(*(p.sleep(policy_level) for p in self.policies), *(j.sleep(1) for j in self.judge_engines))

    async def publish(self, version: int, verify: bool) -> ExchangeReport | None:
        """The trainer's weights go into service as `version` on every policy engine, and the devices back to the
        engines: gradients and optimizer leave, the engines' weights come, then the trainer's parameters leave, then
        the KV caches come. So a device never holds more than both sets of weights. None without engines."""
        assert self.trainer is not None
        self.weight_version = version
        if not self.policies:
            return None
        if self.shares_devices:
            await self.trainer.offload()
            await asyncio.gather(*(p.wake(("weights",)) for p in self.policies))
        report = await exchange(self.trainer, self.policies, version, verify)
        self.weights = report.checksum
        if self.shares_devices:
            await self.trainer.offload(parameters=True)
            await asyncio.gather(
                *(p.wake(("kv_cache",)) for p in self.policies), *(j.wake() for j in self.judge_engines)
            )
        return report

    async def cause(self, error: ProcessDied) -> str:
        """Which process ended first, in one line. A trainer rank that lost another only says so; a person wants to know
        which was killed."""
        for _ in range(20):
            if (line := first_ended(self.children)) is not None and "was killed by" in line:
                return line
            await asyncio.sleep(0.1)
        return first_ended(self.children) or str(error)

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await self.at_end.aclose()
        if self.fleet and self.trainer and first_ended(self.children) is None:
            with contextlib.suppress(Exception):  # ranks on several hosts are not ended at one moment otherwise
                await self.trainer.shutdown(timeout_s=10)
        clients = [*self.policies, *self.judge_engines, self.trainer]
        for client in clients:
            if client is not None:
                with contextlib.suppress(Exception):
                    await client.close()
        self.host.stop()
        shutil.rmtree(self.sockets, ignore_errors=True)


def first_ended(children: Sequence[Child | RemoteChild]) -> str | None:
    """One line about the first of `children` that ended; a killed one before those that only followed it."""
    lines = [(child.returncode or 0, line) for child in children if (line := child.status()) is not None]
    return min(lines)[1] if lines else None


@contextlib.asynccontextmanager
async def running(
    config: TrainConfig, run_dir: Path, worker: WorkerConfig | None, place: Place = ALONE
) -> AsyncIterator[System]:
    """Start what `config` needs (and the trainer when `worker` is given) on the hosts of `place`, wait until all is
    ready, end all on exit. Without a trainer only this host is used, with its share of the engines."""
    if worker is None:
        config = plan.on_one_host(config)
    async with meeting(run_dir, place, config.parallel.interface) as fleet:
        system = System(Supervisor(run_dir / "logs"), plan.socket_dir(run_dir), fleet)
        try:
            by_turns = worker is not None and plan.on_gpu()
            if worker is not None and not by_turns:
                system.trainer = system.start_trainer(worker, config.parallel.ranks, config.parallel.master_port)
            if config.rollout.replay is None:
                policy = plan.engine_config(config, "policy")
                system.policies = [system.start_engine(f"policy-{i}", policy, i) for i in range(config.rollout.engines)]
            try:
                system.judge = await make_judge(config, system)
                if worker is not None and by_turns:
                    await system.engines_first()
                    system.trainer = system.start_trainer(worker, config.parallel.ranks, config.parallel.master_port)
                await system.ready()
            except ProcessDied as error:  # nothing has been done yet, so there is no state to speak of
                raise StartFailed(str(error)) from error
            yield system
        finally:
            await system.close()
