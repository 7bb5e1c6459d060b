"""How many: the relation arguments shared by every kind that counts something."""

from __future__ import annotations

from typing import Literal

from megarubric.rubrics.checks.registry import CheckArgs, Count

# IFEval has the first two.
Relation = Literal["at least", "less than", "at most", "exactly"]
RangeRelation = Literal["at least", "less than", "at most", "exactly", "between"]


def holds(count: int, relation: str, n: int) -> bool:
    """Whether `count` stands in `relation` to `n`."""
    if relation == "at least":
        return count >= n
    if relation == "less than":
        return count < n
    if relation == "at most":
        return count <= n
    assert relation == "exactly", relation
    return count == n


class Range(CheckArgs, frozen=True):
    """`relation` with the kind's own number (IFEval's form), or `min` and/or `max`, both inclusive (ours).

    `relation: between` may be said beside `min` and `max`, or left out.
    """

    relation: RangeRelation | None = None
    min: Count | None = None
    max: Count | None = None

    def number(self) -> tuple[str, int | None]:
        """Name and value of the kind's own number."""
        raise NotImplementedError

    def problem(self) -> str | None:
        name, n = self.number()
        ranged = self.min is not None or self.max is not None
        if self.relation == "between" or (self.relation is None and ranged):
            if n is not None:
                return f"{name} goes with 'at least', 'less than', 'at most' or 'exactly'; a range has min and max"
            if not ranged:
                return "relation 'between' needs min, max or both"
            if self.min is not None and self.max is not None and self.min > self.max:
                return f"min {self.min} is above max {self.max}"
            return None
        if ranged:
            return f"min and max go with relation 'between'; {self.relation!r} takes {name}"
        if n is None:
            return f"the argument {name} is missing"
        if self.relation is None:
            return "the argument relation is missing"
        return None

    def admits(self, count: int) -> bool:
        """Whether `count` is what the arguments ask for."""
        if self.min is not None or self.max is not None:
            return (self.min is None or count >= self.min) and (self.max is None or count <= self.max)
        n = self.number()[1]
        assert self.relation is not None and n is not None
        return holds(count, self.relation, n)
