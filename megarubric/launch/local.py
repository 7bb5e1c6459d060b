"""Starts the processes of one host, on that host: for the controller on host 0, for the agent on any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megarubric.exchange.buckets import sweep
from megarubric.launch import plan
from megarubric.launch.supervisor import Child, Supervisor
from megarubric.megatron.messages import WorkerConfig
from megarubric.rollout.messages import EngineConfig


class LocalHost:
    """Trainer ranks and engines of this host, under `supervisor`.

    `worker_file` is the name of the file in its log directory that ranks read their settings from. `keys` and `network`
    are for runs on several hosts: the run's key file, and what `hosts.network_environment` gives.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        worker_file: str = "trainer.json",
        keys: Path | None = None,
        network: Mapping[str, str] | None = None,
    ) -> None:
        self.supervisor, self._keys, self._network = supervisor, keys, dict(network or {})
        self._worker_file = supervisor.log_dir / worker_file
        self._shm_prefix = ""

    def start_rank(
        self,
        name: str,
        config: WorkerConfig,
        endpoint: str,
        *,
        rank: int,
        world: int,
        local_rank: int,
        master: tuple[str, int],
    ) -> Child:
        """Start trainer rank `rank` of `world`, the `local_rank`-th here. `master`: address and port at which rank 0
        listens; `endpoint`: where rank 0 answers the controller."""
        if config.shm_prefix != self._shm_prefix:  # the first rank of this host
            plan.sweep_left_behind(self._worker_file)
            self._shm_prefix = config.shm_prefix
            plan.write_json(self._worker_file, config)
        env = plan.rank_environment(rank, world, local_rank, *master, config.threads) | self._network
        return self.supervisor.start(name, plan.command("trainer", self._worker_file, endpoint, self._keys), env)

    def start_engine(self, name: str, config: EngineConfig, endpoint: str, index: int) -> Child:
        """Start an engine that serves on `endpoint`; the `index`-th of its kind gets the GPUs at that place."""
        path = plan.write_json(self.supervisor.log_dir / f"{name}.json", config)
        env = plan.quiet_environment(config.threads) | plan.engine_devices(index, config.tensor_parallel)
        return self.supervisor.start(name, plan.command("engine", path, endpoint, self._keys), env)

    def stop(self) -> None:
        """End all of them, and remove the shared memory that a rank killed with -9 could not."""
        self.supervisor.stop()
        if self._shm_prefix:
            sweep(self._shm_prefix)
