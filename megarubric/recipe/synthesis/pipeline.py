"""One prompt's way to a rubric: answers, draft, review, splitting, no duplicates, no lint findings, validation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from megarubric.errors import BadInput
from megarubric.recipe.synthesis.models import Ledger, Model, Recorded, Refused, Unreached
from megarubric.recipe.synthesis.questions import Sources, criticism_question, draft_question, numbered
from megarubric.recipe.synthesis.validate import Examiner, Validated
from megarubric.rubrics.importers.model import NOT_STATED, unique_ids
from megarubric.rubrics.lint import lint_rubric
from megarubric.rubrics.parse import parse_rubric
from megarubric.rubrics.schema import Criterion, Family, Rubric, dumps, to_dict
from megarubric.rubrics.synthesis import atomise
from megarubric.rubrics.synthesis.draft import parse_draft, with_ids
from megarubric.rubrics.synthesis.inputs import seeds_for, shown_seed
from megarubric.rubrics.synthesis.journal import Journal
from megarubric.rubrics.synthesis.mend import mended, without_duplicates
from megarubric.rubrics.synthesis.model import BadDraft, Draft, Note, PromptRow, Stage, Way, note_of
from megarubric.rubrics.synthesis.prompts import Segment, Templates
from megarubric.rubrics.synthesis.schema import DRAFT_SCHEMA, SPLIT_SCHEMA
from megarubric.rubrics.synthesis.validation import Floors

_CHAT_TOKEN = re.compile(r"<\|[^|<>]*\|>")
_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How rubrics are made.

    `answers` are sampled for a prompt where fewer are given; 0 validates on given answers only. `retries` says how
    often a reply that is no draft is asked for again, `reviews` how often a draft is reviewed by the model. A rubric
    has `fewest` to `most` criteria. `judge_templates` are asked with the tiers lowest first and, unless `judge_orders`
    is "lowest", highest first: a reading each. `family` is for prompts without one whose draft names none.
    """

    way: Way
    answers: int = 4
    retries: int = 2
    reviews: int = 1
    fewest: int = 3
    most: int = 10
    seeds_per_prompt: int = 2
    temperature: float = 0.7
    answer_temperature: float = 1.0
    max_tokens: int = 3072
    answer_tokens: int = 1024
    judge_templates: tuple[str, ...] = ()
    judge_orders: Literal["both", "lowest"] = "both"
    prefix: str = "synthetic"
    licence: str = ""
    family: Family | None = None
    floors: Floors = Floors()

    def __post_init__(self) -> None:
        for name, least in (("answers", 0), ("retries", 0), ("reviews", 0), ("fewest", 1), ("seeds_per_prompt", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        if self.most < self.fewest:
            raise ValueError(f"most {self.most} is less than fewest {self.fewest}")
        if min(self.max_tokens, self.answer_tokens) < 1 or min(self.temperature, self.answer_temperature) < 0:
            raise ValueError("tokens must be at least 1, temperatures at least 0")
        if self.answers > 1 and self.answer_temperature == 0:
            raise ValueError("several answers at temperature 0 are one answer")


class Outcome(msgspec.Struct, frozen=True):
    """What became of a prompt: a rubric (kept), a reason why there is none (dropped), or a model that could not be
    asked (failed, so left for the next run)."""

    row: PromptRow
    rubric_id: str
    status: Literal["kept", "dropped", "failed"]
    stage: str
    reason: str
    rubric: Rubric | None
    notes: list[Note]
    numbers: Mapping[str, dict[str, float | int | None]] = {}


class Rejected(Exception):
    """There will be no rubric for this prompt."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class Pipeline:
    """Makes rubrics with the models of three roles: `model` drafts, `policy` answers, `judge` validates."""

    def __init__(
        self,
        settings: Settings,
        templates: Templates,
        models: Mapping[str, Model],
        journal: Journal,
        ledger: Ledger,
        sources: Sources,
    ) -> None:
        self.settings, self.templates, self.models = settings, templates, models
        self.journal, self.ledger, self.sources = journal, ledger, sources
        judge_templates = settings.judge_templates or (models["judge"].judge_template,)
        self.examiner = Examiner(judge_templates, settings.judge_orders == "both", settings.floors)

    async def rubric_for(self, row: PromptRow, rubric_id: str) -> Outcome:
        """The outcome for one prompt. Raises ProcessDied when an engine has ended."""
        notes: list[Note] = []
        stage = "answer"
        try:
            answers = await self._answers(row)
            stage = "draft"
            draft = await self._draft(row, answers, notes)
            for _ in range(self.settings.reviews):
                draft = await self._review(row, draft, notes)
            seeds = self._seeds(row)
            criteria = _mixed(draft, seeds) if self.settings.way == "hybrid" else draft.criteria
            stage = "atomise"
            criteria = await self._atomised(row, criteria, notes)
            criteria, more = without_duplicates(criteria)
            notes += more
            rubric = self._mended(self._assembled(row, rubric_id, draft, criteria, seeds), notes)
            stage = "validate"
            checked = await self._validated(row, rubric, answers, notes)
            rubric = self._mended(self._with_provenance(checked.rubric, seeds), notes)
        except Rejected as error:
            return Outcome(row, rubric_id, "dropped", error.stage, str(error), None, notes)
        except Refused as error:
            return Outcome(row, rubric_id, "dropped", stage, str(error), None, notes)
        except Unreached as error:
            return Outcome(row, rubric_id, "failed", stage, str(error), None, notes)
        numbers = {c.id: checked.numbers.get(c.id, {}) for c in rubric.criteria}
        return Outcome(row, rubric_id, "kept", "", "", rubric, notes, numbers)

    # --- asking -------------------------------------------------------------------------------------------------

    def _recorded(self, role: str, row: PromptRow) -> Recorded:
        return Recorded(self.models[role], self.journal, self.ledger, row.id)

    async def _answers(self, row: PromptRow) -> list[str]:
        """Given answers, then sampled ones up to the number wanted; equal ones once, empty ones not at all."""
        s = self.settings
        due = max(0, s.answers - len(row.answers))
        prompt = self.templates.render("answer", prompt=row.prompt)
        if not _CHAT_TOKEN.search(row.prompt):  # the policy reads it as its users write it, brackets and all
            prompt = [segment._replace(trusted=True) for segment in prompt]
        drawn = await self._recorded("policy", row).ask(
            "answer",
            [prompt] * due,
            max_tokens=s.answer_tokens,
            temperature=s.answer_temperature,
            draws=range(due),
        )
        texts = [*row.answers, *(_REASONING.sub("", text).strip() for text in drawn)]
        return list(dict.fromkeys(t for t in texts if t.strip() and not t.startswith("<think>")))

    async def _draft(self, row: PromptRow, answers: Sequence[str], notes: list[Note]) -> Draft:
        critiques = await self._critiques(row, answers) if self.settings.way == "critique" else []
        name, values = draft_question(self.settings.way, row, self._seeds(row), self.sources.brief, answers, critiques)
        problem: str | None = None
        for attempt in range(self.settings.retries + 1):
            prompt = self.templates.render(name, **values, problem=problem)
            (text,) = await self._write("draft", row, prompt, attempt)
            try:
                draft, unusable = parse_draft(text)
            except BadDraft as error:
                problem = str(error)
                notes.append(Note("rejected", "draft", f"reply {attempt + 1}: {problem}"))
                continue
            notes += unusable
            return draft
        raise Rejected("draft", f"no usable draft in {self.settings.retries + 1} replies; the last: {problem}")

    async def _critiques(self, row: PromptRow, answers: Sequence[str]) -> list[str]:
        """The policy's criticism of its own answers."""
        if not answers:
            raise Rejected("draft", "no answer to criticise")
        prompts = [self.templates.render("criticise", **criticism_question(row, answer)) for answer in answers]
        said = await self._recorded("policy", row).ask(
            "criticise",
            prompts,
            max_tokens=self.settings.answer_tokens,
            temperature=self.settings.temperature,
            draws=[0] * len(prompts),
        )
        critiques = [text for text in (_REASONING.sub("", t).strip() for t in said) if text]
        if not critiques:
            raise Rejected("draft", "the policy criticised nothing")
        return critiques

    async def _review(self, row: PromptRow, draft: Draft, notes: list[Note]) -> Draft:
        """The draft as the model rewrites it when it is shown the draft and what lint finds in it; the draft itself
        when the rewriting cannot be used."""
        probe = Rubric(id="draft", title=draft.title, family=draft.family, criteria=draft.criteria)
        found = [f"{f.criterion or 'the rubric'}: {f.message}" for f in lint_rubric(probe) if f.rule != "provenance"]
        prompt = self.templates.render(
            "revise", prompt=row.prompt, rubric=shown_seed(probe), findings="\n".join(found) or None
        )
        (text,) = await self._write("revise", row, prompt, 0)
        try:
            revised, unusable = parse_draft(text)
        except BadDraft as error:
            notes.append(Note("rejected", "revise", f"the review cannot be used, the draft stands: {error}"))
            return draft
        notes += unusable
        stay = {c.description for c in revised.criteria}
        left_out = [c for c in draft.criteria if c.description not in stay]
        notes += [note_of(c, "dropped", "revise", "left out or reworded by the model's review") for c in left_out]
        return msgspec.structs.replace(
            revised, title=revised.title or draft.title, family=revised.family or draft.family
        )

    async def _atomised(
        self, row: PromptRow, criteria: Sequence[Criterion], notes: list[Note]
    ) -> tuple[Criterion, ...]:
        """Every compound criterion as its parts; lint drops those that nobody could split."""
        parts: dict[int, tuple[Criterion, ...]] = {}
        due = [i for i, c in enumerate(criteria) if atomise.compound(c)]
        for i in due:
            if split := atomise.split_by_rule(criteria[i]):
                parts[i] = split
        left = [i for i in due if i not in parts]
        if left:
            asked = [criteria[i] for i in left]
            shown = numbered("Criterion", [shown_seed(Rubric(id="x", criteria=(c,))) for c in asked])
            (text,) = await self._write("split", row, self.templates.render("split", criteria=shown), 0)
            try:
                found = atomise.parse_split(text, asked)
            except BadDraft as error:
                notes.append(Note("rejected", "atomise", f"the splitting cannot be used: {error}"))
                found = {}
            parts.update({left[at]: split for at, split in found.items()})
        parts = {i: with_ids(split) for i, split in parts.items()}
        whole = [c for i, c in enumerate(criteria) for c in parts.get(i, (c,))]
        for i, split in sorted(parts.items()):
            reason = f"split into {len(split)}: {'; '.join(p.description for p in split)}"
            notes.append(note_of(criteria[i], "repaired", "atomise", reason))
        names = unique_ids([c.id for c in whole])
        return tuple(msgspec.structs.replace(c, id=name) for c, name in zip(whole, names))

    async def _write(self, stage: str, row: PromptRow, prompt: list[Segment], draw: int) -> list[str]:
        return await self._recorded("model", row).ask(
            stage,
            [prompt],
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            draws=[draw],
            schema=SPLIT_SCHEMA if stage == "split" else DRAFT_SCHEMA,
        )

    # --- assembling ---------------------------------------------------------------------------------------------

    def _seeds(self, row: PromptRow) -> list[Rubric]:
        return seeds_for(row, self.sources.seeds, self.settings.seeds_per_prompt)

    def _assembled(
        self, row: PromptRow, rubric_id: str, draft: Draft, criteria: Sequence[Criterion], seeds: Sequence[Rubric]
    ) -> Rubric:
        s = self.settings
        family = row.family or draft.family or next((seed.family for seed in seeds if seed.family), None) or s.family
        rubric = Rubric(
            id=rubric_id,
            title=draft.title or " ".join(row.prompt.split()[:8])[:80],
            scope="instance",
            family=family,
            tags=("synthetic", f"way-{s.way}"),
            prompt=row.prompt,
            reference=row.reference,
            criteria=tuple(criteria),
        )
        return self._with_provenance(rubric, seeds)

    def _with_provenance(self, rubric: Rubric, seeds: Sequence[Rubric]) -> Rubric:
        """Says truthfully who wrote it: `hybrid` where people's words are in it or were its model, else `llm`."""
        s = self.settings
        used = list(seeds) if s.way == "seeded" else [seed for seed in seeds if _shares(rubric, seed)]
        people = any(seed.provenance is not None and seed.provenance.author != "llm" for seed in used)
        people = people or (s.way == "seeded" and self.sources.brief is not None)
        names = f"; seeds {', '.join(seed.id for seed in used)}" if used else ""
        licences = dict.fromkeys(seed.provenance.licence for seed in used if seed.provenance is not None)
        tree = to_dict(rubric)
        tree["provenance"] = {
            "author": "hybrid" if people else "llm",
            "source": f"megarubric rubrics synthesize, way {s.way}{names}",
            "licence": s.licence or ", ".join(name for name in licences if name) or NOT_STATED,
            "model": self.models["model"].name,
        }
        try:
            return parse_rubric(tree, rubric.id)
        except BadInput as error:
            raise Rejected("lint", f"{error.item}: {error.reason}") from None

    def _mended(self, rubric: Rubric, notes: list[Note]) -> Rubric:
        if len(rubric.criteria) > self.settings.most:
            ranked = sorted(rubric.criteria, key=lambda c: (c.veto is None, -abs(c.weight)))
            over = {c.id for c in ranked[self.settings.most :]}
            reason = f"one of more than {self.settings.most} criteria, and of the least weight"
            notes += [note_of(c, "dropped", "deduplicate", reason) for c in rubric.criteria if c.id in over]
            rubric = msgspec.structs.replace(rubric, criteria=tuple(c for c in rubric.criteria if c.id not in over))
        clean, more = mended(rubric, self.settings.fewest)
        notes += more
        if clean is None:
            raise Rejected("lint", more[-1].reason)
        return parse_rubric(msgspec.json.decode(dumps(clean)), clean.id)  # what is written is what was checked

    async def _validated(self, row: PromptRow, rubric: Rubric, answers: Sequence[str], notes: list[Note]) -> Validated:
        if self.settings.answers == 0 and not row.answers:
            return Validated(rubric, {})
        if len(answers) < 2:
            raise Rejected("validate", f"{len(answers)} different answers: nothing can be told apart")
        checked = await self.examiner.examine(
            rubric, row.prompt, answers, row.good_answers, self._recorded("judge", row)
        )
        notes += checked.notes
        if not checked.rubric.criteria:
            raise Rejected("validate", f"no criterion is left of {len(rubric.criteria)}")
        tags = (*checked.rubric.tags, "validated")
        return msgspec.structs.replace(checked, rubric=msgspec.structs.replace(checked.rubric, tags=tags))


def _mixed(draft: Draft, seeds: Sequence[Rubric]) -> tuple[Criterion, ...]:
    """People's criteria first, as they stand, then the model's; ids made distinct."""
    criteria = [*(c for seed in seeds for c in seed.criteria), *draft.criteria]
    names = unique_ids([c.id for c in criteria])
    return tuple(msgspec.structs.replace(c, id=name) for c, name in zip(criteria, names))


def _shares(rubric: Rubric, seed: Rubric) -> bool:
    """Whether a criterion of the seed stands in the rubric as it was written."""
    return any(c.description == k.description and c.check == k.check for c in seed.criteria for k in rubric.criteria)
