"""Reading a judge's text: only the agreed form counts, everything else is unread.

A verdict is never searched for. A reply that says "this would be tier 2, but" has not given tier 2, and one that says
"yes" somewhere has said nothing; guessing turns a judge's noise, or the judged text's own words, into reward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_VERDICT_LINE = re.compile(r"Tier\s?\[\s?([0-9A-Z])\s?\]\.?")


def parse_tier(text: str, tiers: Sequence[str]) -> int | None:
    """Index of the tier in a bare verdict: the whole reply is the sign, or ``Tier [sign]``. None when it is not.

    A leading <think> block that is closed is skipped.
    """
    text = _REASONING.sub("", text).strip()
    match = _VERDICT_LINE.fullmatch(text)
    sign = match[1] if match else text
    return tiers.index(sign) if sign in tiers else None


def parse_tier_json(text: str, tiers: Sequence[str]) -> int | None:
    """Index of the tier in ``{"tier": "<sign>"}``, the whole reply and nothing else; the sign may be a bare number."""
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
    if not isinstance(value, dict) or set(value) != {"tier"}:
        return None
    sign = value["tier"]
    if isinstance(sign, int) and not isinstance(sign, bool):
        sign = str(sign)
    return tiers.index(sign) if isinstance(sign, str) and sign in tiers else None


def parse_reasoned(text: str, tiers: Sequence[str]) -> int | None:
    """Index of the tier in a reply that reasons first: its last non-empty line is ``Tier [sign]`` and nothing else, and
    no other line is one (two verdicts are none)."""
    lines = [line.strip() for line in _REASONING.sub("", text).splitlines() if line.strip()]
    verdicts = [match[1] for line in lines if (match := _VERDICT_LINE.fullmatch(line))]
    if len(verdicts) != 1 or not _VERDICT_LINE.fullmatch(lines[-1]):
        return None
    return tiers.index(verdicts[0]) if verdicts[0] in tiers else None


def parse_all(text: str, tiers: Sequence[Sequence[str]]) -> list[int | None]:
    """Tier indices of a reply to the one-call-for-all prompt: lines ``n: Tier [sign]``, n counting criteria from 1.

    A criterion whose line is missing, repeated or not in the form is None; text between the lines is ignored.
    """
    found: dict[int, list[str]] = {}
    for line in _REASONING.sub("", text).splitlines():
        match = re.fullmatch(rf"\s*([1-9][0-9]{{0,2}})\s?:\s?{_VERDICT_LINE.pattern}\s*", line)
        if match:
            found.setdefault(int(match[1]), []).append(match[2])
    result: list[int | None] = []
    for n, signs in enumerate(tiers, start=1):
        given = found.get(n, [])
        result.append(signs.index(given[0]) if len(given) == 1 and given[0] in signs else None)
    return result


def parse_pair_scores(text: str, low: float = 0.0, high: float = 10.0) -> tuple[float, float] | None:
    """The two scores of a pairwise review: its first line is two numbers from `low` to `high`, separated by white space
    or a comma, and nothing else."""
    first, _, _ = text.lstrip("\n").partition("\n")
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)(?:\s*,\s*|\s+)(\d{1,3}(?:\.\d+)?)\s*", first)
    if match is None:
        return None
    a, b = float(match[1]), float(match[2])
    return (a, b) if low <= a <= high and low <= b <= high else None
