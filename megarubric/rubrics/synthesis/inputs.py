"""Prompt files of `rubrics synthesize`, and the seeds that go with each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from megarubric.errors import BadInput
from megarubric.rubrics.lint.wording import content
from megarubric.rubrics.schema import Rubric, to_dict
from megarubric.rubrics.synthesis.model import PromptRow

MAX_PROMPT = 100_000  # characters of a prompt, a reference or an answer


def read_prompt_rows(path: Path, limit: int | None = None) -> tuple[list[PromptRow], list[BadInput]]:
    """The rows of a JSONL file (`PromptRow` names the keys) in order, and what is wrong with lines that cannot be used.
    With `limit`, no more than that many rows are read.

    Raises BadInput when the file cannot be read or holds no usable row.
    """
    rows: list[PromptRow] = []
    bad: list[BadInput] = []
    seen: dict[str, int] = {}
    if not path.is_file():
        raise BadInput(path, None, "is a directory" if path.is_dir() else "no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(rows) >= limit:
                break
            if not line.strip():
                continue
            try:
                row = _row(line.removeprefix(b"\xef\xbb\xbf"))
                if row.id in seen:
                    raise ValueError(f"the id {row.id!r} is taken already, by line {seen[row.id]}")
            except ValueError as error:
                bad.append(BadInput(path, f"line {number}", str(error)))
                continue
            seen[row.id] = number
            rows.append(row)
    if not rows:
        raise bad[0] if bad else BadInput(path, None, "holds no prompt")
    return rows, bad


def _row(line: bytes) -> PromptRow:
    """Raises ValueError with a sentence."""
    try:
        row = msgspec.json.decode(line, type=PromptRow)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(f"is no prompt row: {error}") from None
    if not row.id.strip() or not row.prompt.strip():
        raise ValueError(f"{'id' if not row.id.strip() else 'prompt'} is empty")
    texts = [row.id, row.prompt, row.reference or "", *row.answers, *row.good_answers]
    if max(map(len, texts)) > MAX_PROMPT:
        raise ValueError(f"a text of more than {MAX_PROMPT} characters")
    if any(not answer.strip() for answer in (*row.answers, *row.good_answers)):
        raise ValueError("an answer is empty")
    msgspec.json.encode(row)  # lone surrogates: UnicodeEncodeError is a ValueError
    return row


def seeds_for(row: PromptRow, seeds: Sequence[Rubric], most: int) -> list[Rubric]:
    """The seeds that fit a prompt: a rubric written for this very prompt alone, else those of its family (of any, when
    it has none or no seed is of it), the most alike in words first; ties in the order of the file."""
    own = [seed for seed in seeds if seed.prompt is not None and seed.prompt.strip() == row.prompt.strip()]
    if own:
        return own[:most]
    family = [s for s in seeds if row.family is not None and s.family == row.family]
    words = content(row.prompt)

    def closeness(seed: Rubric) -> float:
        texts = [seed.title, seed.prompt or "", *seed.tags, *(c.description for c in seed.criteria)]
        return len(words & content(" ".join(texts))) / (len(words) or 1)

    return sorted(family or seeds, key=closeness, reverse=True)[:most]


def shown_seed(seed: Rubric) -> str:
    """A seed as the drafting model reads it: its criteria in the form it is to answer in."""
    tree = to_dict(seed)
    kept = ("description", "weight", "tiers", "check", "veto", "needs_reference")
    criteria = [{k: c[k] for k in kept if k in c} for c in tree["criteria"]]
    return msgspec.json.encode({"title": seed.title, "family": seed.family, "criteria": criteria}).decode()
