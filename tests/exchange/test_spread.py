"""Who writes and who sends what: every element once a host, nothing to whoever has it, and even loads."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarubric.exchange.buckets import TensorSpec
from megarubric.exchange.spread import SpreadError, host_of, rectangles, sent_bytes, slices, spread


@st.composite
def worlds(draw):
    """(tensors, what each rank holds, hosts): tensors cut in grids, each cell held by some ranks."""
    world = draw(st.integers(1, 6))
    hosts = draw(st.integers(1, world))
    sets = draw(st.lists(st.sets(st.integers(0, world - 1), min_size=1), min_size=1, max_size=4))
    held = [[] for _ in range(world)]
    tensors = []
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))
        tensors.append(TensorSpec(f"t{number}", "bfloat16", tuple(shape)))
        cuts = [sorted({0, n, *draw(st.sets(st.integers(1, n), max_size=2))}) for n in shape]
        for cell in product(*(list(pairwise(c)) for c in cuts)):
            for rank in draw(st.sampled_from(sets)):
                held[rank].append((f"t{number}", tuple(slice(a, b) for a, b in cell)))
    return tensors, held, hosts


def spread_of(tensors, held, hosts):
    return spread([rectangles(h, tensors) for h in held], tensors, hosts)


@settings(max_examples=200)
@given(worlds())
def test_every_element_is_written_once_a_host_by_someone_who_has_it(case):
    tensors, held, hosts = case
    world = len(held)
    plan = spread_of(tensors, held, hosts)
    counts = [{t.name: np.zeros(t.shape, int) for t in tensors} for _ in range(hosts)]
    sent: dict[tuple[int, int], int] = {}
    for rank in range(world):
        part, host = plan.part(rank), host_of(rank, world, hosts)
        assert part.writes == sorted(part.writes) and list(part.receives) == sorted(part.receives)

        def place(rectangle):
            row = plan.rectangles[rectangle].tolist()
            tensor = tensors[row[0]]
            return tensor.name, slices(row, tensor.shape)

        for rectangle in part.writes:
            name, index = place(rectangle)
            assert (name, index) in held[rank]
            counts[host][name][index] += 1
        for rectangle in part.receives:
            name, index = place(rectangle)
            counts[host][name][index] += 1
            # nothing is sent to a host that holds it
            assert all((name, index) not in held[r] for r in range(world) if host_of(r, world, hosts) == host)
        for rectangle, receivers in part.sends.items():
            assert place(rectangle) in held[rank] and receivers == sorted(set(receivers))
            sent |= {(rectangle, receiver): rank for receiver in receivers}
    assert sent == {(r, k): source for k in range(world) for r, source in plan.part(k).receives.items()}
    assert all((count == 1).all() for of_host in counts for count in of_host.values())
    assert sum(sent_bytes(plan, hosts, world).values()) == sum(int(plan.nbytes[r]) for r, _ in sent)


@given(worlds())
def test_who_holds_the_same_does_the_same(case):
    """Ranks of a host that hold the same differ in what they write by no more than the largest rectangle of each set of
    holders; the same goes for what they send, and for what all ranks of a host receive from each set."""
    tensors, held, hosts = case
    world = len(held)
    plan = spread_of(tensors, held, hosts)
    holders: dict[int, frozenset[int]] = {}
    for number, row in enumerate(plan.rectangles.tolist()):
        name = tensors[row[0]].name
        index = slices(row, tensors[row[0]].shape)
        holders[number] = frozenset(r for r in range(world) if (name, index) in held[r])
    wrote, sent, got = (defaultdict(Counter) for _ in range(3))
    for rectangle, rank in plan.writes.tolist():
        wrote[holders[rectangle], host_of(rank, world, hosts)][rank] += int(plan.nbytes[rectangle])
    for rectangle, source, receiver in plan.transfers.tolist():
        sent[holders[rectangle]][source] += int(plan.nbytes[rectangle])
        got[holders[rectangle], host_of(receiver, world, hosts)][receiver] += int(plan.nbytes[rectangle])
    largest: Counter = Counter()
    for number, who in holders.items():
        largest[who] = max(largest[who], int(plan.nbytes[number]))
    for (who, host), loads in wrote.items():
        of_host = [r for r in who if host_of(r, world, hosts) == host]
        assert max(loads[r] for r in of_host) - min(loads[r] for r in of_host) <= largest[who]
    for who, loads in sent.items():
        assert max(loads[r] for r in who) - min(loads[r] for r in who) <= largest[who]
    for (who, host), loads in got.items():
        of_host = [r for r in range(world) if host_of(r, world, hosts) == host]
        assert max(loads[r] for r in of_host) - min(loads[r] for r in of_host) <= largest[who]


def whole(tensor):
    return tensor.name, tuple(slice(0, n) for n in tensor.shape)


def test_replicas_on_every_host_keep_the_network_idle_and_share_the_writing():
    tensors = [TensorSpec(f"t{i}", "bfloat16", (64, 8)) for i in range(8)]
    plan = spread_of(tensors, [[whole(t) for t in tensors]] * 4, 2)  # data parallel over two hosts
    assert len(plan.transfers) == 0
    assert Counter(plan.writes[:, 1].tolist()) == {0: 4, 1: 4, 2: 4, 3: 4}


def test_a_pipeline_over_hosts_sends_from_all_and_to_all():
    tensors = [TensorSpec(f"layers.{i}.w", "bfloat16", (16, 4)) for i in range(8)]
    held = [[whole(t) for t in tensors[:4]]] * 2 + [[whole(t) for t in tensors[4:]]] * 2
    plan = spread_of(tensors, held, 2)
    assert sent_bytes(plan, 2, 4) == {(0, 1): 4 * 128, (1, 0): 4 * 128}
    assert (
        Counter(plan.transfers[:, 1].tolist()) == Counter(plan.transfers[:, 2].tolist()) == dict.fromkeys(range(4), 2)
    )


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(0, 3)], r"^tensor w \[4, 2\]: the ranks hold 6 of its elements$"),
        ([(0, 3), (2, 4)], r"^tensor w: two of its pieces overlap$"),
        ([(0, 5)], r"^tensor w: a piece is empty or leaves the tensor$"),
        ([(0, 2), (2, 2), (2, 4)], r"^tensor w: a piece is empty or leaves the tensor$"),
        ([], r"^tensor w \[4, 2\]: the ranks hold 0 of its elements$"),
    ],
)
def test_pieces_that_do_not_make_up_a_tensor(rows, reason):
    tensors = [TensorSpec("first", "bfloat16", (3,)), TensorSpec("w", "bfloat16", (4, 2))]
    held = [[whole(tensors[0])], [("w", (slice(a, b), slice(0, 2))) for a, b in rows]]
    with pytest.raises(SpreadError, match=reason):
        spread_of(tensors, held, 1)


@pytest.mark.parametrize("piece", [("other", (slice(0, 1),)), ("w", (slice(0, 1),))])
def test_a_piece_of_no_tensor(piece):
    with pytest.raises(SpreadError, match="there is no such tensor"):
        rectangles([piece], [TensorSpec("w", "bfloat16", (4, 2))])


def test_a_large_run_is_planned_whole():
    """Qwen3-235B's experts on 256 ranks of 32 hosts, pipeline 4, expert parallel 16 (each group over two hosts): as
    many rectangles cross as the layout says, and every rank has its share."""
    world, hosts, pp, ep, layers, experts = 256, 32, 4, 16, 92, 128
    tensors = [
        TensorSpec(f"layers.{n}.experts.{e}.{w}", "bfloat16", (1536, 4096))
        for n in range(layers)
        for e in range(experts)
        for w in ("gate", "up", "down")
    ]
    cells: dict[tuple[int, int], list[TensorSpec]] = defaultdict(list)
    for t in tensors:
        layer, expert = (int(t.name.split(".")[k]) for k in (1, 3))
        cells[layer * pp // layers, expert * ep // experts].append(t)
    held = [rectangles([whole(t) for t in cells[rank * pp // world, rank % ep]], tensors) for rank in range(world)]
    plan = spread(held, tensors, hosts)
    # a host of 8 ranks has half of the experts of one stage of four: it gets 7/8 of the model
    assert len(plan.transfers) == hosts * len(tensors) * 7 // 8
    for column in (1, 2):
        load = np.bincount(plan.transfers[:, column], minlength=world)
        assert load.max() - load.min() <= pp * ep  # one a set of holders
