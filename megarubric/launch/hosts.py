"""The hosts of a run: which one this process is on, how it is reached, and how the hosts find each other.

Every host starts the same command (under Slurm, srun does). On host 0 it becomes the controller, on the others an agent
(`launch.agent`) that starts trainer ranks and engines when told. They meet in the run directory, which all hosts share
(checkpoints need that anyway): host 0 writes the run's keys to ``hosts/SESSION/keys``, every other host its card to
``hosts/SESSION/host_K.json``. A session is one start of the run, so what an earlier start left is never read.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from pathlib import Path

import msgspec
import psutil

from megarubric.errors import BadInput
from megarubric.observe.files import whole_file

NODE = "MEGARUBRIC_NODE"  # without Slurm: which host this is, 0 to parallel.nodes - 1
SESSION = "MEGARUBRIC_SESSION"  # and a word for this start of the run, the same on all hosts, never used before
ADDRESS = "MEGARUBRIC_ADDRESS"  # by which other hosts reach this one; found by itself where there is no choice
ENGINE_PORTS = 64  # reserved on a host: more than engines can be
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Place(msgspec.Struct, frozen=True):
    """This process among the hosts of a run."""

    node: int = 0
    nodes: int = 1
    session: str = ""


class HostCard(msgspec.Struct, frozen=True):
    """Where a host's agent answers, and ports of that host that engines may bind."""

    node: int
    hostname: str
    address: str
    endpoint: str
    ports: tuple[int, ...]


def here(nodes: int) -> Place:
    """The place of this process in a run of `nodes` hosts, from Slurm's environment or MEGARUBRIC_NODE and _SESSION.

    Raises BadInput when the environment speaks of another number of hosts, or of more than one process on a host.
    """
    env = os.environ
    if NODE in env:
        node, session = env[NODE], env.get(SESSION, "")
        if not node.isdecimal() or int(node) >= nodes:
            raise BadInput("environment", NODE, f"{node!r} is not a host of parallel.nodes {nodes}: 0 to {nodes - 1}")
        if nodes > 1 and not _WORD.fullmatch(session):
            raise BadInput("environment", SESSION, "must be a word for this start of the run, the same on all hosts")
        return Place(int(node), nodes, session)
    present = env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or "1"
    if present != str(nodes):
        what = f"{present} node{'s' if present != '1' else ''}"
        if "SLURM_JOB_ID" in env:
            raise BadInput("Slurm", what, f"and parallel.nodes is {nodes}: start it with srun --nodes={nodes}")
        reason = f"one of {nodes} hosts, but neither Slurm nor {NODE} and {SESSION} say which (docs/hosts.md)"
        raise BadInput("config", "parallel.nodes", reason)
    if nodes == 1:
        return Place()
    tasks = env.get("SLURM_STEP_NUM_TASKS", str(nodes))
    if tasks != str(nodes):
        raise BadInput("Slurm", f"{tasks} tasks", f"on {nodes} nodes: one a node, srun --ntasks-per-node=1")
    parts = env.get("SLURM_JOB_ID", "0"), env.get("SLURM_RESTART_COUNT", "0"), env.get("SLURM_STEP_ID", "0")
    return Place(int(env.get("SLURM_NODEID", "0")), nodes, ".".join(parts))


def own_address(interface: str | None = None) -> str:
    """The IPv4 address by which other hosts reach this one: MEGARUBRIC_ADDRESS, else that of `interface`, else what the
    host's name resolves to, else that of the first interface that is up. Raises BadInput for one that has none."""
    if given := os.environ.get(ADDRESS):
        return given
    by_interface = _addresses()
    if interface is not None:
        if not by_interface.get(interface):
            known = ", ".join(sorted(name for name, found in by_interface.items() if found))
            raise BadInput("config", "parallel.interface", f"{interface} has no IPv4 address here; with one: {known}")
        return by_interface[interface][0]
    try:
        named = [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        named = []
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    others = [address for name, found in by_interface.items() if name in up for address in found]
    usable = [a for a in (*named, *others) if not ipaddress.ip_address(a).is_loopback]
    return usable[0] if usable else "127.0.0.1"


def _addresses() -> dict[str, list[str]]:
    """The IPv4 addresses of each network interface of this host."""
    return {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }


def network_environment(address: str, interface: str | None) -> dict[str, str]:
    """What a trainer rank must know to listen where others look for it; what the user has set stays.

    gloo listens on the interface that has `address` (by itself it takes what the host's name resolves to, which is the
    loopback on many systems). NCCL finds its own way, unless an `interface` was named.
    """
    found = {own: name for name, addresses in _addresses().items() for own in addresses}
    wanted = {ADDRESS: address}
    if address in found:
        wanted["GLOO_SOCKET_IFNAME"] = found[address]
    if interface is not None:
        wanted["NCCL_SOCKET_IFNAME"] = interface
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def reserve_ports(address: str, count: int) -> list[socket.socket]:
    """Sockets bound to `count` free ports. While they are open no other program is given the ports, and a server that
    asks for SO_REUSEADDR, as ZeroMQ's do, can bind them, because nobody listens there yet."""
    reserved = []
    for _ in range(count):
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((address, 0))
        reserved.append(held)
    return reserved


def session_dir(run_dir: Path, place: Place) -> Path:
    return run_dir / "hosts" / place.session


def card_path(run_dir: Path, place: Place, node: int) -> Path:
    return session_dir(run_dir, place) / f"host_{node}.json"


def write_card(run_dir: Path, place: Place, card: HostCard) -> None:
    with whole_file(card_path(run_dir, place, card.node)) as f:
        f.write(msgspec.json.encode(card).decode())


def read_card(run_dir: Path, place: Place, node: int) -> HostCard | None:
    """The card of host `node`, or None while it is not there."""
    path = card_path(run_dir, place, node)
    try:
        return msgspec.json.decode(path.read_bytes(), type=HostCard)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise BadInput(path, None, str(error)) from None
