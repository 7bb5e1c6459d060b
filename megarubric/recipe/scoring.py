"""Answers to every prompt, judged and rewarded, one line a prompt: the part of `filter` that starts engines.

`scores.jsonl` is result and journal in one. A line is written when a prompt's last answer was judged, so a run that is
killed asks nothing twice; a line whose `key` is not that of the present configuration is left out and made anew.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

from megarubric.config import TrainConfig
from megarubric.errors import BadInput
from megarubric.judging.backends import model_identity
from megarubric.judging.judge import Judge
from megarubric.judging.settings import settings_of
from megarubric.observe.files import whole_file
from megarubric.recipe.experience import judge_samples, reward_answers
from megarubric.recipe.filtering import PromptScore, Reason
from megarubric.rollout.data import ChatTokenizer, Prompt
from megarubric.rollout.sampler import Sample, Sampler, SamplingSettings

# What of the judge section says how answers are judged; the rest says how fast, or where replies are kept.
_OPERATION = {
    "cache", "replay_only", "concurrency", "timeout_s", "retries", "max_requests", "max_total_tokens",
    "tensor_parallel", "gpu_memory_utilization", "cpu_kv_gib",
}  # fmt: skip


class ScoreRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A prompt's answers. `rewards[i]` is None where answer i is unscored; `unread` counts judgements that could not be
    read, `vetoes` how often each criterion was the veto that fell. `error` says why nothing was asked or written.
    `score`, `std`, `kept` and `reason` are filled in when all prompts are there."""

    id: str
    key: str
    rubric: str
    rubric_hash: str
    family: str | None = None
    rewards: tuple[float | None, ...] = ()
    words: tuple[int, ...] = ()
    unread: int = 0
    vetoes: dict[str, int] = {}
    error: str | None = None
    score: float | None = None
    std: float | None = None
    kept: bool | None = None
    reason: Reason | None = None

    @property
    def as_score(self) -> PromptScore:
        return PromptScore(id=self.id, family=self.family, rewards=self.rewards)


def keys_of(c: TrainConfig, settings: SamplingSettings, prompts: Iterable[Prompt]) -> dict[str, str]:
    """Prompt id -> digest of everything that decides its rewards: policy, sampling, judge, prompt tokens, rubric."""
    section = {k: v for k, v in msgspec.to_builtins(c.judge).items() if k not in _OPERATION}
    judge_model = c.judge.model or c.model.path
    identities = [model_identity(Path(c.model.path), c.model.dtype)]
    if c.judge.kind == "frozen" and Path(judge_model).is_dir():
        identities.append(model_identity(Path(judge_model), c.model.dtype))
    calibration = Path(c.judge.calibration).read_bytes() if c.judge.calibration else b""
    asked = Judge(None, settings_of(c.judge)).asked  # the templates' content is in it
    common = msgspec.json.encode([identities, section, asked, dataclasses.asdict(settings)]) + calibration
    keys = {}
    for p in prompts:
        digest = hashlib.sha256(common)
        digest.update(f"\0{p.id}\0{p.rubric.hash}\0".encode() + p.token_ids.tobytes())
        keys[p.id] = digest.hexdigest()[:32]
    return keys


class ScoreFile:
    """``scores.jsonl``, open for appending. `rows` holds the lines that are still true, by prompt id; `stale` counts
    those that were made otherwise. A last line cut short by a kill is taken off.

    Raises BadInput when a line before the last cannot be read.
    """

    def __init__(self, path: Path, keys: Mapping[str, str], forget_unscored: bool = False) -> None:
        self.path, self.rows = path, dict[str, ScoreRow]()
        self.stale = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(whole[: whole.rfind(b"\n") + 1].splitlines(), 1):
            try:
                row = _decode(line)
            except (msgspec.MsgspecError, UnicodeError) as error:
                raise BadInput(path, f"line {number}", f"is no line of scores: {error}") from None
            unscored = all(r is None for r in row.rewards)
            if keys.get(row.id) != row.key or (forget_unscored and unscored):
                self.stale += 1
            else:
                self.rows[row.id] = row
        self.write(list(self.rows.values()))
        self._file: IO[bytes] = path.open("ab")

    def put(self, row: ScoreRow) -> None:
        """Append a line. When this returns the kernel has it: a killed process loses nothing."""
        self.rows[row.id] = row
        self._file.write(_encode(row) + b"\n")
        self._file.flush()

    def write(self, rows: Sequence[ScoreRow]) -> None:
        """The whole file anew, in one step."""
        with whole_file(self.path) as f:
            for row in rows:
                f.write(_encode(row).decode() + "\n")

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


async def score_prompts(
    sampler: Sampler,
    judge: Judge,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Prompt],
    keys: Mapping[str, str],
    done: Callable[[ScoreRow], None],
) -> None:
    """Answer, judge and reward each of `prompts`; `done` gets its row as soon as its group is judged.

    An answer that the engine could not write makes its prompt's row an error, and the others go on. Raises ProcessDied
    when a process ended.
    """
    size = sampler.settings.samples_per_prompt
    groups: list[list[Sample]] = [[] for _ in prompts]
    judging: set[asyncio.Task[None]] = set()

    async def judged(group: list[Sample]) -> None:
        group.sort(key=lambda s: s.index)
        prompt = group[0].prompt
        failed = next((s.completion.error for s in group if s.completion.error is not None), None)
        row = row_of(prompt, keys[prompt.id], error=failed)
        if failed is None:
            answers = reward_answers(await judge_samples(judge, tokenizer, group))
            vetoes: dict[str, int] = {}
            for a in answers:
                if a.result is not None and a.result.veto is not None:
                    vetoes[a.result.veto] = vetoes.get(a.result.veto, 0) + 1
            row = msgspec.structs.replace(
                row,
                rewards=tuple(None if a.reward is None else float(a.reward) for a in answers),
                words=tuple(len(a.text.split()) for a in answers),
                unread=sum(not j.read for a in answers for j in a.judgements.values()),
                vetoes=vetoes,
            )
        done(row)

    try:
        async for sample in sampler.stream(0, prompts):
            group = groups[sample.group]
            group.append(sample)
            if len(group) == size:
                judging.add(asyncio.create_task(judged(group)))
            for task in [t for t in judging if t.done()]:
                judging.discard(task)
                task.result()  # raises what ended it
        while judging:
            ended, judging = await asyncio.wait(judging, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
    finally:
        for task in judging:
            task.cancel()
        await asyncio.gather(*judging, return_exceptions=True)


def row_of(prompt: Prompt, key: str, error: str | None = None) -> ScoreRow:
    """A row without rewards."""
    r = prompt.rubric
    return ScoreRow(id=prompt.id, key=key, rubric=r.id, rubric_hash=r.hash, family=r.family, error=error)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ScoreRow).decode
