"""Judge prompts: readable template files rendered to parts, and parts to token ids that no judged text can subvert.

A template is one text file in Qwen's chat markup. What all criteria of one answer share (instructions, question,
reference, answer) stands before the line ``{{=criterion}}``, the criterion and its tiers after it, so the K prompts of
one answer share their token prefix in the engine's KV cache. The prompt ends right before the tier sign.

Two things keep the judged text in its place. It is fenced: ``{{fence}}`` (quotation marks) and ``{{nonce}}`` (hex) are
chosen so that no filled-in text contains them. And it is untrusted: `encode` recognises control tokens such as
``<|im_end|>`` in the template's own text only.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from megarubric.errors import BadInput
from megarubric.judging.visible import visible

TEMPLATE_DIR = Path(__file__).parent / "templates"
_FIELDS = ("question", "reference", "answer", "criterion", "tiers", "criteria", "fence", "nonce")
_PLACEHOLDER = re.compile(r"\{\{([#/=]?)([a-z_]+)\}\}")
_CHAT_TOKEN = re.compile(r"<\|[a-z_]+\|>")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Part(msgspec.Struct, frozen=True):
    """A stretch of a prompt. In a `trusted` one (the template's own words) control tokens are control tokens; in an
    untrusted one they are ordinary text. `shared` parts are equal for every criterion of one answer."""

    text: str
    trusted: bool
    shared: bool = False


class Template(msgspec.Struct, frozen=True):
    """A prompt template: its name, its text, and the SHA-256 of the text, which identifies it in caches."""

    name: str
    text: str
    hash: str

    @property
    def lists_all(self) -> bool:
        """Whether it asks about all criteria in one call."""
        return "{{criteria}}" in self.text


def parse_template(text: str, name: str) -> Template:
    """Template from `text`; the one newline that ends the file is not part of it.

    Raises BadInput on an unknown placeholder, when answer, criterion or tiers are missing, or when the criterion does
    not come last.
    """
    text = text.removesuffix("\n")
    found: list[str] = []
    for sign, field in _PLACEHOLDER.findall(text):
        if sign in ("", "="):
            found.append(sign + field)
        if (
            field not in _FIELDS
            or (sign == "=" and field != "criterion")
            or (sign in ("#", "/") and field != "reference")
        ):
            raise BadInput(f"template {name}", "{{" + sign + field + "}}", "unknown placeholder")
    wanted = ("criteria",) if "criteria" in found else ("criterion", "tiers")
    for field in ("answer", "=criterion", *wanted):
        if field not in found:
            raise BadInput(f"template {name}", "{{" + field + "}}", "missing")
    if text.count("{{#reference}}") != text.count("{{/reference}}") or found.count("=criterion") != 1:
        raise BadInput(f"template {name}", None, "unbalanced {{#reference}} or more than one {{=criterion}}")
    split = found.index("=criterion")
    if not {"question", "reference", "answer"}.isdisjoint(found[split:]):
        raise BadInput(f"template {name}", None, "question, reference and answer belong before {{=criterion}}")
    if not {"criterion", "tiers", "criteria"}.isdisjoint(found[:split]):
        raise BadInput(f"template {name}", None, "the criterion and its tiers belong after {{=criterion}}")
    return Template(name, text, hashlib.sha256(text.encode()).hexdigest())


@lru_cache
def load_template(name_or_path: str) -> Template:
    """A template by name (``tier``, ``tier_compact``) or by the path of a ``.txt`` file."""
    path = Path(name_or_path)
    if path.suffix != ".txt":
        path = TEMPLATE_DIR / f"{name_or_path}.txt"
    try:
        return parse_template(path.read_text(encoding="utf-8"), path.stem)
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(p.stem for p in TEMPLATE_DIR.glob("*.txt")))
        raise BadInput("template", name_or_path, f"cannot be read; known templates: {known}") from error


def tier_tokens(n: int) -> tuple[str, ...]:
    """The signs of `n` tiers, lowest first: digits up to ten tiers, capital letters up to 26. Single tokens in Qwen's
    and most other vocabularies. Raises ValueError outside 2..26."""
    if not 2 <= n <= len(_LETTERS):
        raise ValueError(f"a judged criterion has 2 to {len(_LETTERS)} tiers, not {n}")
    return tuple("0123456789"[:n] if n <= 10 else _LETTERS[:n])


def render_tier(
    template: Template,
    question: str,
    answer: str,
    criterion: str,
    tiers: Sequence[str],
    reference: str | None = None,
) -> list[Part]:
    """Fill `template` for one answer and one criterion; `tiers` are the tiers' texts, lowest first.

    Characters that no reader sees are left out (`visible`). The fence and the nonce depend on question, reference and
    answer only, so that the shared part of the prompt is the same for every criterion of that answer.
    """
    return _fill(template, question, answer, reference, criterion=_one_line(criterion), tiers=_tier_lines(tiers))


def render_all(
    template: Template,
    question: str,
    answer: str,
    criteria: Sequence[tuple[str, Sequence[str]]],
    reference: str | None = None,
) -> list[Part]:
    """Fill a one-call-for-all `template` for one answer and its `criteria`, each a description and its tiers' texts."""
    blocks = [
        f"{n}. {_one_line(description)}\n" + "\n".join("   " + line for line in _tier_lines(tiers).splitlines())
        for n, (description, tiers) in enumerate(criteria, start=1)
    ]
    return _fill(template, question, answer, reference, criteria="\n".join(blocks))


def _fill(template: Template, question: str, answer: str, reference: str | None, **criteria: str) -> list[Part]:
    material = [visible(question), visible(reference or ""), visible(answer)]
    values = {
        "question": material[0],
        "reference": material[1],
        "answer": material[2],
        "fence": _fence(material),
        "nonce": _nonce(material),
        **criteria,
    }
    text = template.text
    if reference is None:
        text = re.sub(r"\{\{#reference\}\}\n.*?\{\{/reference\}\}\n", "", text, flags=re.DOTALL)
    else:
        text = text.replace("{{#reference}}\n", "").replace("{{/reference}}\n", "")
    parts: list[Part] = []
    head, tail = text.split("{{=criterion}}\n")
    for piece, shared in ((head, True), (tail, False)):
        last = 0
        for match in _PLACEHOLDER.finditer(piece):
            parts.append(Part(piece[last : match.start()], True, shared))
            parts.append(Part(values[match[2]], False, shared))
            last = match.end()
        parts.append(Part(piece[last:], True, shared))
    return [part for part in parts if part.text]


def plain_text(parts: Iterable[Part]) -> str:
    """The prompt as one string, for people and for logs; not for tokenising."""
    return "".join(part.text for part in parts)


def chat_messages(parts: Iterable[Part]) -> tuple[list[dict[str, str]], str]:
    """The prompt as chat messages, for servers that take text only, and the assistant prefix that ended it.

    Such a server tokenises the content with control tokens on, so every control-like string of an untrusted part is
    broken up by a space (`defang`).
    """
    text = ""
    marks: list[tuple[int, int]] = []
    for part in parts:
        if part.trusted:
            marks += [(len(text) + m.start(), len(text) + m.end()) for m in _CHAT_TOKEN.finditer(part.text)]
        text += part.text if part.trusted else defang(part.text)
    messages: list[dict[str, str]] = []
    for i, (start, end) in enumerate(marks):
        if text[start:end] != "<|im_start|>":
            continue
        role, _, content = text[end : marks[i + 1][0] if i + 1 < len(marks) else len(text)].partition("\n")
        messages.append({"role": role, "content": content})
    prefix = ""
    if messages and messages[-1]["role"] == "assistant":
        prefix = messages.pop()["content"]
        prefix = prefix.rpartition("</think>")[2].lstrip()
    return messages, prefix


_CONTROL_LIKE = re.compile(r"<(?=[|｜/]?[A-Za-z_｜|])|\[(?=/?INST\])|«(?=\|)")


def defang(text: str) -> str:
    """`text` with a space after every bracket that opens something shaped like a control token of any model family."""
    return _CONTROL_LIKE.sub(lambda m: m[0] + " ", text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _tier_lines(tiers: Sequence[str]) -> str:
    return "\n".join(f"{sign}: {_one_line(text)}" for sign, text in zip(tier_tokens(len(tiers)), tiers))


def _fence(material: Sequence[str]) -> str:
    longest = max((len(run) for text in material for run in re.findall('"+', text)), default=0)
    return '"' * max(3, longest + 1)


def _nonce(material: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(material).encode()).hexdigest()
    while any(digest[:8] in text.casefold() for text in material):
        digest = hashlib.sha256(digest.encode()).hexdigest()
    return digest[:8]


class PromptEncoder:
    """Turns parts into token ids with one tokenizer: a transformers fast tokenizer or a `tokenizers.Tokenizer`.

    Text between two control tokens is tokenised in one piece by a copy of the tokenizer that knows no added tokens at
    all, so trusted and untrusted text meet without artificial token borders and no text can spell a control token.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend: Tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, Tokenizer):
            raise BadInput("tokenizer", type(tokenizer).__name__, "judging needs a fast tokenizer (tokenizer.json)")
        state = json.loads(backend.to_str())
        self._backend = backend
        self._control = {t["content"]: int(t["id"]) for t in state["added_tokens"]}
        unknown = state["model"].get("unk_token")
        if unknown is None and state["model"].get("unk_id") is not None:
            unknown = state["model"]["vocab"][state["model"]["unk_id"]][0]
        self._forbidden = frozenset(i for text, i in self._control.items() if text != unknown)
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        state["model"] = _without_pieces(state["model"], self._forbidden, set(self._control) - {unknown})
        self._plain = Tokenizer.from_str(json.dumps(state))
        self._cuts_words = '"ByteLevel"' in json.dumps(state["pre_tokenizer"])
        names = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(self, parts: Iterable[Part]) -> list[int]:
        """Token ids of the prompt. Raises BadInput when the template uses a control token the tokenizer lacks."""
        ids: list[int] = []
        run = ""
        for part in parts:
            if not part.trusted or self._split is None:
                run += part.text
                continue
            last = 0
            for match in self._split.finditer(part.text):
                run += part.text[last : match.start()]
                ids += self._encode_text(run)
                ids.append(self._control[match[0]])
                run, last = "", match.end()
            run += part.text[last:]
            for chat_token in _CHAT_TOKEN.findall(part.text):
                self.control_id(chat_token)
        return ids + self._encode_text(run)

    def encode_all(self, prompts: Iterable[Sequence[Part]]) -> list[list[int]]:
        """`encode` of every prompt, to the same ids; what neighbours share is tokenised once where that is safe.

        It is safe when the tokenizer cuts text into words before anything else (`ByteLevel`) and a cut between the
        shared part and the rest changed nothing for the first of the neighbours: what follows the cut are the
        template's own words, the same for all of them.
        """
        out: list[list[int]] = []
        before: tuple[Part, ...] | None = None
        head: list[int] | None = None
        for parts in prompts:
            split = next((i for i, part in enumerate(parts) if not part.shared), len(parts))
            seam = tuple(parts[: split + 1])  # the shared part and the template's words behind it
            if seam == before and head is not None:
                out.append(head + self.encode(parts[split:]))
                continue
            ids = self.encode(parts)
            out.append(ids)
            if seam != before:
                before, head = seam, None
                if self._cuts_words and split + 1 < len(parts) and parts[split].trusted:
                    start = self.encode(parts[:split])
                    head = start if start + self.encode(parts[split:]) == ids else None
        return out

    def token_id(self, text: str) -> int:
        """Id of the single token that spells `text`. Raises BadInput when there is none."""
        found = self._plain.token_to_id(text)
        if found is None:
            raise BadInput("tokenizer", text, "a tier sign must be a single token of the judge's vocabulary")
        return int(found)

    def control_id(self, text: str) -> int:
        """Id of a control token. Raises BadInput when the tokenizer has none of that name."""
        if text not in self._control:
            raise BadInput("tokenizer", text, "the judge's tokenizer has no such control token")
        return self._control[text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return list(ids)
        # What a normaliser still folds into a control piece is tokenised character by character, and then left out.
        ids = [i for char in text for i in self._plain.encode(char, add_special_tokens=False).ids]
        return [i for i in ids if i not in self._forbidden]


def _without_pieces(model: dict[str, Any], ids: frozenset[int], texts: set[str]) -> dict[str, Any]:
    """The tokenizer model with its control pieces out of reach, for vocabularies that hold them as ordinary pieces too
    (converted sentencepiece models). Ids keep their meaning."""
    if model["type"] == "Unigram":
        # Renamed to a string no text holds, a piece cannot be matched; a low score would still win over unknowns.
        out = hashlib.sha256(json.dumps(sorted(texts)).encode()).hexdigest()
        vocab = [[f"\ufdd0{out}{i}" if i in ids else piece, score] for i, (piece, score) in enumerate(model["vocab"])]
        return {**model, "vocab": vocab}
    if model["type"] == "BPE":
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        return {**model, "merges": [list(pair) for pair in pairs if "".join(pair) not in texts]}
    return model


_ENCODERS: weakref.WeakKeyDictionary[Any, PromptEncoder] = weakref.WeakKeyDictionary()
_ENCODERS_LOCK = threading.Lock()


def encoder_for(tokenizer: Any) -> PromptEncoder:
    """The `PromptEncoder` of `tokenizer`, made once."""
    with _ENCODERS_LOCK:
        try:
            encoder = _ENCODERS.get(tokenizer)
            if encoder is None:
                encoder = _ENCODERS[tokenizer] = PromptEncoder(tokenizer)
        except TypeError:  # `tokenizers.Tokenizer` cannot be weakly referenced or hashed
            encoder = PromptEncoder(tokenizer)
        return encoder


def encode(parts: Iterable[Part], tokenizer: Any) -> list[int]:
    """Token ids of `parts`; see `PromptEncoder`."""
    return encoder_for(tokenizer).encode(parts)
