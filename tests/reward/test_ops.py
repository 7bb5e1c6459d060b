"""The compiled CPU ops: the reference's bits, whatever the batch split, the thread count and the instruction set."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from megarubric.errors import BadInput
from megarubric.reward import ops
from megarubric.reward.advantages import group_advantages, objective_wise
from megarubric.reward.batch import aggregate_batch
from megarubric.reward.reference import aggregate
from megarubric.reward.table import pack_rubrics, stack_tables
from megarubric.reward.tiers import tier_expectation

pytestmark = pytest.mark.skipif(not ops.available(), reason=f"reward ops {ops.describe()}")
FIELDS = ("reward", "valid", "vetoed", "veto", "r0", "r1", "attribution", "pair_attribution")


@pytest.fixture(scope="module")
def problem(kit):
    """Random rubrics and samples as tensors, and as objects."""

    def build(seed: int, n_rubrics: int, n_samples: int, runs: bool = False):
        rng = random.Random(seed)
        objects = [kit.random_rubric(rng) for _ in range(n_rubrics)]
        index = [rng.randrange(n_rubrics) for _ in range(n_samples)]
        if runs:  # rollouts of one prompt lie together
            index.sort()
        rows = [kit.random_scores(rng, objects[r]) for r in index]
        return objects, [kit.parse(o) for o in objects], index, rows

    return build


def tensors(rubrics, index, rows):
    table = pack_rubrics(rubrics)
    rubric = np.array(index, np.int32)
    cells = [rows[i].get(c.id) for i, r in enumerate(index) for c in rubrics[r].criteria]
    scores = torch.tensor([float("nan") if c is None else c for c in cells])
    mask = torch.tensor([c is not None for c in cells])
    return scores, mask, torch.from_numpy(table.offsets(rubric)), torch.from_numpy(rubric), table


def run(scores, mask, offsets, rubric, table):
    words = torch.from_numpy(table.words)
    return ops.aggregate(scores, mask, offsets, rubric, words, attribution=True, max_pairs=table.max_pairs)


def bits(t: torch.Tensor) -> bytes:
    """Bytes with every NaN made the same one."""
    return torch.nan_to_num(t, nan=-777.0).numpy().tobytes() if t.is_floating_point() else t.numpy().tobytes()


def assert_same_bits(a, b) -> None:
    for name in FIELDS:
        assert bits(getattr(a, name)) == bits(getattr(b, name)), name


def test_ten_thousand_random_rubrics_against_float64(kit, problem) -> None:
    objects, rubrics, index, rows = problem(1, 10_000, 10_000)
    batch = aggregate_batch(rubrics, index, rows)
    for result, r, row in zip(batch.results(), index, rows):
        kit.assert_close(result, kit.Oracle(objects[r], row))


@pytest.mark.parametrize("runs", [False, True])
def test_the_reference_bits(problem, runs: bool) -> None:
    """NaN == NaN aside, equality of floats here is equality of bits: no result is -0."""
    _, rubrics, index, rows = problem(2, 150, 1500, runs)
    batch = aggregate_batch(rubrics, index, rows)
    assert batch.results() == [aggregate(rubrics[r], row) for r, row in zip(index, rows)]
    assert batch.result(77) == batch.results()[77] and batch.results(5, 9) == batch.results()[5:9]
    zeros = np.concatenate([batch.attribution, batch.pair_attribution.ravel(), batch.reward])
    assert not np.signbit(zeros[zeros == 0]).any()


def test_any_split_and_order_gives_the_same_bits(problem) -> None:
    _, rubrics, index, rows = problem(3, 60, 3000)
    whole = run(*tensors(rubrics, index, rows))
    for cut in (1, 17, 1024, 1500, 2999):
        parts = [run(*tensors(rubrics, index[s], rows[s])) for s in (slice(0, cut), slice(cut, None))]
        for name in FIELDS:
            assert bits(torch.cat([getattr(p, name) for p in parts])) == bits(getattr(whole, name)), (cut, name)
    order = sorted(range(3000), key=lambda i: index[i])
    moved = run(*tensors(rubrics, [index[i] for i in order], [rows[i] for i in order]))
    assert bits(moved.reward) == bits(whole.reward[order])


def test_any_thread_count_gives_the_same_bits(problem) -> None:
    _, rubrics, index, rows = problem(4, 20, 2000)
    inputs = tensors(rubrics, index * 5, rows * 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(*inputs)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same_bits(run(*inputs), one)
    finally:
        torch.set_num_threads(before)


def test_any_instruction_set_gives_the_same_bits(problem) -> None:
    _, rubrics, index, rows = problem(5, 50, 1200, True)
    inputs = tensors(rubrics, index, rows)
    torch.manual_seed(1)
    logits, values, ids = 4 * torch.randn(5, 3001), torch.arange(3.0), torch.tensor([5, 17, 3000])
    widest = ops.cpu_instruction_set()
    rewards, tiers = run(*inputs), ops.tier_expectation(logits, values, 0.0, ids)
    tried = []
    try:
        for name in ("baseline", "avx2", "avx512"):
            if ops.use_cpu_instruction_set(name):
                tried.append(ops.cpu_instruction_set())
                assert_same_bits(run(*inputs), rewards)
                again = ops.tier_expectation(logits, values, 0.0, ids)
                assert [bits(t) for t in again] == [bits(t) for t in tiers]
    finally:
        ops.use_cpu_instruction_set(widest)
    assert {"baseline", widest} <= set(tried) and not ops.use_cpu_instruction_set("sse9")


def test_outputs_are_written_whole(problem) -> None:
    """No output element depends on what its memory held: run twice around a poisoned allocation."""
    _, rubrics, index, rows = problem(6, 40, 777)
    inputs = tensors(rubrics, index, rows)
    first = run(*inputs)
    for _ in range(3):
        poison = [torch.full((n,), 12345.0) for n in (777, 777 * 4, inputs[0].numel(), inputs[0].numel())]
        del poison
        assert_same_bits(run(*inputs), first)


def test_without_mask_everything_is_judged(kit) -> None:
    rubrics = [kit.rubric([{"weight": 1}, {"weight": 2}])]
    table = pack_rubrics(rubrics)
    scores = torch.rand(40)
    offsets, rubric = torch.arange(0, 41, 2), torch.zeros(20, dtype=torch.int32)
    words = torch.from_numpy(table.words)
    a = ops.aggregate(scores, None, offsets, rubric, words)
    b = ops.aggregate(scores, torch.ones(40, dtype=torch.bool), offsets, rubric, words)
    assert bits(a.reward) == bits(b.reward) and a.attribution.numel() == 0


@pytest.mark.parametrize("n_criteria", [1, 15, 16, 17, 33, 400])
def test_wide_rubrics_and_the_last_rows(kit, n_criteria: int) -> None:
    """Rows are read sixteen columns at a time; nothing beyond the array may be touched or believed."""
    rubric = kit.rubric([{"weight": 1 + k % 3, "saturation": {"theta": 0.5, "beta": 2.0}} for k in range(n_criteria)])
    rng = np.random.default_rng(n_criteria)
    rows = [{f"c{k}": float(s) for k, s in enumerate(rng.random(n_criteria, np.float32))} for _ in range(19)]
    batch = aggregate_batch([rubric], [0] * 19, rows)
    assert batch.results() == [aggregate(rubric, row) for row in rows]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.1, -0.01])
def test_bad_score_is_found_and_harms_only_its_sample(problem, value: float) -> None:
    _, rubrics, index, rows = problem(7, 10, 500)
    scores, mask, offsets, rubric, table = tensors(rubrics, index, rows)
    clean = run(scores, mask, offsets, rubric, table)
    victims = [i for i in range(500) if mask[offsets[i]]][7:9]
    spoiled = scores.clone()
    for i in victims:
        spoiled[offsets[i]] = value
    out = run(spoiled, mask, offsets, rubric, table)
    assert not out.valid[victims].any() and out.reward[victims].isnan().all()
    others = [i for i in range(500) if i not in victims]
    assert bits(out.reward[others]) == bits(clean.reward[others])
    ops.check(clean.bad, offsets)
    with pytest.raises(BadInput, match=rf"sample {victims[0]}, criterion 0"):
        ops.check(out.bad, offsets)


def test_sample_that_does_not_fit_the_table(kit) -> None:
    table = pack_rubrics([kit.rubric([{}, {}])])
    words = torch.from_numpy(table.words)
    offsets = torch.tensor([0, 2, 3, 5, 7])
    out = ops.aggregate(torch.full((7,), 0.5), None, offsets, torch.tensor([0, 0, 0, 1], dtype=torch.int32), words)
    assert out.valid.tolist() == [True, False, True, False]
    with pytest.raises(BadInput, match="sample 1"):
        ops.check(out.bad, offsets)
    with pytest.raises(RuntimeError, match="pack_rubrics"):
        ops.aggregate(torch.zeros(2), None, torch.tensor([0, 2]), torch.zeros(1, dtype=torch.int32), words[4:].clone())
    with pytest.raises(RuntimeError, match="dtype"):
        ops.aggregate(torch.zeros(2).double(), None, torch.tensor([0, 2]), torch.zeros(1, dtype=torch.int32), words)


def test_batch_errors_name_rubric_criterion_sample(kit) -> None:
    rubric = kit.rubric([{}, {}])
    rows = [{"c0": 1.0}, {"c0": 0.5, "c1": 1.5}]
    with pytest.raises(BadInput, match=r"test\.rubric.*c1.*answer-9.*outside"):
        aggregate_batch([rubric], [0, 0], rows, samples=["answer-8", "answer-9"])
    for value in ("0.5", float("nan"), 10**400):
        with pytest.raises(BadInput, match="c1"):
            aggregate_batch([rubric], [0], [{"c1": value}])
    with pytest.raises(BadInput, match=r"no-such"):
        aggregate_batch([rubric], [0], [{"no-such": 1.0}])
    with pytest.raises(BadInput, match="rubric_index"):
        aggregate_batch([rubric], [1], [{}])


def test_empty_batch(kit) -> None:
    assert aggregate_batch([kit.rubric([{}])], [], []).results() == []


def test_without_the_library_the_reference_gives_the_same(problem, tmp_path) -> None:
    objects, rubrics, index, rows = problem(8, 8, 60)
    program = """
import json, sys
from megarubric.reward.batch import aggregate_batch
from megarubric.rubrics import parse_rubric
objects, index, rows = json.load(open(sys.argv[1]))
batch = aggregate_batch([parse_rubric(o, "tests") for o in objects], index, rows)
print(json.dumps([[r.reward, r.veto, r.r0, r.attribution] for r in batch.results()]))
"""
    (tmp_path / "in.json").write_text(json.dumps([objects, index, rows]))
    command = [sys.executable, "-c", program, str(tmp_path / "in.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MEGARUBRIC_NATIVE": "0"})
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stderr.splitlines() if "reference is used" in line]
    assert len(notices) == 1
    compiled = [[r.reward, r.veto, r.r0, r.attribution] for r in aggregate_batch(rubrics, index, rows).results()]
    assert json.loads(done.stdout) == compiled


def test_sweep_is_aggregate_per_table(kit) -> None:
    def variant(theta: float, weight: float, kappa: float):
        return pack_rubrics(
            [
                kit.rubric(
                    [{"weight": weight, "saturation": {"theta": theta, "beta": 2.0}}, {"weight": -0.5}, {"weight": 1}],
                    [{"a": "c0", "b": "c2", "weight": weight, "kind": "min"}],
                    shaping={"kappa": kappa, "alpha": 1.0, "power": 2.0},
                )
            ]
        )

    tables = [variant(t, w, k) for t in (0.0, 0.5, 0.9) for w in (0.5, 2.0) for k in (0.0, 0.6)]
    torch.manual_seed(0)
    n = 1000
    scores, mask = torch.rand(3 * n), torch.rand(3 * n) > 0.2
    offsets, rubric = torch.arange(0, 3 * n + 1, 3), torch.zeros(n, dtype=torch.int32)
    rewards, bad = ops.sweep(scores, mask, offsets, rubric, torch.from_numpy(stack_tables(tables)))
    ops.check(bad, offsets)
    for row, table in zip(rewards, tables):
        assert bits(row) == bits(ops.aggregate(scores, mask, offsets, rubric, torch.from_numpy(table.words)).reward)
    with pytest.raises(BadInput, match="table 1"):
        stack_tables([tables[0], pack_rubrics([kit.rubric([{}])])])


@pytest.mark.parametrize("mode", ["center", "standardize"])
def test_group_advantages_bits(mode: str) -> None:
    rng = np.random.default_rng(0)
    rewards = rng.random(3000, np.float32)
    valid = rng.random(3000) > 0.15
    rewards[~valid] = np.nan
    group = rng.integers(0, 400, 3000)
    rewards[group == 7] = 0.3
    want, flags = group_advantages(rewards, valid, group, mode, 401)
    got, degenerate = ops.group_advantages(
        torch.from_numpy(rewards), torch.from_numpy(valid), torch.from_numpy(group), 401, mode
    )
    assert got.numpy().tobytes() == want.tobytes() and degenerate.tolist() == flags.tolist()
    assert degenerate[7] and degenerate[400]


def test_objective_wise_bits() -> None:
    rng = np.random.default_rng(1)
    scores, mask = rng.random((800, 5), np.float32), rng.random((800, 5)) > 0.3
    scores[~mask] = np.nan
    group, weights = rng.integers(0, 90, 800), rng.normal(size=(90, 5)).astype(np.float32)
    sbar = rng.random(5)
    want, flags = objective_wise(scores, mask, group, weights, np.broadcast_to(sbar, (90, 5)), 1.5)
    got, degenerate = ops.objective_wise(
        *map(torch.from_numpy, (scores, mask, group)), 90, torch.from_numpy(weights), torch.from_numpy(sbar), 1.5
    )
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-7)  # pow of two libraries: last place of w~
    assert degenerate.tolist() == flags.tolist()
    plain, _ = objective_wise(scores, mask, group, weights)
    same, _ = ops.objective_wise(*map(torch.from_numpy, (scores, mask, group)), 90, torch.from_numpy(weights))
    assert same.numpy().tobytes() == plain.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tier_expectation(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    logits = (5 * torch.randn(64, 4099)).to(dtype)
    ids, values = torch.tensor([11, 4, 4098, 900]), torch.tensor([0.0, 1.0, 2.0, 5.0])
    full = torch.log_softmax(logits.double(), -1)[:, ids]
    threshold = float(full.exp().sum(-1).median()) * 1.0001
    want = tier_expectation(full.numpy(), values.numpy(), threshold)
    got = ops.tier_expectation(logits, values, threshold, ids)
    for name, g in zip(("value", "entropy", "mass"), got):
        np.testing.assert_allclose(g.numpy(), getattr(want, name), rtol=1e-6, atol=1e-7)
    assert got[3].tolist() == want.read.tolist() and 0 < int(got[3].sum()) < 64
    gathered = full.to(dtype)
    want = tier_expectation(gathered.double().numpy(), values.numpy(), 0.0)
    got = ops.tier_expectation(gathered, values, 0.0)
    for name, g in zip(("value", "entropy", "mass"), got):
        np.testing.assert_allclose(g.numpy(), getattr(want, name), rtol=3e-7, atol=1e-7)


def test_tier_expectation_edges() -> None:
    inf = float("inf")
    rows = torch.tensor([[-inf, 0.0], [-inf, -inf], [float("nan"), -1.0], [-900.0, -900.0]])
    value, entropy, mass, read = ops.tier_expectation(rows, torch.tensor([0.0, 3.0]), 0.0)
    assert value[0] == 3 and entropy[0] == 0 and mass[0] == 1 and value[3] == 1.5
    assert value[1].isnan() and mass[1] == 0 and value[2].isnan() and mass[2].isnan()
    assert read.tolist() == [True, False, False, True]
    with pytest.raises(RuntimeError, match="vocabulary"):
        ops.tier_expectation(torch.zeros(1, 8), torch.tensor([0.0, 1.0]), 0.0, torch.tensor([3, 8]))


def test_under_torch_compile(kit) -> None:
    table = torch.from_numpy(pack_rubrics([kit.rubric([{"weight": 1}, {"weight": 2}])]).words)

    def step(scores, offsets, rubric, group):
        out = ops.aggregate(scores, None, offsets, rubric, table)
        return ops.group_advantages(out.reward, out.valid, group, 4)[0] * 2

    torch.manual_seed(0)
    args = (torch.rand(32), torch.arange(0, 33, 2), torch.zeros(16, dtype=torch.int32), torch.arange(16) % 4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert bits(compiled(*args)) == bits(step(*args))
    for op, inputs in (
        (torch.ops.megarubric.aggregate, (*args[:1], None, *args[1:3], table, True, 2)),
        (torch.ops.megarubric.tier_expectation, (torch.rand(3, 2).log(), torch.rand(2), 0.5)),
        (torch.ops.megarubric.sweep, (args[0], None, *args[1:3], table[None])),
    ):
        torch.library.opcheck(op.default, inputs, test_utils=("test_schema", "test_faketensor"))
