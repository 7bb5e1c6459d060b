"""Who writes which rectangle of which tensor, and who sends it to hosts where nobody holds it. Pure arithmetic.

Every host has shared memory of its own, which its engines read. A rectangle that a rank of the host holds (its own
parameter or a replica of it: data parallel, tied, whole on every tensor-parallel rank) is written by one such rank. The
others come from a rank of another host: one of the holders sends, one of the host's ranks receives and writes. Every
rank computes the same `Spread` from the same lists, so nothing has to be agreed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megarubric.errors import MegarubricError
from megarubric.exchange.buckets import TensorSpec, dtype_bytes

Ints = NDArray[np.int64]
_PAIRS_AT_ONCE = 1 << 22  # pairs of rectangles compared in one go, bounds memory


class SpreadError(MegarubricError):
    """The rectangles that the ranks hold do not make up the tensors."""


@dataclass(frozen=True)
class Spread:
    """The answer for all ranks. R distinct rectangles, by tensor and place.

    rectangles int64[R, 1 + 2D]: number of the tensor, D first indices, D ends. nbytes int64[R]. writes int64[W, 2]:
    (rectangle, rank) that copies it from its own parameter to its host's memory. transfers int64[X, 3]: (rectangle,
    source rank, receiving rank), the latter of which writes what it receives.
    """

    rectangles: Ints
    nbytes: Ints
    writes: Ints
    transfers: Ints

    def part(self, rank: int) -> Part:
        """What `rank` does, in ascending order of rectangles."""
        writes = np.sort(self.writes[self.writes[:, 1] == rank, 0])
        sends: dict[int, list[int]] = {}
        for rectangle, _, receiver in _sorted(self.transfers[self.transfers[:, 1] == rank]).tolist():
            sends.setdefault(rectangle, []).append(receiver)
        receives = {r: source for r, source, _ in _sorted(self.transfers[self.transfers[:, 2] == rank]).tolist()}
        return Part(writes.tolist(), sends, receives)


@dataclass(frozen=True)
class Part:
    """One rank's share of a `Spread`: rectangles it writes, sends (to which ranks), and receives (from which rank)."""

    writes: list[int]
    sends: dict[int, list[int]]
    receives: dict[int, int]


def host_of(rank: int, world: int, hosts: int) -> int:
    """Ranks are numbered host by host."""
    return rank * hosts // world


def rectangles(held: Iterable[tuple[str, tuple[slice, ...]]], tensors: Sequence[TensorSpec]) -> Ints:
    """int64[n, 1 + 2D] of (name, one slice a dimension), the form in which ranks tell each other what they hold.

    D is the most dimensions that any of `tensors` has; the ones a tensor lacks are [0, 1). Raises SpreadError for a
    name that is not among them or another number of dimensions.
    """
    number = {t.name: k for k, t in enumerate(tensors)}
    n_dims = _n_dims(tensors)
    rows = []
    for name, index in held:
        k = number.get(name)
        if k is None or len(index) != len(tensors[k].shape):
            raise SpreadError(f"a piece of {name} with {len(index)} dimensions: there is no such tensor")
        lack = n_dims - len(index)
        rows.append([k, *(s.start for s in index), *[0] * lack, *(s.stop for s in index), *[1] * lack])
    return np.array(rows, dtype=np.int64).reshape(-1, 1 + 2 * n_dims)


def spread(held: Sequence[Ints], tensors: Sequence[TensorSpec], hosts: int) -> Spread:
    """Decide. `held` has the `rectangles` of every rank, owned or replicated.

    Loads are balanced by bytes: the rectangles that the same ranks hold are dealt to them in turn, largest first, so no
    two of these ranks differ by more than the largest; and because tensors are numbered in the order of the buckets,
    each bucket's work is dealt evenly too. Raises SpreadError, naming the tensor, when the distinct rectangles of one
    do not partition it.
    """
    world, n_dims = len(held), _n_dims(tensors)
    rows = np.concatenate(held)
    rank = np.repeat(np.arange(world), [len(h) for h in held])
    order = np.lexsort((rank, *rows.T[::-1]))
    rows, rank = rows[order], rank[order]
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    again = ~begins
    again[1:] &= rank[1:] == rank[:-1]  # a rank holds two copies
    distinct = rows[begins]
    _check_partition(distinct, tensors)
    item_bytes = np.array([dtype_bytes(t.dtype) for t in tensors], dtype=np.int64)
    extents = distinct[:, 1 + n_dims :] - distinct[:, 1 : 1 + n_dims]
    nbytes = extents.prod(axis=1) * item_bytes[distinct[:, 0]]

    # Rectangles with the same holders are decided on together: their number may be large, that of the sets is not.
    holders = rank[~again]
    bounds = np.append(np.flatnonzero(begins[~again]), len(holders)).tolist()
    classes: dict[bytes, list[int]] = {}
    for k in range(len(distinct)):
        classes.setdefault(holders[bounds[k] : bounds[k + 1]].tobytes(), []).append(k)

    host = np.arange(world) * hosts // world
    ranks_of = [np.flatnonzero(host == h) for h in range(hosts)]
    written, sent, received = (np.zeros(world, dtype=np.int64) for _ in range(3))
    writes: list[Ints] = [np.empty((0, 2), dtype=np.int64)]
    transfers: list[Ints] = [np.empty((0, 3), dtype=np.int64)]
    for key in sorted(classes, key=lambda key: (len(key), key)):  # those with the least choice first
        who = np.frombuffer(key, dtype=holders.dtype)
        items = np.array(classes[key], dtype=np.int64)
        items = items[np.argsort(-nbytes[items], kind="stable")]
        sizes, lacking = nbytes[items], []
        for h in range(hosts):
            local = who[host[who] == h]
            if len(local):
                writes.append(np.column_stack([items, _deal(sizes, local, written)]))
            else:
                lacking.append(h)
        if not lacking:
            continue
        source = _deal(np.repeat(sizes, len(lacking)), who, sent).reshape(len(items), len(lacking))
        for column, h in enumerate(lacking):
            receiver = _deal(sizes, ranks_of[h], received)
            transfers.append(np.column_stack([items, source[:, column], receiver]))
    return Spread(distinct, nbytes, np.concatenate(writes), np.concatenate(transfers))


def slices(row: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """The rectangle of a row of `Spread.rectangles` in a tensor of `shape`."""
    n_dims = (len(row) - 1) // 2
    return tuple(slice(row[1 + d], row[1 + n_dims + d]) for d in range(len(shape)))


def sent_bytes(plan: Spread, hosts: int, world: int) -> Mapping[tuple[int, int], int]:
    """Bytes that go from host to host, whole, for each (source host, receiving host)."""
    host = np.arange(world) * hosts // world
    sums = np.zeros((hosts, hosts), dtype=np.int64)
    rectangle, source, receiver = plan.transfers.T
    np.add.at(sums, (host[source], host[receiver]), plan.nbytes[rectangle])
    return {(int(a), int(b)): int(sums[a, b]) for a, b in zip(*np.nonzero(sums))}


def _n_dims(tensors: Sequence[TensorSpec]) -> int:
    return max((len(t.shape) for t in tensors), default=0)


def _sorted(transfers: Ints) -> Ints:
    ordered: Ints = transfers[np.lexsort((transfers[:, 2], transfers[:, 0]))]
    return ordered


def _deal(sizes: Ints, candidates: Ints, load: Ints) -> Ints:
    """A candidate for each of `sizes` (descending), in turn, the least loaded first; adds them to `load`."""
    if len(candidates) == 1:
        load[candidates[0]] += int(sizes.sum())
        return np.full(len(sizes), candidates[0])
    in_turn = candidates[np.argsort(load[candidates], kind="stable")]
    dealt: Ints = in_turn[np.arange(len(sizes)) % len(in_turn)]
    np.add.at(load, dealt, sizes)
    return dealt


def _check_partition(rows: Ints, tensors: Sequence[TensorSpec]) -> None:
    """`rows` are distinct and sorted by tensor."""
    n_dims = _n_dims(tensors)
    shapes = np.array([[*t.shape, *[1] * (n_dims - len(t.shape))] for t in tensors], dtype=np.int64)
    shapes = shapes.reshape(len(tensors), n_dims)
    tensor, low, high = rows[:, 0], rows[:, 1 : 1 + n_dims], rows[:, 1 + n_dims :]
    outside = ((low < 0) | (low >= high) | (high > shapes[tensor])).any(axis=1)
    if outside.any():
        raise SpreadError(f"tensor {tensors[int(tensor[outside][0])].name}: a piece is empty or leaves the tensor")
    count = np.bincount(tensor, minlength=len(tensors))
    first = np.cumsum(count) - count
    for k in np.unique(count[count > 1]).tolist():
        several = np.flatnonzero(count == k)
        step = max(1, _PAIRS_AT_ONCE // (k * k))
        for start in range(0, len(several), step):
            some = several[start : start + step]
            at = first[some][:, None] + np.arange(k)
            meet = np.ones((len(some), k, k), dtype=bool)
            for d in range(n_dims):
                meet &= low[at][:, :, None, d] < high[at][:, None, :, d]
            meet &= meet.transpose(0, 2, 1)
            meet[:, np.arange(k), np.arange(k)] = False
            if meet.any():
                name = tensors[int(some[meet.any(axis=(1, 2))][0])].name
                raise SpreadError(f"tensor {name}: two of its pieces overlap")
    covered = np.zeros(len(tensors), dtype=np.int64)
    np.add.at(covered, tensor, (high - low).prod(axis=1))
    short = np.flatnonzero(covered != shapes.prod(axis=1))
    if len(short):
        t = tensors[int(short[0])]
        raise SpreadError(f"tensor {t.name} {list(t.shape)}: the ranks hold {int(covered[short[0]])} of its elements")
