"""The groups that a step left open, as a file beside its checkpoint: a resumed run goes on with the same tokens.

safetensors: `prompts`, `tokens` int32 and `logprobs` float32 of all groups one after the other, `routing` uint8 or
uint16 [T, L, K] of the finished samples that have it; the header's metadata says in JSON what belongs to whom. The
state in the checkpoint names the file by its digest, so a file of another save is not taken for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput
from megarubric.rollout.data import Prompt
from megarubric.rollout.messages import Completion
from megarubric.rollout.partial import OpenGroup


class _Sample(msgspec.Struct, frozen=True, array_like=True):
    tokens: int
    rows: int  # of routing
    finish_reason: str
    weight_version: int
    first_version: int
    cached_tokens: int


class _Group(msgspec.Struct, frozen=True, array_like=True):
    prompt_id: str
    prompt_tokens: int
    seeds: list[int]
    samples: list[_Sample | None]


def write_carry(path: Path, groups: Sequence[OpenGroup]) -> str:
    """Write `groups` to `path`, whole or not at all. Returns the file's digest."""
    from safetensors.numpy import save_file

    table = []
    for g in groups:
        table.append(_Group(g.prompt.id, len(g.prompt.token_ids), g.seeds, [_sample(c) for c in g.completions]))
    written = [c for g in groups for c in g.completions if c is not None]
    arrays = {
        "prompts": _concatenated([g.prompt.token_ids for g in groups], np.int32),
        "tokens": _concatenated([c.token_ids for c in written], np.int32),
        "logprobs": _concatenated([c.logprobs for c in written], np.float32),
    }
    if routing := [c.routing for c in written if c.routing is not None]:
        arrays["routing"] = np.concatenate(routing)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    save_file(arrays, aside, {"groups": msgspec.json.encode(table).decode()})
    with aside.open("rb") as f:
        os.fsync(f.fileno())
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    os.replace(aside, path)
    return digest


def read_carry(path: Path, digest: str, prompts: Mapping[str, Prompt]) -> list[OpenGroup]:
    """The groups in `path`. Raises BadInput when it is not the file that `digest` names, or one of its prompts is not
    in `prompts` or reads otherwise there."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    try:
        with path.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(path, None, f"the checkpoint's open groups cannot be read: {error.strerror}") from None
    if found != digest:
        raise BadInput(path, None, "is not the file that was saved with its checkpoint")
    with safe_open(path, "numpy") as file:
        table = msgspec.json.decode(file.metadata()["groups"], type=list[_Group])
    take = {name: _Reader(array) for name, array in load_file(path).items()}
    groups = []
    for g in table:
        prompt, ids = prompts.get(g.prompt_id), take["prompts"].next(g.prompt_tokens)
        if prompt is None or not np.array_equal(prompt.token_ids, ids):
            raise BadInput(path, g.prompt_id, "this prompt of an open group is not among the run's any more")
        completions = [
            None
            if s is None
            else Completion(
                take["tokens"].next(s.tokens),
                take["logprobs"].next(s.tokens),
                s.finish_reason,
                s.weight_version,
                s.first_version,
                s.cached_tokens,
                routing=take["routing"].next(s.rows) if s.rows else None,
            )
            for s in g.samples
        ]
        groups.append(OpenGroup(prompt, g.seeds, completions))
    return groups


def _sample(c: Completion | None) -> _Sample | None:
    if c is None:
        return None
    rows = 0 if c.routing is None else len(c.routing)
    return _Sample(len(c.token_ids), rows, c.finish_reason, c.weight_version, c.first_version, c.cached_tokens)


class _Reader:
    """Rows of an array, from the front on."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array, self.at = array, 0

    def next(self, n: int) -> NDArray[Any]:
        self.at += n
        return self.array[self.at - n : self.at]


def _concatenated(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype)
