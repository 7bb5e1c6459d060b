"""How a judge is asked: the settings of `megarubric.judging.judge.Judge`, and where a run's configuration sets them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import msgspec

from megarubric.config.judge import Judge as JudgeSection
from megarubric.errors import BadInput
from megarubric.judging.modes import Mode
from megarubric.rubrics import Criterion, Rubric


class JudgeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a judge is asked.

    `timeout_s` bounds one call to the backend (the backend says how many queries that is), counted from when it is its
    turn; `retries` says how often a failed call is repeated.

    `mode` is how criteria are asked: ``tier`` (one sign, from log-probabilities), ``reason`` (reasons, then the
    verdict) or ``all`` (one call for all criteria of an answer). `modes` says otherwise for some of them: a glob on the
    criterion's id, or on ``rubric id/criterion id`` where it has a slash; the first that fits counts. `draws`,
    `temperature` and `max_tokens` hold for the modes that write.

    `escalate_above`: a judgement whose entropy is above this share of its maximum, or that is unread, is asked of the
    second judge, where there is one; `second_template` is that judge's own tier template (None: the first judge's).
    """

    template: str = "tier"
    reason_template: str = "reason"
    all_template: str = "all"
    second_template: str | None = None
    min_tier_mass: float = 0.5
    timeout_s: float = 120.0
    retries: int = 1
    mode: Mode = "tier"
    modes: dict[str, Mode] = {}
    draws: int = 1
    temperature: float = 0.0
    max_tokens: int = 512
    escalate_above: float = 0.9

    def __post_init__(self) -> None:
        if self.draws < 1 or self.retries < 0 or self.timeout_s <= 0 or self.max_tokens < 1:
            raise ValueError("draws and max_tokens are at least 1, retries at least 0, timeout_s above 0")
        if self.draws > 1 and self.temperature <= 0:
            raise ValueError("several draws at temperature 0 are one draw: set a temperature")

    @property
    def writes(self) -> frozenset[Mode]:
        """The modes in use in which the judge writes text."""
        return frozenset({self.mode, *self.modes.values()} - {"tier"})

    def mode_of(self, rubric: Rubric, criterion: Criterion) -> Mode:
        return next((mode for glob, mode in self.modes.items() if _fits(glob, rubric, criterion)), self.mode)

    def check_modes(self, rubrics: Iterable[Rubric], where: object) -> None:
        """Raises BadInput for a glob in `modes` that fits no judged criterion of `rubrics`: a slip of the pen would
        otherwise change nothing and say nothing."""
        unused = dict.fromkeys(self.modes)
        for rubric in rubrics:
            for criterion in rubric.criteria:
                if not unused:
                    return
                if criterion.check is None:
                    for glob in [g for g in unused if _fits(g, rubric, criterion)]:
                        del unused[glob]
        if unused:
            reason = f"{next(iter(unused))!r} fits no judged criterion of this run's rubrics"
            raise BadInput(where, "judge.modes", reason)


def _fits(glob: str, rubric: Rubric, criterion: Criterion) -> bool:
    return fnmatchcase(f"{rubric.id}/{criterion.id}" if "/" in glob else criterion.id, glob)


def settings_of(j: JudgeSection) -> JudgeSettings:
    """The settings that the `judge` section of a run's configuration asks for."""
    names = {f.name for f in msgspec.structs.fields(JudgeSettings)}
    return JudgeSettings(**{f: getattr(j, f) for f in names})
