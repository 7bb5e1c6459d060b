"""`reward.defence`: the vetoes of defence rubrics as gates in every prompt's rubric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from megarubric.errors import BadInput
from megarubric.rollout.data import PromptRow
from megarubric.rubrics import Criterion, Rubric, Veto, load_rubrics, parse_rubric, to_dict

PREFIX = "defence:"


def read_defences(paths: Iterable[str | Path]) -> list[Rubric]:
    """The rubrics of all `paths`, in order.

    Raises BadInput for one that has no veto, is there twice, or has a veto that needs a reference answer, which the
    prompts it is for do not share.
    """
    found: dict[str, Rubric] = {}
    for path in paths:
        for rubric in load_rubrics(path):
            if rubric.id in found:
                raise BadInput(path, f"rubric {rubric.id}", "is in reward.defence twice")
            gates = [c for c in rubric.criteria if c.veto is not None]
            if not gates:
                raise BadInput(path, f"rubric {rubric.id}", "has no veto criterion, so it defends nothing")
            needing = next((c.id for c in gates if c.needs_reference), None)
            if needing is not None:
                raise BadInput(
                    path, f"rubric {rubric.id}, criterion {needing}", "needs a reference: no veto for all prompts"
                )
            found[rubric.id] = rubric
    return list(found.values())


def gates_of(defence: Rubric) -> list[Criterion]:
    """The veto criteria of a defence rubric as pure gates: weight 0, so that they change no base reward, with the id
    ``defence:RUBRIC:CRITERION``. A gate fails where the criterion did: a negative weight becomes a detector."""
    gates = []
    for c in defence.criteria:
        if c.veto is None:
            continue
        fails_high = c.weight < 0 or (c.weight == 0 and c.veto.detector)
        veto = Veto(threshold=c.veto.threshold, detector=fails_high)
        gate_id = f"{PREFIX}{defence.id}:{c.id}"
        gates.append(msgspec.structs.replace(c, id=gate_id, weight=0.0, veto=veto, saturation=None))
    return gates


def defended(rubric: Rubric, defences: Sequence[Rubric], where: object = "reward.defence") -> Rubric:
    """`rubric` with the gates of `defences` behind its own criteria. It is another rubric, with another hash: nothing
    judged or recorded without the gates passes for judged with them. Without defences it is `rubric` itself.

    Raises BadInput when the rubric has a criterion of such an id already.
    """
    gates = [gate for defence in defences for gate in gates_of(defence)]
    if not gates:
        return rubric
    own = {c.id for c in rubric.criteria}
    twice = next((g.id for g in gates if g.id in own), None)
    if twice is not None:
        raise BadInput(where, f"rubric {rubric.id}", f"has a criterion {twice} already: is the defence applied twice?")
    # Through the parser, which is the only way a rubric comes to be: the sum is checked like any file.
    whole = msgspec.structs.replace(rubric, criteria=(*rubric.criteria, *gates))
    return parse_rubric(to_dict(whole), where)


def defend_rows(rows: Sequence[PromptRow], defences: Sequence[Rubric], where: object) -> list[PromptRow]:
    """Prompt rows whose rubrics carry the gates of `defences`; each distinct rubric is made once."""
    if not defences:
        return list(rows)
    made: dict[str, Rubric] = {}
    for row in rows:
        if row.rubric.hash not in made:
            made[row.rubric.hash] = defended(row.rubric, defences, where)
    return [replace(row, rubric=made[row.rubric.hash]) for row in rows]
