"""Prompts: where they come from, how they become token ids, and in which order a run takes them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput
from megarubric.rubrics import Rubric, load_rubrics, parse_rubric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megarubric.rubrics import Corpus


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt as it stands in a file: the conversation so far and the rubric its answer is judged by."""

    id: str
    messages: tuple[Message, ...]
    rubric: Rubric

    @property
    def text(self) -> str:
        """What a judge is shown as the prompt: the user's words, or all turns with their roles if there are several."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.messages)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready to be answered: `token_ids` int32 [P] end where the answer begins."""

    id: str
    text: str
    rubric: Rubric
    token_ids: NDArray[np.int32]


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a prompt file."""

    id: str
    rubric: str | dict[str, Any]
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None


def read_prompts(path: Path, rubric_paths: Iterable[Path] = ()) -> list[PromptRow]:
    """Prompts of a file, in its order.

    Either JSONL with lines ``{"id", "prompt" | "messages", "rubric"}``, where `rubric` is a rubric or the id of one in
    `rubric_paths`, or a rubric file or directory whose instance rubrics carry their `prompt`. Raises BadInput naming
    the file and line when one cannot be used, when ids repeat, or when there is no prompt at all.
    """
    if not path.exists():
        raise BadInput(path, None, "no such file")
    rows = _jsonl_rows(path, rubric_paths) if _holds_rows(path) else _instance_rubrics(path)
    if not rows:
        raise BadInput(path, None, "holds no prompt")
    twice = [row_id for row_id, n in Counter(row.id for row in rows).items() if n > 1]
    if twice:
        raise BadInput(path, twice[0], "this id comes more than once")
    return rows


def held_out(rows: Sequence[PromptRow], n: int, path: object = "prompts") -> tuple[list[PromptRow], list[PromptRow]]:
    """(rest, `n` rows kept out), both in order. Which ones depends on the ids alone: those with the least SHA-256.

    Raises BadInput when nothing would be left to train on.
    """
    if n and n >= len(rows):
        raise BadInput(path, "data.holdout", f"{n} of {len(rows)} prompts: none would be left to train on")
    out = {r.id for r in sorted(rows, key=lambda r: hashlib.sha256(r.id.encode()).digest())[:n]}
    return [r for r in rows if r.id not in out], [r for r in rows if r.id in out]


def _holds_rows(path: Path) -> bool:
    """Whether a JSONL file's first line is a prompt row rather than a rubric."""
    if path.is_dir() or path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8") as f:
        first = next((line for line in f if line.strip()), "")
    try:
        row = json.loads(first or "{}")
    except ValueError:
        return True  # read it as rows: the error names the line
    return not isinstance(row, dict) or "criteria" not in row


def _instance_rubrics(path: Path) -> list[PromptRow]:
    rubrics = [rubric for rubric in load_rubrics(path) if rubric.prompt]
    return [PromptRow(r.id, (Message("user", r.prompt or ""),), r) for r in rubrics]


def _jsonl_rows(path: Path, rubric_paths: Iterable[Path]) -> list[PromptRow]:
    corpora = [load_rubrics(p) for p in rubric_paths]
    rows = []
    with path.open(encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                rows.append(_parse_row(path, f"line {number}", line, corpora))
    return rows


def _parse_row(path: Path, where: str, line: str, corpora: Sequence[Corpus]) -> PromptRow:
    try:
        row = msgspec.json.decode(line, type=_Row)
    except msgspec.MsgspecError as error:
        raise BadInput(path, where, str(error)) from error
    where = f"{where} ({row.id})"
    if (row.prompt is None) == (row.messages is None):
        raise BadInput(path, where, "needs `prompt` or `messages`, and not both")
    messages = (Message("user", row.prompt),) if row.prompt is not None else row.messages or ()
    if not any(message.content.strip() for message in messages):
        raise BadInput(path, where, "the prompt is empty")
    if messages[-1].role != "user":
        raise BadInput(path, where, f"the last turn is {messages[-1].role}'s; it is the user's that is answered")
    if isinstance(row.rubric, str):
        for corpus in corpora:
            if row.rubric in corpus:
                return PromptRow(row.id, messages, corpus.get(row.rubric))
        raise BadInput(path, where, f"rubric {row.rubric} is in none of the rubric files")
    return PromptRow(row.id, messages, parse_rubric(row.rubric, f"{path}: {where}"))


# --- token ids ------------------------------------------------------------------------------------------------------


class ChatTokenizer:
    """A model directory's tokenizer and chat template.

    `template_options` are passed to the template (``{"enable_thinking": False}`` for Qwen3). Raises BadInput when the
    directory has no tokenizer or no chat template.
    """

    def __init__(
        self, model_dir: Path, system_prompt: str | None = None, template_options: Mapping[str, Any] | None = None
    ) -> None:
        from transformers import AutoTokenizer

        self._system = (Message("system", system_prompt),) if system_prompt else ()
        self._options = dict(template_options or {})
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(model_dir), local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise BadInput(model_dir, "tokenizer", str(error).splitlines()[0]) from error
        if not self.tokenizer.chat_template:
            raise BadInput(model_dir, "tokenizer", "has no chat template")
        self._control = [str(token) for token in self.tokenizer.all_special_tokens]
        self._control += [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self.stop_token_ids = _stop_tokens(model_dir, self.tokenizer)

    def render(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """Token ids int32 [P] of a conversation, ending where the assistant's answer begins.

        Raises ValueError when a turn holds a control token such as ``<|im_end|>``: it would end that turn.
        """
        for message in messages:
            for token in self._control:
                if token in message.content:
                    raise ValueError(f"holds the control token {token}")
        turns = [msgspec.to_builtins(message) for message in (*self._system, *messages)]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **self._options)
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def decode(self, token_ids: NDArray[np.int32]) -> str:
        """Text of an answer's tokens, without control tokens."""
        return str(self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))


def _stop_tokens(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's and the tokenizer's. Raises BadInput when there is none."""
    found: set[int] = set()
    path = model_dir / "generation_config.json"
    if path.exists():
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if not found:
        raise BadInput(model_dir, "tokenizer", "has no end-of-answer token")
    return tuple(sorted(found))


@dataclass(slots=True)
class PromptSet:
    """Prompts with token ids, and the reason for each row that is not among them, by row id."""

    prompts: list[Prompt] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def dropped_by_reason(self) -> Counter[str]:
        """How many rows were left out, by reason (the part before the colon)."""
        return Counter(reason.partition(":")[0] for reason in self.dropped.values())


def tokenize_prompts(
    rows: Iterable[PromptRow], tokenizer: ChatTokenizer, max_prompt_tokens: int, where: object = "prompts"
) -> PromptSet:
    """Rows as token ids, those that do not fit left out with the reason. Raises BadInput when none is left."""
    result = PromptSet()
    for row in rows:
        try:
            ids = tokenizer.render(row.messages)
        except ValueError as error:
            result.dropped[row.id] = f"not renderable: {error}"
            continue
        if len(ids) > max_prompt_tokens:
            result.dropped[row.id] = f"too long: {len(ids)} tokens, max_prompt_tokens is {max_prompt_tokens}"
            continue
        result.prompts.append(Prompt(row.id, row.text, row.rubric, ids))
    if not result.prompts:
        reasons = ", ".join(f"{n} {reason}" for reason, n in result.dropped_by_reason.items())
        raise BadInput(where, None, f"no prompt can be used ({reasons or 'there is none'})")
    return result


# --- order ----------------------------------------------------------------------------------------------------------


class PromptOrder:
    """Endless passes over `prompts`, each in an order of its own that depends on `seed` and the pass alone."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("no prompts")
        self._prompts, self._seed = prompts, seed
        self._epoch = self._position = 0
        self._order = self._shuffled(0)

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts; a pass that ends is followed by the next."""
        taken = []
        for _ in range(n):
            if self._position == len(self._prompts):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled(self._epoch)
            taken.append(self._prompts[self._order[self._position]])
            self._position += 1
        return taken

    def state_dict(self) -> dict[str, int]:
        """Where the order stands, for a checkpoint."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed, "size": len(self._prompts)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`. Raises BadInput when it was taken from other data or another seed."""
        for key, value in (("size", len(self._prompts)), ("seed", self._seed)):
            if state[key] != value:
                raise BadInput("checkpoint", "data position", f"{key} was {state[key]}, is {value} now")
        if not 0 <= state["position"] <= len(self._prompts) or state["epoch"] < 0:
            raise BadInput("checkpoint", "data position", f"{dict(state)} lies outside the data")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled(self._epoch)

    def _shuffled(self, epoch: int) -> list[int]:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        return [int(i) for i in random.permutation(len(self._prompts))]
