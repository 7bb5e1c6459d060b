"""One demand a criterion: what is compound is split, by rule where the sentence allows it, else by a model.

Compound is what the lint rule calls compound: partial credit on joint demands is the commonest way a judge is fooled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from megarubric.rubrics.lint.rules import compound_criterion
from megarubric.rubrics.parse import shown
from megarubric.rubrics.schema import Criterion, Rubric, Tier
from megarubric.rubrics.synthesis.draft import read_criterion, read_object
from megarubric.rubrics.synthesis.model import BadDraft

MAX_PARTS = 6
_SUBJECT = re.compile(
    r"(?P<subject>(?:the|this|your)\s+(?:answer|reply|response|story|text|poem|letter|message|note|email|explanation))\s+",
    re.IGNORECASE,
)
# "Names the ferry and explains why it is late": what follows "and" begins with a verb of the same subject.
_JOINT = re.compile(r"\s*,?\s+and\s+(?:also\s+)?(?=[a-z]+(?:s|es)\s)")


def compound(criterion: Criterion) -> str | None:
    """Why lint calls the criterion compound, or None."""
    found = compound_criterion(Rubric(id="x", criteria=(criterion,)))
    return next((message for _, message in found), None)


def split_by_rule(criterion: Criterion) -> tuple[Criterion, ...] | None:
    """The parts of "[The answer] verbs X and verbs Y", each with an equal share of the weight and the tiers no and yes.

    None when the sentence is not of that form, when a part would still be compound or would be a fragment, and when
    tiers or a veto say what the joint demand is worth: those belong to the whole.
    """
    if criterion.check is not None or criterion.veto is not None or len(criterion.tiers or ()) > 2:
        return None
    text = criterion.description.rstrip(". ")
    if ";" in text or "." in text:
        return None
    subject = _SUBJECT.match(text)
    head = subject["subject"] + " " if subject else ""
    pieces = _JOINT.split(text[subject.end() :] if subject else text)
    if not 2 <= len(pieces) <= MAX_PARTS or any(len(piece.split()) < 3 for piece in pieces):
        return None
    if subject is None and not re.match(r"[A-Z][a-z]+s\b", pieces[0]):
        return None
    parts = []
    for piece in pieces:
        sentence = head + piece if head else piece[:1].upper() + piece[1:]
        parts.append(_part(criterion, sentence.strip() + ".", len(pieces)))
    return None if any(compound(part) for part in parts) else tuple(parts)


def parse_split(text: str, asked: Sequence[Criterion]) -> dict[int, tuple[Criterion, ...]]:
    """The parts in a model's reply, by position in `asked`: a criterion that is missing there, or of which one part
    cannot be used or is compound still, is left out.

    Raises BadDraft when the reply as a whole cannot be read.
    """
    value = read_object(text)
    items = value.get("parts")
    if set(value) != {"parts"} or not isinstance(items, list):
        raise BadDraft("the reply must be an object with the one key parts, a list")
    if len(items) > MAX_PARTS * len(asked):
        raise BadDraft(f"{len(items)} parts of {len(asked)} criteria")
    by_criterion: dict[int, list[Criterion | None]] = {}
    for item in items:
        number = item.get("of") if isinstance(item, dict) else None
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(asked):
            raise BadDraft(f"a part is of criterion {shown(number)}, and there are {len(asked)}")
        whole = asked[number - 1]
        try:
            part = read_criterion({key: value for key, value in item.items() if key != "of"})
        except BadDraft:
            by_criterion.setdefault(number - 1, []).append(None)
            continue
        share = sum(1 for i in items if isinstance(i, dict) and i.get("of") == number)
        kept = _part(whole, part.description, share, part.tiers)
        by_criterion.setdefault(number - 1, []).append(None if compound(kept) else kept)
    return {
        at: tuple(p for p in parts if p is not None)
        for at, parts in by_criterion.items()
        if None not in parts and 2 <= len(parts) <= MAX_PARTS
    }


def _part(whole: Criterion, description: str, of: int, tiers: tuple[Tier, ...] | None = None) -> Criterion:
    """One part of `whole`. A veto stays on none of them: which part it was meant for is not known."""
    return msgspec.structs.replace(whole, description=description, weight=whole.weight / of, tiers=tiers, veto=None)
