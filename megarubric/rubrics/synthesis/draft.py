"""From a model's reply to a draft. Only the agreed form counts: one JSON object, nothing around it.

A reply is untrusted text of any length. Whatever it holds, reading it ends in a draft or in one sentence; what is wrong
with a single criterion costs that criterion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from megarubric.rubrics.importers.model import slug, unique_ids
from megarubric.rubrics.load import STRICT_JSON
from megarubric.rubrics.parse import Problem, build, kind_name, shown
from megarubric.rubrics.schema import FAMILIES, Criterion, Family
from megarubric.rubrics.synthesis.model import BadDraft, Draft, Note

MAX_REPLY = 200_000  # characters
MAX_CRITERIA = 40
MAX_TEXT = 1_000  # characters of a description or a tier's text
_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCED = re.compile(r"\A```(?:json)?[ \t]*\n(.*)\n```\Z", re.DOTALL)
_CRITERION_KEYS = frozenset({"id", "description", "weight", "tiers", "check", "needs_reference", "veto", "saturation"})


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that is the whole reply, but for closed reasoning before it and a code fence around it.

    Raises BadDraft: text around it, half of it, a key twice, NaN, nested too deeply, too long, not an object.
    """
    if len(text) > MAX_REPLY:
        raise BadDraft(f"the reply has {len(text)} characters, more than {MAX_REPLY}")
    body = _REASONING.sub("", text).strip()
    if fenced := _FENCED.match(body):
        body = fenced[1].strip()
    if not body:
        raise BadDraft("the reply is empty")
    if body.startswith("<think>"):
        raise BadDraft("the reply is reasoning that never ends")
    if not body.startswith("{"):
        where = "text before the JSON object" if "{" in body else "no JSON object in the reply"
        raise BadDraft(f"{where}: {shown(body[:60])}")
    try:
        value, end = STRICT_JSON.raw_decode(body)
    except json.JSONDecodeError as error:
        if error.pos >= len(body) or error.msg.startswith("Unterminated string"):
            raise BadDraft(f"not JSON: it ends in the middle, after {len(body)} characters") from None
        raise BadDraft(f"not JSON: {error.msg} (character {error.pos} of {len(body)})") from None
    except ValueError as error:  # a key twice, NaN, a number of thousands of digits
        raise BadDraft(f"not JSON: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:
        raise BadDraft("not JSON: nested too deeply") from None
    if body[end:].strip():
        raise BadDraft(f"text behind the JSON object: {shown(body[end:].strip()[:60])}")
    try:
        msgspec.json.encode(value)
    except (UnicodeError, RecursionError, OverflowError) as error:  # half a surrogate pair, a number without an end
        raise BadDraft(f"holds what cannot be written as JSON: {' '.join(str(error).split())[:100]}") from None
    assert isinstance(value, dict)  # it began with a brace
    return value


def parse_draft(text: str) -> tuple[Draft, list[Note]]:
    """The draft in a reply, and a note for every criterion that could not be used.

    Raises BadDraft when the reply as a whole is no draft, or no criterion of it can be used.
    """
    value = read_object(text)
    if unknown := sorted(set(value) - {"title", "family", "criteria", "id"}):
        raise BadDraft(f"unknown key {shown(unknown[0])}: a draft has title, family and criteria")
    title, family = value.get("title", ""), value.get("family")
    if not isinstance(title, str):
        raise BadDraft(f"title must be text, not {kind_name(title)}")
    if family is not None and family not in FAMILIES:
        raise BadDraft(f"family {shown(family)} is not one of {', '.join(FAMILIES)}")
    criteria, notes = read_criteria(value.get("criteria"))
    known: Family | None = family
    return Draft(" ".join(title.split())[:MAX_TEXT], known, criteria), notes


def read_criteria(items: object) -> tuple[tuple[Criterion, ...], list[Note]]:
    """The criteria in a decoded list, with ids of their own, and a note for every one that could not be used.

    Raises BadDraft when it is no list, too long, or holds nothing that can be used.
    """
    if not isinstance(items, list):
        reason = "missing" if items is None else f"must be a list, not {kind_name(items)}"
        raise BadDraft(f"criteria: {reason}")
    if len(items) > MAX_CRITERIA:
        raise BadDraft(f"{len(items)} criteria, at most {MAX_CRITERIA} are read")
    found: list[Criterion] = []
    notes: list[Note] = []
    for number, item in enumerate(items, 1):
        try:
            found.append(read_criterion(item))
        except BadDraft as error:
            said = item.get("description") if isinstance(item, dict) else None
            about = said[:MAX_TEXT] if isinstance(said, str) else ""
            notes.append(Note("dropped", "draft", f"criterion {number}: {error}", "", about))
    if not found:
        raise BadDraft(notes[0].reason if notes else "no criteria")
    return with_ids(found), notes


def read_criterion(item: object) -> Criterion:
    """One criterion as the form asks for it, or as a rubric file holds it. Raises BadDraft."""
    if not isinstance(item, dict):
        raise BadDraft(f"a criterion is an object, not {kind_name(item)}")
    if unknown := sorted(map(str, set(item) - _CRITERION_KEYS)):
        raise BadDraft(f"unknown key {shown(unknown[0])}")
    tree = {key: value for key, value in item.items() if value is not None and key not in ("id", "veto")}
    description = tree.get("description", "")
    if not isinstance(description, str) or not description.strip():
        raise BadDraft("no description")
    tree["description"] = " ".join(description.split())
    if isinstance(tree.get("tiers"), list):
        if tree.get("check") is not None and not tree["tiers"]:
            del tree["tiers"]
        else:
            tree["tiers"] = [_tidy_tier(t) for t in tree["tiers"]]
    if isinstance(tree.get("check"), dict):
        tree["check"] = {key: value for key, value in tree["check"].items() if value is not None}
    veto = item.get("veto")
    if isinstance(veto, dict):
        tree["veto"] = veto
    elif veto is not None and not isinstance(veto, bool):
        raise BadDraft(f"veto must be true or false, not {kind_name(veto)}")
    try:
        criterion = _built(tree)
        if veto is True:
            criterion = _built({**tree, "veto": worst_tier_veto(criterion)})
    except Problem as problem:
        place = ".".join(str(p) for p in problem.path[2:])
        raise BadDraft(f"{place}: {problem}" if place else str(problem)) from None
    texts = [criterion.description, *(t.text for t in criterion.tiers or ())]
    if max(map(len, texts)) > MAX_TEXT:
        raise BadDraft(f"a text of {max(map(len, texts))} characters, more than {MAX_TEXT}")
    if criterion.weight == 0 and criterion.veto is None:
        raise BadDraft("weight 0 without a veto: it decides nothing")
    return criterion


def _built(tree: dict[str, Any]) -> Criterion:
    return build({"id": "draft", "criteria": [{"id": "c", **tree}]}).criteria[0]


def worst_tier_veto(criterion: Criterion) -> dict[str, Any]:
    """A veto that fires on the worst tier only: halfway between its score and its neighbour's."""
    low, high = criterion.tier_values[0], criterion.tier_values[-1]
    scores = [(value - low) / (high - low) for value in criterion.tier_values]
    near = scores[-2] if criterion.weight < 0 else scores[0]
    far = scores[-1] if criterion.weight < 0 else scores[1]
    return {"threshold": (near + far) / 2}


def with_ids(criteria: Sequence[Criterion]) -> tuple[Criterion, ...]:
    """The criteria with ids made of their first words, each its own."""
    names = unique_ids([slug(_first_words(c.description), "criterion", 48) for c in criteria])
    return tuple(msgspec.structs.replace(c, id=name) for c, name in zip(criteria, names))


def _first_words(text: str) -> str:
    return " ".join(text.split()[:6])


def _tidy_tier(tier: object) -> object:
    """White space in a tier's text means nothing; everything else is left to the schema."""
    if isinstance(tier, dict) and isinstance(tier.get("text"), str):
        return {**tier, "text": " ".join(tier["text"].split())}
    return tier
