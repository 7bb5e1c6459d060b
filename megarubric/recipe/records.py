"""``rollouts/step_N.jsonl``: the answers of a step with judgements, reward and attribution; and back, for replay."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from megarubric.errors import BadInput
from megarubric.judging.types import JudgeItem, Judgement, Source
from megarubric.observe.files import whole_file
from megarubric.recipe.experience import Answer
from megarubric.rollout.data import Prompt
from megarubric.rollout.messages import Completion
from megarubric.rollout.sampler import Sample


class StoredJudgement(msgspec.Struct, frozen=True, omit_defaults=True):
    """A judgement as a rollout file keeps it (see `judging.types.Judgement`)."""

    value: float | None
    score: float | None
    source: Source
    read: bool = True
    entropy: float | None = None
    tier_mass: float | None = None
    reason: str | None = None

    def judgement(self, criterion: str) -> Judgement:
        """As it was made: what was unread then is unread, and counted, in a replay."""
        return Judgement(
            criterion, self.value, self.score, self.source, self.read, self.entropy, self.tier_mass, self.reason
        )


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One line. Token ids and log-probabilities are exactly the engine's (float32 values, written without loss). An
    answer that is not `used` was left out of the batch. `first_version` wrote its first token, `weight_version` its
    last (an older file has neither key)."""

    step: int
    prompt_id: str
    group: int
    sample: int
    seed: int
    rubric: str
    rubric_hash: str
    weight_version: int
    finish_reason: str
    prompt: str
    response: str
    reward: float | None
    valid: bool
    vetoed: bool
    veto: str | None
    r0: float | None
    r1: float | None
    advantage: float
    judgements: dict[str, StoredJudgement]
    attribution: dict[str, float]
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    first_version: int | None = None
    used: bool = True


def to_record(step: int, a: Answer) -> Record:
    """An answer that `score` has seen, as a line."""
    if a.result is None:
        raise ValueError("an answer is recorded after it was scored")
    s, r = a.sample, a.result
    return Record(
        step=step,
        prompt_id=s.prompt.id,
        group=s.group,
        sample=s.index,
        seed=s.seed,
        rubric=s.prompt.rubric.id,
        rubric_hash=s.prompt.rubric.hash,
        weight_version=s.completion.weight_version,
        finish_reason=s.completion.finish_reason,
        prompt=s.prompt.text,
        response=a.text,
        reward=r.reward,
        valid=r.valid,
        vetoed=r.vetoed,
        veto=r.veto,
        r0=r.r0,
        r1=r.r1,
        advantage=a.advantage,
        judgements={
            name: StoredJudgement(j.value, j.score, j.source, j.read, j.entropy, j.tier_mass, j.reason)
            for name, j in a.judgements.items()
        },
        attribution={name: float(x) for name, x in r.attribution.items()},
        prompt_ids=s.prompt.token_ids.tolist(),
        token_ids=s.completion.token_ids.tolist(),
        logprobs=[float(x) for x in s.completion.logprobs],
        first_version=s.completion.first_version,
        used=a.used,
    )


def write_rollouts(directory: Path, step: int, answers: Sequence[Answer]) -> Path:
    """Write ``step_N.jsonl``, whole or not at all; before it ``step_N.routing.safetensors`` when routing was recorded:
    [T, L, K] of all answers in the order of the lines."""
    path = directory / f"step_{step}.jsonl"
    routing = [a.sample.completion.routing for a in answers]
    if any(r is not None for r in routing):
        from safetensors.numpy import save_file

        directory.mkdir(parents=True, exist_ok=True)
        aside = directory / f".step_{step}.routing.part"
        save_file({"routing": np.concatenate([r for r in routing if r is not None])}, aside)
        os.replace(aside, _routing_file(directory, step))
    with whole_file(path) as f:
        for a in answers:
            f.write(msgspec.json.encode(to_record(step, a)).decode() + "\n")
    return path


def read_rollouts(
    directory: Path, step: int, prompts: Mapping[str, Prompt]
) -> tuple[list[Sample], list[str], list[JudgeItem], list[bool]]:
    """A recorded step as samples, their texts, judge items that carry the stored judgements, and which were used.

    Raises BadInput naming file and line when the file is missing, a line is not a record, or its prompt or rubric is
    not the one in `prompts`.
    """
    path = directory / f"step_{step}.jsonl"
    if not path.exists():
        raise BadInput(path, None, "no recorded rollouts of this step to replay")
    decode = msgspec.json.Decoder(Record).decode
    routing, offset = _read_routing(directory, step), 0
    samples: list[Sample] = []
    texts: list[str] = []
    items: list[JudgeItem] = []
    used: list[bool] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            r = decode(line)
        except (msgspec.DecodeError, json.JSONDecodeError) as error:
            raise BadInput(path, f"line {number}", str(error)) from None
        prompt = prompts.get(r.prompt_id)
        if prompt is None or prompt.rubric.hash != r.rubric_hash:
            raise BadInput(path, f"line {number} ({r.prompt_id})", "its prompt or rubric is not this run's")
        n_tokens = len(r.prompt_ids) + len(r.token_ids)
        completion = Completion(
            np.array(r.token_ids, np.int32),
            np.array(r.logprobs, np.float32),
            r.finish_reason,
            r.weight_version,
            r.weight_version if r.first_version is None else r.first_version,
            routing=None if routing is None else routing[offset : offset + n_tokens],
        )
        offset += n_tokens
        seen = Prompt(prompt.id, prompt.text, prompt.rubric, np.array(r.prompt_ids, np.int32))
        samples.append(Sample(r.group, r.sample, seen, r.seed, completion))
        texts.append(r.response)
        kept = {name: j.judgement(name) for name, j in r.judgements.items()}
        items.append(JudgeItem(prompt.rubric, r.prompt, r.response, kept=kept))
        used.append(r.used)
    if routing is not None and offset != len(routing):
        raise BadInput(_routing_file(directory, step), None, f"holds {len(routing)} tokens, the answers have {offset}")
    return samples, texts, items, used


def _routing_file(directory: Path, step: int) -> Path:
    return directory / f"step_{step}.routing.safetensors"


def _read_routing(directory: Path, step: int) -> np.ndarray | None:
    path = _routing_file(directory, step)
    if not path.exists():
        return None
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        rows: np.ndarray = load_file(path)["routing"]
    except (OSError, SafetensorError, KeyError) as error:
        raise BadInput(path, None, f"is not a record of routing: {error}") from None
    return rows
