"""Rules that look at one rubric. Each says why it exists and shows what it finds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from megarubric.rubrics.checks import KINDS
from megarubric.rubrics.lint.model import rule
from megarubric.rubrics.lint.weights import absence_share
from megarubric.rubrics.lint.wording import COMPOUND, PARTIAL, VAGUE, alike, word_list
from megarubric.rubrics.schema import Criterion, Rubric

Found = Iterator[tuple[str | None, str]]

PRESENCE_ONLY_BELOW = 0.1  # share of weight on absence or correctness
DOMINATED_ABOVE = 0.6  # share of one criterion
TIERS_ALIKE = 0.8
CRITERIA_ALIKE = 0.75
MOST_TIERS = 10


def _judged(rubric: Rubric) -> Iterator[Criterion]:
    return (c for c in rubric.criteria if c.check is None)


def _fails_high(c: Criterion) -> bool:
    """Whether a veto criterion fails at or above its threshold."""
    return c.weight < 0 or (c.weight == 0 and c.veto is not None and c.veto.detector)


def _scores(c: Criterion) -> list[float]:
    """Normalised score of every tier."""
    low, high = c.tier_values[0], c.tier_values[-1]
    return [(v - low) / (high - low) for v in c.tier_values]


@rule(
    "compound-criterion",
    "One judgement of two demands gives partial credit by mood: 36% of exploited judgements in the literature are "
    "partial credit on compound criteria. Split it, or let the tiers say what half of it is worth.",
    "description: Names the ferry and explains why it is late.",
)
def compound_criterion(rubric: Rubric) -> Found:
    for c in _judged(rubric):
        found = COMPOUND.search(c.description)
        if found and not (c.tiers and len(c.tiers) > 2 and any(PARTIAL.search(t.text) for t in c.tiers)):
            yield c.id, f"asks for more than one thing ({found[0].strip()!r})"


@rule(
    "vague-word",
    "Two judges mean two things by 'engaging'. A vague word needs tiers that say what a reader would see.",
    "description: The story is engaging.    # and no tiers",
)
def vague_word(rubric: Rubric) -> Found:
    for c in _judged(rubric):
        found = VAGUE.search(c.description)
        if found and not _anchored(c):
            yield c.id, f"{found[0]!r} is not anchored: no tier says what it looks like"


def _anchored(c: Criterion) -> bool:
    """Whether the lowest and the highest tier describe something without a vague word."""
    if not c.tiers:
        return False
    return all(len(word_list(t.text)) >= 4 and not VAGUE.search(t.text) for t in (c.tiers[0], c.tiers[-1]))


@rule(
    "no-description",
    "A judged criterion without a description asks the judge nothing.",
    "criteria: [{id: calm, weight: 1}]",
)
def no_description(rubric: Rubric) -> Found:
    for c in _judged(rubric):
        if not c.description.strip():
            yield c.id, "no description"


@rule(
    "tier-text",
    "A tier without text leaves its meaning to the judge; more than ten tiers are finer than any judge's noise.",
    "tiers: [{value: 0, text: ''}, {value: 1, text: Says so.}]",
)
def tier_text(rubric: Rubric) -> Found:
    for c in _judged(rubric):
        if c.tiers and any(not t.text.strip() for t in c.tiers):
            yield c.id, "a tier has no text"
        if c.tiers and len(c.tiers) > MOST_TIERS:
            yield c.id, f"{len(c.tiers)} tiers, more than {MOST_TIERS}"


_RANGE = re.compile(r"\b(\d+)\s*(?:-|–|to)\s*(\d+)\b")
_AT_LEAST = re.compile(r"\bat least (?:\d+|one|two|three|four|five|six|seven|eight|nine|ten)\b", re.IGNORECASE)


@rule(
    "overlapping-tiers",
    "When one answer fits two tiers the judge tosses a coin, and the reward carries the noise.",
    "tiers: [{value: 0, text: 50-100 words}, {value: 1, text: 80-160 words}]",
)
def overlapping_tiers(rubric: Rubric) -> Found:
    for c in _judged(rubric):
        tiers = c.tiers or ()
        for (i, a), (j, b) in itertools.combinations(enumerate(tiers), 2):
            if a.text.strip() and (
                a.text.strip().lower() == b.text.strip().lower() or alike(a.text, b.text) > TIERS_ALIKE
            ):
                yield c.id, f"tiers {i} and {j} say nearly the same"
                break
            x, y = _RANGE.search(a.text), _RANGE.search(b.text)
            if x and y and max(int(x[1]), int(y[1])) < min(int(x[2]), int(y[2])):
                yield c.id, f"tiers {i} and {j} overlap: {x[0]} and {y[0]}"
                break
            if _AT_LEAST.search(a.text) and _AT_LEAST.search(b.text):
                yield c.id, f"tiers {i} and {j} are both open upwards ('at least'): say 'exactly' in the lower one"
                break


@rule(
    "presence-only",
    "Weight on presence alone rewards length: a policy adds what is asked for and nothing punishes the rest. About 90% "
    "of published rubric weight is on presence; conciseness and correctness fell under it.",
    "three criteria 'Mentions ...' and nothing about what must not be there",
)
def presence_only(rubric: Rubric) -> Found:
    share = absence_share(rubric)
    if share is not None and share < PRESENCE_ONLY_BELOW and len(rubric.criteria) >= 3:
        yield None, f"{share:.0%} of the weight is on absence, limits or correctness"


@rule(
    "double-counting",
    "Two criteria that ask the same pay twice for one thing.",
    "criteria: 'Names the ferry.' and 'The ferry is named.'",
)
def double_counting(rubric: Rubric) -> Found:
    weighted = [c for c in rubric.criteria if c.weight != 0]
    for a, b in itertools.combinations(weighted, 2):
        if (a.weight > 0) != (b.weight > 0):
            continue
        if a.check is not None or b.check is not None:
            if a.check == b.check:
                yield b.id, f"the same check as {a.id}"
        elif alike(a.description, b.description) > CRITERIA_ALIKE:
            yield b.id, f"asks nearly the same as {a.id}"
    pairs = [(*sorted((p.a, p.b)), p.kind) for p in rubric.pairs]
    for pair in {p for p in pairs if pairs.count(p) > 1}:
        yield None, f"the pair {pair[0]}*{pair[1]} ({pair[2]}) is there twice"


_SPEAKS_OF_REFERENCE = re.compile(
    r"\breference (?:answer|solution|text|translation)\b|\bthe reference\b|参考答案", re.IGNORECASE
)


@rule(
    "reference",
    "A criterion that needs a reference the rubric does not have is never judged; one that speaks of a reference the "
    "judge is not shown is judged on nothing.",
    "needs_reference: true    # and reference: null",
)
def reference(rubric: Rubric) -> Found:
    has = bool(rubric.reference and rubric.reference.strip())
    used = False
    for c in rubric.criteria:
        used = used or c.needs_reference
        if c.needs_reference and c.check is not None:
            yield c.id, "a check reads no reference"
        elif c.needs_reference and not has:
            yield c.id, "needs a reference and the rubric has none: it is never judged"
        elif not c.needs_reference and c.check is None and _SPEAKS_OF_REFERENCE.search(c.description):
            yield c.id, "speaks of a reference but does not ask for it (needs_reference)"
    if has and not used:
        yield None, "has a reference that no criterion needs"


@rule(
    "veto-polarity",
    "A hack detector is 1 when the hack is there. With a weight >= 0 and no `detector: true` its veto punishes honest "
    "answers, and with a positive weight the hack is paid.",
    "check: {kind: 'hack:self_praise'}, weight: 0, veto: {threshold: 0.5}",
    fixable=True,
)
def veto_polarity(rubric: Rubric) -> Found:
    for c in rubric.criteria:
        if c.check is None or not KINDS[c.check.kind].detector:
            continue
        if c.weight > 0:
            yield c.id, f"{c.check.kind} is 1 when the hack is there: a positive weight pays for it"
        elif c.veto is not None and not _fails_high(c):
            yield c.id, f"{c.check.kind} is 1 when the hack is there: the veto needs `detector: true`"


@rule(
    "veto-on-good",
    "A veto takes the whole reward. It must not fire on an answer that misses perfection by a step, nor always, nor on "
    "a word that two judges read differently.",
    "tiers 0, 1, 2 with veto: {threshold: 0.9}    # an answer in the middle loses everything",
)
def veto_on_good(rubric: Rubric) -> Found:
    for c in rubric.criteria:
        if c.veto is None:
            continue
        scores, tau, high = _scores(c), c.veto.threshold, _fails_high(c)
        if high and tau <= 0:
            yield c.id, "fires on every answer: a detector fails at or above its threshold 0"
        elif not high and tau <= 0:
            yield c.id, "never fires: no score is below 0"
        elif len(scores) > 2 and not high and tau > scores[-2]:
            yield c.id, f"fires on every tier but the best (threshold {tau:g}, next-best tier {scores[-2]:.2g})"
        elif len(scores) > 2 and high and tau <= scores[1]:
            yield c.id, f"fires on the first trace (threshold {tau:g}, lowest tier above none {scores[1]:.2g})"
        elif c.check is None and VAGUE.search(c.description) and not _anchored(c):
            yield c.id, "a veto hangs on a vague word"


@rule(
    "dominated-weights",
    "When one criterion has most of the weight the others train nothing.",
    "weights 10, 1, 1",
)
def dominated_weights(rubric: Rubric) -> Found:
    weighted = [c for c in rubric.criteria if c.weight != 0]
    total = sum(abs(c.weight) for c in weighted)
    for c in weighted:
        if len(weighted) >= 3 and abs(c.weight) > DOMINATED_ABOVE * total:
            yield c.id, f"has {abs(c.weight) / total:.0%} of the weight"


@rule(
    "no-weight",
    "A rubric whose weights are all 0 has no base reward: every answer that no veto stops is unscored.",
    "every criterion has weight: 0",
)
def no_weight(rubric: Rubric) -> Found:
    if all(c.weight == 0 for c in rubric.criteria):
        yield None, "no criterion has a weight: answers stay unscored"


@rule(
    "unreachable-saturation",
    "Saturation bends the curve between theta and 1. When no score lies there, it only lowers the weight of the best.",
    "check: {...}, saturation: {theta: 0.7, beta: 3}    # a check is 0 or 1",
)
def unreachable_saturation(rubric: Rubric) -> Found:
    for c in rubric.criteria:
        if c.saturation is None:
            continue
        if c.check is not None:
            yield c.id, "a check is 0 or 1: nothing lies between theta and the top"
        elif c.tiers and len(c.tiers) > 2 and c.saturation.theta >= _scores(c)[-2]:
            yield c.id, f"only the best tier lies above theta {c.saturation.theta:g}"


@rule(
    "scope-and-prompt",
    "An instance rubric belongs to one prompt and is useless without it; a prompt in a wider rubric is never used.",
    "scope: instance    # and prompt: null",
)
def scope_and_prompt(rubric: Rubric) -> Found:
    has = bool(rubric.prompt and rubric.prompt.strip())
    if rubric.scope == "instance" and not has:
        yield None, "scope is instance and there is no prompt"
    if rubric.scope != "instance" and has:
        yield None, f"has a prompt but its scope is {rubric.scope}"


@rule(
    "provenance",
    "Who wrote a rubric and under which licence decides whether it may be used, and how far to trust it.",
    "provenance: {author: human}    # no source, no licence",
)
def provenance(rubric: Rubric) -> Found:
    who = rubric.provenance
    if who is None:
        yield None, "no provenance"
        return
    missing = [name for name in ("source", "licence") if not getattr(who, name).strip()]
    if missing:
        yield None, f"provenance names no {' and no '.join(missing)}"
    if who.author == "human" and who.model:
        yield None, f"provenance says human and names the model {who.model}"


@rule(
    "metadata",
    "Stages and statistics choose rubrics by family; people choose them by title.",
    "a rubric without family",
)
def metadata(rubric: Rubric) -> Found:
    missing = [name for name in ("title", "family") if not getattr(rubric, name)]
    if missing:
        yield None, f"no {' and no '.join(missing)}"


@rule(
    "contradicting-checks",
    "Checks that no text can satisfy together cap the reward for everybody.",
    "number_words max 50 beside number_words min 80",
)
def contradicting_checks(rubric: Rubric) -> Found:
    checks = [(c.id, c.check) for c in rubric.criteria if c.check is not None and c.weight >= 0]
    for (_, a), (name, b) in itertools.combinations(checks, 2):
        kinds = {a.kind, b.kind}
        if kinds == {"change_case:english_capital", "change_case:english_lowercase"}:
            yield name, "capitals and lower case throughout"
        elif a.kind == b.kind and a.kind.startswith("length_constraints:number_"):
            low = max(_lower(a.params), _lower(b.params))
            high = min(_upper(a.params), _upper(b.params))
            if low > high:
                yield name, f"two {a.kind} ranges do not meet"
        elif kinds == {"keywords:existence", "keywords:forbidden_words"}:
            asked, banned = (a, b) if a.kind == "keywords:existence" else (b, a)
            both = {w.lower() for w in asked.params["keywords"]} & {w.lower() for w in banned.params["forbidden_words"]}
            if both:
                yield name, f"asks for and forbids {', '.join(sorted(both))}"


def _number(params: dict[str, object]) -> float:
    return next((float(v) for k, v in params.items() if k.startswith("num_") and isinstance(v, int)), 0.0)


def _lower(params: dict[str, object]) -> float:
    if isinstance(params.get("min"), int):
        return float(str(params["min"]))
    return _number(params) if params.get("relation") in ("at least", "exactly") else 0.0


def _upper(params: dict[str, object]) -> float:
    if isinstance(params.get("max"), int):
        return float(str(params["max"]))
    relation = params.get("relation")
    if relation == "less than":
        return _number(params) - 1
    return _number(params) if relation in ("at most", "exactly") else float("inf")


@rule(
    "untidy-text",
    "White space around a text and a tag that comes twice change the hash and mean nothing.",
    "title: ' Plain voice '",
    fixable=True,
)
def untidy_text(rubric: Rubric) -> Found:
    if rubric.title != rubric.title.strip() or len(set(rubric.tags)) != len(rubric.tags):
        yield None, "white space around the title, or a tag twice"
    for c in rubric.criteria:
        texts = [c.description, *(t.text for t in c.tiers or ())]
        if any(t != t.strip() for t in texts):
            yield c.id, "white space around a text"
