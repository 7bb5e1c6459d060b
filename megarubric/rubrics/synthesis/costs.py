"""What synthesis costs: calls, tokens, money where prices are known, time."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from megarubric.errors import BadInput


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """Calls made, tokens read and tokens written by one model."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other))))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(a - b for a, b in zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other))))

    def __bool__(self) -> bool:
        return any(msgspec.structs.astuple(self))


class Price(msgspec.Struct, frozen=True):
    """Currency units for a million tokens read and for a million written."""

    read: float
    written: float

    def of(self, spent: Spent) -> float:
        """What `spent` costs, in currency units."""
        return (spent.prompt_tokens * self.read + spent.completion_tokens * self.written) / 1e6


def parse_prices(given: list[str]) -> dict[str, Price]:
    """Prices by role from ``[model=|policy=|judge=]READ/WRITTEN``, each role once; no role means the drafting model.

    Raises BadInput.
    """
    prices: dict[str, Price] = {}
    for text in given:
        found = re.fullmatch(r"(?:(model|policy|judge)=)?(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)", text)
        if found is None:
            raise BadInput("command line", f"--price {text}", "is [model=|policy=|judge=]READ/WRITTEN, e.g. 0.5/1.5")
        role = found[1] or "model"
        if role in prices:
            raise BadInput("command line", f"--price {text}", f"a second price of the {role}")
        prices[role] = Price(float(found[2]), float(found[3]))
    return prices


class CostLine(msgspec.Struct, frozen=True):
    """The cost of one model: the roles it played, what this run and all runs of the journal spent, and the money of all
    runs (None without a price)."""

    roles: tuple[str, ...]
    identity: str
    now: Spent
    total: Spent
    money: float | None = None


def cost_lines(
    roles: Mapping[str, str], now: Mapping[str, Spent], before: Mapping[str, Spent], prices: Mapping[str, Price]
) -> list[CostLine]:
    """One line a model. `roles` maps a role to the identity that plays it; two roles of one model share its price."""
    by_identity: dict[str, list[str]] = {}
    for role, identity in roles.items():
        by_identity.setdefault(identity, []).append(role)
    lines = []
    for identity, names in by_identity.items():
        spent = now.get(identity, Spent())
        total = spent + before.get(identity, Spent())
        price = next((prices[name] for name in names if name in prices), None)
        lines.append(CostLine(tuple(names), identity, spent, total, None if price is None else price.of(total)))
    return lines


def cost_text(lines: list[CostLine], currency: str, seconds: float) -> str:
    """The cost line: every model's calls and tokens, the sum of money where there are prices, and the wall time."""
    parts = []
    for line in lines:
        t = line.total
        tokens = f"{t.prompt_tokens:,} + {t.completion_tokens:,} tokens"
        again = "" if line.total == line.now else f" ({line.now.calls:,} of them in this run)"
        parts.append(f"{'+'.join(line.roles)}: {t.calls:,} calls{again}, {tokens}")
    priced = [line.money for line in lines if line.money is not None]
    if priced:
        missing = sum(1 for line in lines if line.money is None and line.total)
        note = f" without {missing} model(s) that have no price" if missing else ""
        parts.append(f"{sum(priced):.4f} {currency}{note}")
    return "cost: " + "; ".join([*parts, f"{seconds:.1f} s"])
