"""Supervised rows: JSONL lines to token ids and loss masks, and the order in which a run takes them.

A row is one of

    {"messages": [{"role": "user", "content": "..."}, ..., {"role": "assistant", "content": "..."}]}
    {"parts": [["text", trusted], ...], "completion": "1"}

The first is a conversation in the model's chat template; the last turn is trained on, with the token that ends it (the
tokenizer's eos). The second is a judge question as `judging.prompt.render_tier` renders it; only the completion is
trained on. In an untrusted part control tokens are ordinary text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput
from megarubric.judging.prompt import Part, PromptEncoder
from megarubric.megatron.messages import TrainBatch
from megarubric.recipe.algorithms import algorithm
from megarubric.rollout.data import ChatTokenizer, Message


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: tuple[Message, ...] | None = None
    parts: tuple[tuple[str, bool], ...] | None = None
    completion: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids int32 [T] of a row; the first `prompt_tokens` are not trained on."""

    token_ids: NDArray[np.int32]
    prompt_tokens: int


def read_rows(path: Path, tokenizer: ChatTokenizer, max_tokens: int) -> tuple[list[Row], int]:
    """Rows of a file, and how many were left out for being longer than `max_tokens`.

    Raises BadInput naming file and line for a row that cannot be used, and for a file without rows.
    """
    encoder = PromptEncoder(tokenizer.tokenizer)
    decode = msgspec.json.Decoder(_Row).decode
    rows: list[Row] = []
    too_long = 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadInput(path, None, error.strerror or str(error)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _encode(decode(line), tokenizer, encoder)
        except (msgspec.MsgspecError, ValueError) as error:
            raise BadInput(path, f"line {number}", str(error)) from None
        if len(row.token_ids) > max_tokens:
            too_long += 1
        else:
            rows.append(row)
    if not rows:
        raise BadInput(path, None, f"holds no row of at most {max_tokens} tokens")
    return rows, too_long


def _encode(row: _Row, tokenizer: ChatTokenizer, encoder: PromptEncoder) -> Row:
    if (row.messages is None) == (row.parts is None) or (row.parts is None) != (row.completion is None):
        raise ValueError("needs `messages`, or `parts` and `completion`")
    if row.parts is not None and row.completion is not None:
        prompt = np.array(encoder.encode([Part(text, trusted) for text, trusted in row.parts]), np.int32)
        answer = encoder.encode([Part(row.completion, False)])
    else:
        assert row.messages is not None
        if len(row.messages) < 2 or row.messages[-1].role != "assistant":
            raise ValueError("the last turn must be the assistant's, after at least one other")
        prompt = tokenizer.render(row.messages[:-1])
        answer = [*encoder.encode([Part(row.messages[-1].content, False)]), tokenizer.tokenizer.eos_token_id]
    if not answer:
        raise ValueError("nothing to train on: the answer is empty")
    return Row(np.concatenate([prompt, np.array(answer, np.int32)]), len(prompt))


def make_batch(
    rows: Sequence[Row], mean: Literal["token", "row"] = "token", prompt_loss_weight: float = 0.0
) -> TrainBatch:
    """Rows as a batch whose loss is the mean negative log-likelihood of the answers' tokens.

    `mean` "row" averages a row's tokens first, so a one-token verdict counts as much as a long answer.
    `prompt_loss_weight` adds that much of the mean over the prompts' tokens: language modelling of what is read.
    """
    lengths = np.array([len(r.token_ids) for r in rows], np.int32)
    answer = np.concatenate([(np.arange(len(r.token_ids)) >= max(1, r.prompt_tokens)) for r in rows]).astype(np.float32)
    mask = answer
    weights = algorithm("sft" if mean == "token" else "grpo").token_weights(answer, lengths, 0)
    if prompt_loss_weight > 0:
        mask = np.concatenate([np.arange(len(r.token_ids)) >= 1 for r in rows]).astype(np.float32)
        prompt = mask - answer
        weights = weights + prompt * np.float32(prompt_loss_weight / max(1.0, float(prompt.sum())))
    return TrainBatch(
        tokens=np.concatenate([r.token_ids for r in rows]),
        lengths=lengths,
        loss_mask=mask,
        advantages=mask.copy(),
        weights=weights,
    )


class RowOrder:
    """Endless passes over `rows`, each in an order that depends on `seed` and the pass alone."""

    def __init__(self, rows: Sequence[Row], seed: int, tokens_per_step: int) -> None:
        self._rows, self._seed, self._budget = rows, seed, tokens_per_step
        self.epoch = self.position = 0
        self._order = self._shuffled(0)

    def take(self) -> list[Row]:
        """Rows of the next step: at least one, together at most the budget."""
        taken: list[Row] = []
        used = 0
        while True:
            if self.position == len(self._rows):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled(self.epoch)
            row = self._rows[self._order[self.position]]
            if taken and used + len(row.token_ids) > self._budget:
                return taken
            taken.append(row)
            used += len(row.token_ids)
            self.position += 1

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "size": len(self._rows)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["size"] != len(self._rows):
            raise BadInput("checkpoint", "data position", f"{state['size']} rows then, {len(self._rows)} now")
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled(self.epoch)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._rows))


def batches(rows: Iterable[Row], budget: int) -> Iterator[list[Row]]:
    """Rows in their order, cut into batches of at most `budget` tokens."""
    batch: list[Row] = []
    used = 0
    for row in rows:
        if batch and used + len(row.token_ids) > budget:
            yield batch
            batch, used = [], 0
        batch.append(row)
        used += len(row.token_ids)
    if batch:
        yield batch
