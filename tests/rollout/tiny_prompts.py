"""Prompts of plain token ids for tests that sample."""

from __future__ import annotations

import numpy as np

from megarubric.rollout.data import Prompt
from megarubric.rubrics import Criterion, Provenance, Rubric


def make_prompts(n: int) -> list[Prompt]:
    rubric = Rubric(
        id="plain",
        version=1,
        title="Plain",
        scope="task",
        family="creative",
        provenance=Provenance(author="human", source="test", licence="Apache-2.0"),
        criteria=(Criterion(id="plain", description="Is plain.", weight=1.0),),
    )
    return [Prompt(f"p{i}", f"prompt {i}", rubric, np.arange(3 + i, 15 + 2 * i, dtype=np.int32)) for i in range(n)]
