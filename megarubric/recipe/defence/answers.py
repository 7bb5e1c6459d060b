"""A run's recorded answers as the miner reads them, and which of them earned abnormally much."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput
from megarubric.recipe.defence.numbers import robust_scale
from megarubric.recipe.records import StoredJudgement

_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")
_FLOOR = 0.02  # least scale of rewards in [0, 1]: below it a z-score measures rounding


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What mining needs of a rollout record (recipe/records.py). A record of an earlier form, without `group` or
    `attribution`, can be mined too: a group is then all answers to its prompt in the step."""

    step: int
    prompt_id: str
    prompt: str
    response: str
    reward: float | None
    valid: bool
    vetoed: bool
    group: int = 0
    sample: int = 0
    rubric_hash: str = ""
    veto: str | None = None
    judgements: dict[str, StoredJudgement] = {}
    attribution: dict[str, float] = {}

    @property
    def place(self) -> str:
        return f"step {self.step}, prompt {self.prompt_id}, sample {self.sample}"

    @property
    def judged_part(self) -> float:
        """The part of the base reward that judged criteria gave; a pair counts as judged when one of its two is. The
        whole reward where no attribution is recorded."""
        if not self.attribution:
            return self.reward or 0.0
        return sum(x for name, x in self.attribution.items() if any(self._judged(side) for side in name.split("*")))

    def _judged(self, criterion: str) -> bool:
        j = self.judgements.get(criterion)
        return j is not None and j.source != "check"


@dataclass(frozen=True, slots=True)
class Recorded:
    """All lines of a run, in order of step; `bad` names each line that could not be read."""

    lines: list[Line]
    bad: list[BadInput]


def read_lines(run_dir: Path) -> Recorded:
    """The lines of RUN_DIR/rollouts/step_N.jsonl. Raises BadInput when there is none."""
    directory = run_dir / "rollouts"
    files = sorted(
        (int(m[1]), path) for path in directory.glob("step_*.jsonl") if (m := _STEP_FILE.fullmatch(path.name))
    )
    if not files:
        raise BadInput(directory, None, "holds no step_N.jsonl: this is no run that has written answers")
    lines: list[Line] = []
    bad: list[BadInput] = []
    decode = msgspec.json.Decoder(Line).decode
    for _, path in files:
        for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
            if not text.strip():
                continue
            try:
                lines.append(decode(text))
            except (msgspec.MsgspecError, UnicodeError) as error:
                bad.append(BadInput(path, f"line {number}", f"is no rollout record: {error}"))
    if not lines:
        raise bad[0] if bad else BadInput(directory, None, "its files hold no answer")
    return Recorded(lines, bad)


@dataclass(frozen=True, slots=True)
class Field:
    """The answers that are mined: valid and not vetoed, N of them. A vetoed answer is caught already.

    `group` int64 [N] numbers the groups of one prompt in one step; `reward`, `judged` float64 [N]; `flagged` bool [N];
    `why` counts the flagged by the rule that flagged them first.
    """

    lines: list[Line]
    group: NDArray[np.int64]
    step: NDArray[np.int64]
    reward: NDArray[np.float64]
    judged: NDArray[np.float64]
    flagged: NDArray[np.bool_]
    why: dict[str, int]


def field_of(lines: Sequence[Line], z: float, top: float, base_share: float = 0.2) -> Field:
    """The answers to mine, with those flagged whose reward, or the part of it that judged criteria gave (without what
    checks add for this prompt or that), is abnormally high by one of three rules:

    - step: its excess over the median of its group is `z` robust deviations of the step's excesses or more;
    - history: it lies `z` robust deviations or more above the median of the run's first steps (the share `base_share`
      of its steps, one at least), and the answer is of none of these;
    - top: the reward reaches the quantile `top` of its step and lies above its group's median.

    Raises BadInput when no answer is valid and free of vetoes.
    """
    kept = [line for line in lines if line.valid and not line.vetoed and line.reward is not None]
    if not kept:
        raise BadInput("rollouts", None, "no answer is valid and free of vetoes: there is nothing to mine")
    numbers: dict[tuple[int, str, int], int] = {}
    group = np.array([numbers.setdefault((x.step, x.prompt_id, x.group), len(numbers)) for x in kept], np.int64)
    step = np.array([x.step for x in kept], np.int64)
    reward = np.array([x.reward for x in kept], np.float64)
    judged = np.array([x.judged_part for x in kept], np.float64)

    steps = np.unique(step)
    base = np.isin(step, steps[: max(1, round(base_share * len(steps)))])
    by_step, by_history, by_top = (np.zeros(len(kept), bool) for _ in range(3))
    for values in (reward, judged):
        centre, scale = float(np.median(values[base])), robust_scale(values[base], _FLOOR)
        by_history |= ~base & ((values - centre) / scale >= z)
        excess = values - _medians(group, values)[group]
        for s in steps:
            here = step == s
            by_step[here] |= excess[here] / robust_scale(excess[here], _FLOOR) >= z
            if values is reward:
                by_top[here] = (reward[here] >= np.quantile(reward[here], top)) & (excess[here] > 0)
    flagged = by_step | by_history | by_top
    why = {
        "step": int(by_step.sum()),
        "history": int((by_history & ~by_step).sum()),
        "top": int((by_top & ~by_step & ~by_history).sum()),
    }
    return Field(kept, group, step, reward, judged, flagged, why)


def _medians(group: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    members: defaultdict[int, list[float]] = defaultdict(list)
    for g, v in zip(group.tolist(), values.tolist()):
        members[g].append(v)
    return np.array([np.median(members[g]) for g in range(len(members))])
