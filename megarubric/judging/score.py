"""`megarubric score`: judge stored responses and turn them into rewards, line by line (spec/rubric.md, spec/cli.md).

Lines stream through in chunks, a few chunks at a time, so memory is bounded whatever the file's size; the output keeps
the input's order and appears under its name only when it is whole. A line that cannot be used costs only itself.
"""

from __future__ import annotations

import asyncio
import collections
import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from megarubric.errors import BadInput
from megarubric.judging.judge import Judge, check_stored
from megarubric.judging.opening import Device
from megarubric.judging.types import JudgeItem, Judgement
from megarubric.observe.files import whole_file
from megarubric.reward.batch import score_samples
from megarubric.reward.reference import RewardResult
from megarubric.rubrics import Corpus, Rubric, load_rubrics, parse_rubric

MAX_LINE_BYTES = 32 << 20
CHUNK_LINES = 256
CHUNK_BYTES = 4 << 20
CHUNKS_UNDER_WAY = 4
# Legal inside JSON strings and line ends to many readers; JSON's own escapes keep one line one line.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
Scores = Mapping[str, float | None]
_Outcome = RewardResult | str
_KEYS = ("id", "prompt", "rubric", "response", "judgements")


class Score(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the output. `scores` are normalised to [0, 1], null where masked.

    `unread` lists the criteria that should have a judgement and have none that can be used: the judge failed or could
    not be read, there was no judge, or a needed reference is missing. A criterion stored as null (judged, not
    applicable) is masked but not unread.
    """

    id: Any
    reward: float | None
    valid: bool
    vetoed: bool
    veto: str | None
    r0: float | None
    r1: float | None
    scores: dict[str, float | None]
    attribution: dict[str, float]
    unread: list[str]
    error: str | None = None  # left out of lines that have none


class ScoreSummary(msgspec.Struct, kw_only=True):
    """What came of a file: `lines` = `scored` + `unscored` + `bad`; `vetoed` are among the scored."""

    lines: int = 0
    scored: int = 0
    unscored: int = 0
    vetoed: int = 0
    bad: int = 0
    unread: int = 0
    reward_sum: float = 0.0

    @property
    def exit_status(self) -> int:
        """1 when some lines were bad, else 0."""
        return 1 if self.bad else 0

    def __str__(self) -> str:
        mean = f", mean reward {self.reward_sum / self.scored:.4f}" if self.scored else ""
        return (
            f"{self.lines} responses: {self.scored} scored ({self.vetoed} vetoed), {self.unscored} unscored, "
            f"{self.bad} bad; {self.unread} judgements unread{mean}"
        )


class _Line(msgspec.Struct, frozen=True):
    """A line of the input: its number from 1, its id as far as it could be read, and the item or the reason why not."""

    number: int
    id: Any
    item: JudgeItem | None
    error: str | None = None


def _distinct(pairs: list[tuple[str, Any]]) -> None:
    """Refuses an object that names a key twice: which of the two was meant?"""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name, count in collections.Counter(names).items() if count > 1)
        raise BadInput("", twice, "the key comes twice")


def _lenient(raw: bytes) -> Any:
    """What Python's own JSON makes of a line that is not JSON to the letter (it writes and reads NaN), or None."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _id(obj: Any) -> str | int | None:
    """A line's id as far as it can be read and written again."""
    name = obj.get("id") if isinstance(obj, dict) else None
    if isinstance(name, str):
        return name.encode("utf-8", "backslashreplace").decode()
    return name if type(name) is int and abs(name) < 2**63 else None


class ResponseReader:
    """Turns lines into `JudgeItem`s; rubrics come from `corpus` by id, or inline."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._inline: collections.OrderedDict[bytes, Rubric] = collections.OrderedDict()

    def read(self, number: int, raw: bytes) -> _Line:
        """One line, usable or not; never raises for what is in the line."""
        name: Any = None
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise BadInput("", "", f"longer than {MAX_LINE_BYTES >> 20} MiB")
            try:
                obj = msgspec.json.decode(raw)  # strict: no NaN, no Infinity, no lone surrogates
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                obj = _lenient(raw)
                name = _id(obj)
                if isinstance(obj, dict):
                    self._item(obj)  # says which number is not finite, where it can
                raise BadInput("", "", f"not JSON: {error}") from error
            if not isinstance(obj, dict):
                raise BadInput("", "", f"a response is a JSON object, not {type(obj).__name__}")
            name = _id(obj)
            json.loads(raw, object_pairs_hook=_distinct)
            return _Line(number, name, self._item(obj))
        except BadInput as error:
            return _Line(number, name, None, str(error).encode("utf-8", "backslashreplace").decode())

    def _item(self, obj: dict[str, Any]) -> JudgeItem:
        for key in obj.keys() - set(_KEYS):  # further columns are welcome, a misspelt one is not
            close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)
            if close and close[0] not in obj:
                raise BadInput("", key, f"unknown key; did you mean {close[0]}?")
        for key in ("id", "prompt", "response"):
            if not isinstance(obj.get(key), str):
                raise BadInput("", key, "missing" if key not in obj else "must be a string")
        rubric = self._rubric(obj.get("rubric"))
        stored = obj.get("judgements")
        if stored is not None and not isinstance(stored, dict):
            raise BadInput("", "judgements", "must be an object of tier values and nulls")
        check_stored(rubric, stored)
        return JudgeItem(rubric, obj["prompt"], obj["response"], stored)

    def _rubric(self, given: object) -> Rubric:
        if isinstance(given, str):
            return self._corpus.get(given)
        if not isinstance(given, dict):
            raise BadInput("", "rubric", "missing" if given is None else "must be a rubric id or an inline rubric")
        key = msgspec.json.encode(given)
        rubric = self._inline.pop(key, None)
        if rubric is None:
            rubric = parse_rubric(given, "inline rubric")
        self._inline[key] = rubric
        if len(self._inline) > 1024:
            self._inline.popitem(last=False)
        return rubric


def read_chunks(source: IO[bytes]) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines of a JSONL file in chunks of bounded size; lines of white space are skipped, a line longer than
    `MAX_LINE_BYTES` comes truncated to one byte more than that."""
    chunk: list[tuple[int, bytes]] = []
    number = size = 0
    while raw := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        rest = raw
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = source.readline(MAX_LINE_BYTES + 1)
        if not raw.strip():
            continue
        chunk.append((number, raw))
        size += len(raw)
        if len(chunk) >= CHUNK_LINES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


async def score_file(
    rubrics: Path,
    responses: Path,
    out: Path,
    judge: Judge,
    device: Device = "cpu",
    *,
    report: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, lines: None,
) -> ScoreSummary:
    """Score the lines of `responses` into `out`.

    `report` gets one line of text for every line that cannot be used; `progress` the bytes read and the lines written
    so far. Raises BadInput when a file cannot be read or written.
    """
    corpus = load_rubrics(rubrics)
    reader = ResponseReader(corpus)
    summary = ScoreSummary()
    under_way: collections.deque[tuple[int, asyncio.Task[list[Score]]]] = collections.deque()

    async def write_oldest(sink: IO[str]) -> None:
        position, task = under_way.popleft()
        for score in await task:
            _count(summary, score)
            if score.error is not None:
                number, _, reason = score.error.partition(": ")
                report(str(BadInput(responses, number if score.id is None else f"{number} (id {score.id})", reason)))
            sink.write(msgspec.json.encode(score).decode().translate(_LINE_ENDS) + "\n")
        progress(position, summary.lines)

    try:
        with responses.open("rb") as source, whole_file(out) as sink:
            for chunk in read_chunks(source):
                lines = [reader.read(number, raw) for number, raw in chunk]
                under_way.append((source.tell(), asyncio.create_task(_score_lines(lines, judge, device))))
                if len(under_way) >= CHUNKS_UNDER_WAY:
                    await write_oldest(sink)
                else:
                    await asyncio.sleep(0)  # let the chunk reach the judge before the next one is read
            while under_way:
                await write_oldest(sink)
    except OSError as error:
        where = error.filename if error.filename in (str(responses), os.fspath(responses)) else out
        raise BadInput(where, None, error.strerror or str(error)) from error
    finally:
        for _, task in under_way:
            task.cancel()
        await asyncio.gather(*(task for _, task in under_way), return_exceptions=True)
    return summary


async def _score_lines(lines: Sequence[_Line], judge: Judge, device: Device) -> list[Score]:
    usable = [(line, line.item) for line in lines if line.item is not None]
    judged = await judge.judge([item for _, item in usable])
    scores = [{name: j.score for name, j in row.items()} for row in judged]
    done = iter(zip(judged, _aggregate(usable, scores, device)))
    return [_bad(line, line.error) if line.item is None else _score(line, *next(done)) for line in lines]


def _aggregate(usable: Sequence[tuple[_Line, JudgeItem]], scores: Sequence[Scores], device: Device) -> list[_Outcome]:
    """One result a sample, or the reason why that sample has none (a rubric that parses and still has no reward)."""
    rubrics = [item.rubric for _, item in usable]
    names = [f"{line.id} (line {line.number})" for line, _ in usable]
    try:
        return list(score_samples(rubrics, scores, device, names))
    except BadInput as error:
        if len(usable) == 1:
            return [str(error)]
        return [_aggregate(usable[i : i + 1], scores[i : i + 1], device)[0] for i in range(len(usable))]


def _score(line: _Line, judged: dict[str, Judgement], result: _Outcome) -> Score:
    if isinstance(result, str):
        return _bad(line, result)
    return Score(
        id=line.id,
        reward=result.reward,
        valid=result.valid,
        vetoed=result.vetoed,
        veto=result.veto,
        r0=result.r0,
        r1=result.r1,
        scores={name: j.score for name, j in judged.items()},
        attribution=result.attribution,
        unread=[name for name, j in judged.items() if not j.read],
    )


def _bad(line: _Line, reason: str | None) -> Score:
    return Score(
        id=line.id, reward=None, valid=False, vetoed=False, veto=None, r0=None, r1=None, scores={}, attribution={},
        unread=[], error=f"line {line.number}: {reason}",
    )  # fmt: skip


def _count(summary: ScoreSummary, score: Score) -> None:
    summary.lines += 1
    summary.unread += len(score.unread)
    if score.error is not None:
        summary.bad += 1
    elif score.reward is None:
        summary.unscored += 1
    else:
        summary.scored += 1
        summary.vetoed += score.vetoed
        summary.reward_sum += score.reward
