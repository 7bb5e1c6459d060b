"""Rubric builder, a float64 oracle written apart from the package, and random cases."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from megarubric.rubrics import Rubric, parse_rubric

settings.register_profile("reward", deadline=None)  # a busy machine is no failure
settings.load_profile("reward")

EDGE_BETAS = (1e-30, 1e-8, 1e-4, 0.3, 1.0, 3.0, 20.0, 1e4, 1e30)
EDGE_THETAS = (0.0, 0.25, 0.7, 0.99, 0.9999999)


def f32(x: float) -> float:
    """Nearest float32, as a float."""
    return struct.unpack("f", struct.pack("f", x))[0]


def rubric_object(
    criteria: list[dict[str, Any]], pairs: list[dict[str, Any]] | None = None, **fields: Any
) -> dict[str, Any]:
    """A rubric file's content with everything but criteria and pairs filled in."""
    for number, criterion in enumerate(criteria):
        criterion.setdefault("id", f"c{number}")
        criterion.setdefault("description", "Says so.")
    return {
        "id": fields.pop("id", "test.rubric"),
        "version": 1,
        "title": "Test",
        "scope": "dataset",
        "family": "style",
        "provenance": {"author": "human", "source": "tests", "licence": "Apache-2.0"},
        "criteria": criteria,
        "pairs": pairs or [],
        **fields,
    }


class Oracle:
    """The contract in float64, from the rubric's plain dict: exact sums (fsum), libm functions, no shared code."""

    def __init__(self, rubric: dict[str, Any], scores: dict[str, float | None]) -> None:
        judged = {c["id"]: scores[c["id"]] for c in rubric["criteria"] if scores.get(c["id"]) is not None}
        curve = {c["id"]: self.curve(c.get("saturation")) for c in rubric["criteria"]}
        top = {name: curve[name](1.0) for name in curve}
        g = {name: curve[name](s) for name, s in judged.items()}
        weight = {c["id"]: float(c.get("weight", 1.0)) for c in rubric["criteria"]}
        terms = {name: weight[name] * g[name] for name in judged}
        ceilings = [weight[name] * top[name] for name in judged if weight[name] > 0]
        shares: list[tuple[str, float]] = []
        for pair in rubric["pairs"]:
            a, b = pair["a"], pair["b"]
            if a in judged and b in judged:
                phi, best = {
                    "product": (g[a] * g[b], top[a] * top[b]),
                    "min": (min(g[a], g[b]), min(top[a], top[b])),
                    "gap": (abs(g[a] - g[b]), 0.0),
                }[pair["kind"]]
                shares.append((f"{a}*{b}", pair["weight"] * phi))
                if pair["weight"] > 0:
                    ceilings.append(pair["weight"] * best)
        total = math.fsum(ceilings)
        self.attribution = dict.fromkeys([c["id"] for c in rubric["criteria"]], 0.0)
        self.attribution.update({f"{p['a']}*{p['b']}": 0.0 for p in rubric["pairs"]})
        self.r0: float | None = None
        self.condition = 1.0  # sum of |terms| over the divisor: how far cancellation may amplify rounding
        if total > 0:
            everything = [*terms.items(), *shares]
            raw = math.fsum(value for _, value in everything) / total
            self.condition = math.fsum(abs(value) for _, value in everything) / total
            self.r0 = min(1.0, max(0.0, raw))
        elif any(weight[name] < 0 for name in judged):
            everything = list(terms.items())
            total = math.fsum(abs(weight[name]) for name in judged)
            self.condition = 1.0 + math.fsum(abs(value) for _, value in everything) / total
            self.r0 = min(1.0, max(0.0, 1.0 + math.fsum(value for _, value in everything) / total))
        else:
            everything = []
        for name, value in everything:
            self.attribution[name] += value / total
        self.r1, self.slope = self.shape(rubric.get("shaping"), self.r0)
        self.veto, missing = None, False
        policy = rubric.get("on_missing_veto", "unscored")
        for c in rubric["criteria"]:
            if c.get("veto"):
                threshold = c["veto"].get("threshold", 0.5)
                detector = weight[c["id"]] < 0 or (weight[c["id"]] == 0 and c["veto"].get("detector", False))
                s = judged.get(c["id"])
                if s is None:
                    failing, missing = policy == "fail", missing or policy == "unscored"
                else:
                    failing = (s >= threshold) == detector
                if failing and self.veto is None:
                    self.veto = c["id"]
        self.vetoed = self.veto is not None
        self.valid = self.vetoed or (self.r0 is not None and not missing)
        self.reward = rubric.get("veto_reward", 0.0) if self.vetoed else self.r1 if self.valid else None

    @staticmethod
    def curve(saturation: dict[str, float] | None) -> Callable[[float], float]:
        if saturation is None:
            return lambda s: s
        theta, beta = saturation["theta"], saturation["beta"]
        return lambda s: s if s <= theta else theta - (1 - theta) * math.expm1(-beta * (s - theta) / (1 - theta)) / beta

    @staticmethod
    def shape(shaping: dict[str, float] | None, r0: float | None) -> tuple[float | None, float]:
        """(r1, slope of h at r0)."""
        if shaping is None or r0 is None:
            return r0, 1.0
        kappa, alpha, p = shaping["kappa"], shaping["alpha"], shaping["power"]
        t = max(0.0, (r0 - kappa) / (1 - kappa))
        scale = 1 + alpha * (1 - kappa)
        slope = (1 + alpha * p * t ** (p - 1)) / scale if t > 0 else 1 / scale
        return (r0 + alpha * (1 - kappa) * t**p) / scale, slope


def random_rubric(rng: random.Random) -> dict[str, Any]:
    """Any rubric the schema allows, edge values likely. All numbers are float32 values."""
    flavour = rng.random()
    criteria: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 9)):
        weight = rng.choice(
            [0.0, 1.0, 0.5, -0.5, f32(rng.uniform(0.1, 3)), f32(rng.uniform(0.1, 3)), f32(-rng.uniform(0.1, 2))]
        )
        if flavour < 0.1:
            weight = -abs(weight)  # all pitfalls
        elif flavour < 0.5:
            weight = abs(weight)
        criterion: dict[str, Any] = {"weight": weight}
        if rng.random() < 0.5:
            theta = rng.choice([*EDGE_THETAS, rng.random()])
            criterion["saturation"] = {
                "theta": f32(theta),
                "beta": f32(rng.choice([*EDGE_BETAS, 10 ** rng.uniform(-3, 3)])),
            }
        if rng.random() < 0.15:
            criterion["veto"] = {"threshold": rng.choice([0.5, 0.25, 1.0]), "detector": rng.random() < 0.5}
        criteria.append(criterion)
    pairs = []
    for _ in range(rng.randint(0, 4) if len(criteria) > 1 and flavour > 0.05 else 0):
        a, b = rng.sample(range(len(criteria)), 2)
        kind = rng.choice(["product", "min", "gap"])
        pairs.append({"a": f"c{a}", "b": f"c{b}", "kind": kind, "weight": f32(rng.choice([1, 0.3, -0.7, 2.5]))})
    fields: dict[str, Any] = {"on_missing_veto": rng.choice(["unscored", "pass", "fail"])}
    if rng.random() < 0.5:
        fields["shaping"] = {
            "kappa": f32(rng.choice([0.0, 0.6, 0.9, rng.random() * 0.95])),
            "alpha": f32(rng.choice([0.0, 1.0, 5.0, 10 ** rng.uniform(-2, 2)])),
            "power": f32(rng.choice([1.0, 2.0, 3.0, 1 + 5 * rng.random()])),
        }
    if rng.random() < 0.2:
        fields["veto_reward"] = f32(rng.uniform(-1, 0.5))
    return rubric_object(criteria, pairs, **fields)


def random_scores(rng: random.Random, rubric: dict[str, Any]) -> dict[str, float | None]:
    """Scores with the edges 0, theta and 1 likely; sometimes everything masked."""
    hidden = rng.choice([0.0, 0.0, 0.2, 0.6, 1.0])
    scores: dict[str, float | None] = {}
    for criterion in rubric["criteria"]:
        theta = criterion.get("saturation", {"theta": 0.5})["theta"]
        s = f32(rng.choice([0.0, 1.0, theta, 0.5, rng.random(), rng.random()]))
        if rng.random() >= hidden:
            scores[criterion["id"]] = s
        elif rng.random() < 0.5:
            scores[criterion["id"]] = None
    return scores


def assert_close(got: Any, want: Oracle) -> None:
    """`got` (a RewardResult) within 2e-6 of the oracle: relative, times what cancellation and shaping amplify."""
    assert (got.valid, got.vetoed, got.veto) == (want.valid, want.vetoed, want.veto)
    assert (got.r0 is None) == (want.r0 is None) and (got.reward is None) == (want.reward is None)
    slack0 = 2e-6 * max(want.condition, abs(want.r0 or 0.0))
    if want.r0 is not None:
        assert abs(got.r0 - want.r0) <= slack0
        slack1 = 2e-6 * abs(want.r1) + want.slope * slack0
        assert abs(got.r1 - want.r1) <= slack1
        if not want.vetoed and want.valid:
            assert abs(got.reward - want.reward) <= slack1
    if want.vetoed:
        assert got.reward == f32(want.reward)
    assert got.attribution.keys() == want.attribution.keys()
    for key, share in want.attribution.items():
        assert abs(got.attribution[key] - share) <= 2e-6 * max(abs(share), want.condition), key


class Kit:
    """What the tests of this directory share (tests are no package: nothing can be imported between them)."""

    f32 = staticmethod(f32)
    rubric_object = staticmethod(rubric_object)
    random_rubric = staticmethod(random_rubric)
    random_scores = staticmethod(random_scores)
    Oracle = Oracle
    assert_close = staticmethod(assert_close)

    @staticmethod
    def rubric(criteria: list[dict[str, Any]], pairs: list[dict[str, Any]] | None = None, **fields: Any) -> Rubric:
        return parse_rubric(rubric_object(criteria, pairs, **fields), "tests")

    @staticmethod
    def parse(obj: dict[str, Any]) -> Rubric:
        return parse_rubric(obj, "tests")


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
