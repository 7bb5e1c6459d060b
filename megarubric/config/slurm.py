"""The `slurm:` section: what `megarubric submit` asks the cluster for, and what cannot be asked."""

from __future__ import annotations

import re

import msgspec


class Slurm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The batch job of `megarubric submit` (docs/slurm.md). A null leaves the choice to the cluster."""

    gpus_per_node: int | None = None  # null = the node's share of parallel.ranks when parallel.card is set, else none
    cpus_per_task: int | None = None
    memory: str | None = None  # of a node, e.g. 900G
    exclusive: bool = True  # no other job on the nodes
    minutes: int = 720  # time limit
    margin_s: int = 300  # so long before the limit the run is told to save: more than a step and a checkpoint take
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container: str | None = None  # image of srun --container-image (pyxis)
    mounts: list[str] = []  # HOST:CONTAINER[:flags]; the working directory is mounted anyway
    forward: tuple[str, ...] = ("HF_HOME", "HF_TOKEN", "WANDB_API_KEY")  # variables the run gets when you have set them
    setup: list[str] = []  # shell lines before the run, e.g. module load cuda
    command: str = ".venv/bin/megarubric"

    def gpus(self, ranks: int, card: str | None) -> int:
        """GPUs of a node: engines share those of the trainer's `ranks` there; a run without a `card` has none."""
        return self.gpus_per_node if self.gpus_per_node is not None else (ranks if card else 0)


_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@%&|*()/+-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def refuse(s: Slurm, ranks: int, card: str | None) -> str | None:
    """First thing wrong with the section, as ``key: sentence``, or None. `ranks` (of a node), `card`: the trainer's."""
    least = {"gpus_per_node": 0, "cpus_per_task": 1, "minutes": 1, "margin_s": 1}
    for field, low in least.items():
        value = getattr(s, field)
        if value is not None and value < low:
            return f"{field}: must be at least {low}, is {value}"
    if card and s.gpus(ranks, card) < ranks:
        return f"gpus_per_node: {s.gpus_per_node}, but a node has {ranks} of parallel.ranks"
    if s.margin_s >= 60 * s.minutes:
        return f"margin_s: {s.margin_s} leaves nothing of slurm.minutes {s.minutes}"
    for field in ("partition", "account", "qos", "constraint", "memory"):
        value = getattr(s, field)
        if value is not None and not _WORD.fullmatch(value):
            return f"{field}: {value!r} is not a word that Slurm takes"
    if s.mounts and not s.container:
        return "mounts: given, but slurm.container names no image"
    for mount in s.mounts:
        if ":" not in mount or not all(mount.split(":")) or "," in mount:
            return f"mounts: {mount!r} is not HOST:CONTAINER"
    for name in s.forward:
        if not _VARIABLE.fullmatch(name):
            return f"forward: {name!r} is not the name of a variable"
    if any(not line.strip() or not line.isprintable() for line in s.setup):
        return "setup: is a list of shell lines, one each"
    for field in ("command", "container"):
        value = getattr(s, field)
        if value is not None and (not value.strip() or not value.isprintable()):
            return f"{field}: is empty or not one line"
    return None
