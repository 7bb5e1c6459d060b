"""The CUDA kernels' logic without a GPU: the .cu files compiled for the CPU (host_cuda/host_device.h), their bits held
against the CPU kernels'. On a GPU, tests/gpu does this for real."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from megarubric.exchange.digest import digest_table, sum128
from megarubric.reward import ops
from megarubric.reward.table import pack_rubrics, stack_tables

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(not ops.available() or COMPILER is None, reason="needs the CPU ops and a C++ compiler")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    """`torch.ops.megarubric_host`: the ops' schemas, answered by the CUDA sources."""
    library = tmp_path_factory.mktemp("host_cuda") / "host_ops.so"
    torch_dir = Path(importlib.util.find_spec("torch").origin).parent
    command = [
        *(COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"),
        *("-DMEGARUBRIC_SCALAR_LANES", "-DMEGARUBRIC_HOST_DEVICE", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f"-I{CSRC}", f"-I{Path(__file__).parent / 'host_cuda'}", f"-I{torch_dir / 'include'}"),
        *("-x", "c++", str(CSRC / "bindings.cpp"), *map(str, sorted(CSRC.glob("*.cu")))),
        *(f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(str(library))
    return torch.ops.megarubric_host


def bits(t: torch.Tensor) -> bytes:
    return (torch.nan_to_num(t, nan=-777.0) if t.is_floating_point() else t).numpy().tobytes()


def assert_same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and bits(x) == bits(y)


def make(kit, seed: int, n_rubrics: int, n: int):
    rng = random.Random(seed)
    objects = [kit.random_rubric(rng) for _ in range(n_rubrics)]
    rubrics = [kit.parse(o) for o in objects]
    table = pack_rubrics(rubrics)
    index = np.array([rng.randrange(n_rubrics) for _ in range(n)], np.int32)
    rows = [kit.random_scores(rng, objects[r]) for r in index]
    cells = [row.get(c.id) for row, r in zip(rows, index) for c in rubrics[r].criteria]
    scores = torch.tensor([float("nan") if c is None else c for c in cells])
    mask = torch.tensor([c is not None for c in cells], dtype=torch.bool)
    words = torch.from_numpy(table.words)
    return [scores, mask, torch.from_numpy(table.offsets(index)), torch.from_numpy(index), words], table


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 700])
def test_aggregate(kit, host, n: int) -> None:
    args, table = make(kit, n, 40, n)
    wanted = torch.ops.megarubric.aggregate(*args, True, table.max_pairs + 1)
    assert_same(host.aggregate(*args, True, table.max_pairs + 1), wanted)
    assert_same(host.aggregate(*args, False, 0), torch.ops.megarubric.aggregate(*args, False, 0))


def test_aggregate_unaligned_and_without_mask(kit, host) -> None:
    args, table = make(kit, 1, 20, 300)
    want = torch.ops.megarubric.aggregate(*args, True, table.max_pairs)
    for shift in (1, 2, 3):
        shifted = list(args)
        shifted[0] = torch.cat([torch.zeros(shift), args[0]])[shift:]
        shifted[1] = torch.cat([torch.zeros(shift, dtype=torch.bool), args[1]])[shift:]
        assert_same(host.aggregate(*shifted, True, table.max_pairs), want)
    full = [args[0].nan_to_num(0.25), None, *args[2:]]
    assert_same(host.aggregate(*full, True, 9), torch.ops.megarubric.aggregate(*full, True, 9))


def test_aggregate_wide_rows_do_not_fit_shared_memory(kit, host) -> None:
    """A few very long rubrics among short ones: those blocks read from global memory."""
    wide = kit.rubric(
        [{"weight": 1 + k % 3, "saturation": {"theta": 0.5, "beta": 2.0}} for k in range(900)],
        [{"a": "c3", "b": "c800", "weight": 0.5, "kind": "min"}, {"a": "c0", "b": "c1", "weight": -1, "kind": "gap"}],
    )
    table = pack_rubrics([kit.rubric([{}, {"weight": -1}]), wide])
    index = np.array([1 if i % 50 == 7 else 0 for i in range(400)], np.int32)
    offsets = torch.from_numpy(table.offsets(index))
    torch.manual_seed(0)
    scores, mask = torch.rand(int(offsets[-1])), torch.rand(int(offsets[-1])) > 0.2
    scores[~mask] = float("nan")
    scores[int(offsets[57]) + 5], mask[int(offsets[57]) + 5] = 2.0, True
    args = [scores, mask, offsets, torch.from_numpy(index), torch.from_numpy(table.words)]
    assert_same(host.aggregate(*args, True, 2), torch.ops.megarubric.aggregate(*args, True, 2))


def test_aggregate_bad_input(kit, host) -> None:
    args, _ = make(kit, 2, 10, 500)
    scores, mask, offsets, rubric, _ = args
    judged = torch.nonzero(mask).flatten()
    for at, value in zip(judged[[30, 200, 201]].tolist(), (float("nan"), -0.5, float("inf"))):
        scores[at] = value
    rubric[77], rubric[300] = 99, -1
    assert_same(host.aggregate(*args, True, 4), torch.ops.megarubric.aggregate(*args, True, 4))
    offsets[401] += 1  # two samples whose lengths do not fit
    got, want = host.aggregate(*args, False, 0), torch.ops.megarubric.aggregate(*args, False, 0)
    assert_same(got, want)
    assert want[-1].tolist() == [int(judged[30]), 77]


def test_sweep(kit, host) -> None:
    def variant(theta: float):
        criteria = [{"saturation": {"theta": theta, "beta": 2.0}}, {"weight": -0.5}, {"weight": 0.3}]
        return pack_rubrics([kit.rubric(criteria, [{"a": "c0", "b": "c2", "weight": 0.5, "kind": "product"}])])

    tables = torch.from_numpy(stack_tables([variant(t) for t in (0.0, 0.3, 0.6, 0.9)]))
    torch.manual_seed(0)
    n = 333
    mask = torch.rand(3 * n) > 0.1
    args = (torch.rand(3 * n), mask, torch.arange(0, 3 * n + 1, 3), torch.zeros(n, dtype=torch.int32), tables)
    assert_same(host.sweep(*args), torch.ops.megarubric.sweep(*args))


def test_advantages(host) -> None:
    torch.manual_seed(0)
    rewards, valid, group = torch.rand(900), torch.rand(900) > 0.2, torch.randint(0, 130, (900,))
    order, offsets = ops.group_order(group, 130)
    for standardize in (False, True):
        args = (rewards, valid, offsets, order, standardize)
        assert_same(host.group_advantages(*args), torch.ops.megarubric.group_advantages(*args))
    args = (torch.rand(900, 4), torch.rand(900, 4) > 0.3, offsets, order, torch.randn(130, 4))
    assert_same(host.objective_wise(*args), torch.ops.megarubric.objective_wise(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 1000, 1003, 4099])
def test_tiers(host, dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    values, ids = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([4, 0, 2])
    logits = (6 * torch.randn(9, vocabulary)).to(dtype)
    logits[3, 1:4] = -float("inf")
    got = host.tier_expectation_logits(logits, ids, values, 0.01)
    want = torch.ops.megarubric.tier_expectation_logits(logits, ids, values, 0.01)
    for g, w in zip(got[:3], want[:3]):
        torch.testing.assert_close(g, w, rtol=3e-7, atol=1e-12)
    gathered = torch.log_softmax(logits.float(), -1)[:, ids].to(dtype)
    assert_same(
        host.tier_expectation(gathered, values, 0.2), torch.ops.megarubric.tier_expectation(gathered, values, 0.2)
    )


@pytest.mark.parametrize("tile", [16, 4096, 8192])
def test_weight_digest(host, tile: int) -> None:
    """Aligned and unaligned tensors, tails of every length, tensors without bytes first, between and last."""
    buffer = torch.from_numpy(np.random.default_rng(tile).integers(0, 256, 30_000, np.uint8))
    sizes = [0, 9001, 0, 16, 1, 8, 7, 8192, 8193, 0] if tile > 16 else [0, 33, 0, 16, 7, 0]
    spans, at = [], 0
    for k, nbytes in enumerate(sizes):
        at = -(-at // 256) * 256 + (k % 3 == 2)
        spans.append((at, nbytes))
        at += nbytes
    table, tiles = digest_table(spans, tile)
    wanted = torch.ops.megarubric.weight_digest(buffer, table, tile, tiles)
    assert [row.numpy().tobytes() for row in wanted] == [sum128(buffer[o : o + n].numpy().data) for o, n in spans]
    assert_same([host.weight_digest(buffer, table, tile, tiles)], [wanted])
    empty, none = digest_table([], tile)
    assert host.weight_digest(buffer, empty, tile, none).shape == (0, 2)
