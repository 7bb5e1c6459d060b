"""What a lint rule is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from megarubric.rubrics.schema import Rubric


class Finding(NamedTuple):
    """One row of `rubrics lint --json`. `criterion` is None when the whole rubric is meant."""

    file: str
    rubric: str | None
    criterion: str | None
    rule: str
    message: str


class Rule(NamedTuple):
    """A lint rule: why it is there, and a rubric fragment it finds."""

    id: str
    reason: str
    example: str
    fixable: bool


Check = Callable[[Rubric], Iterator[tuple[str | None, str]]]  # yields (criterion id, message)

RULES: dict[str, Rule] = {}
CHECKS: list[tuple[str, Check]] = []


def rule(rule_id: str, reason: str, example: str, *, fixable: bool = False) -> Callable[[Check], Check]:
    """Decorator: makes a function that reads one rubric a rule."""

    def add(check: Check) -> Check:
        declare(rule_id, reason, example, fixable=fixable)
        CHECKS.append((rule_id, check))
        return check

    return add


def declare(rule_id: str, reason: str, example: str, *, fixable: bool = False) -> None:
    """List a rule that is not a function of one rubric."""
    assert rule_id not in RULES, rule_id
    RULES[rule_id] = Rule(rule_id, reason, example, fixable)
