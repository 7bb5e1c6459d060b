"""Writing requests and their answers: correct English with independent faults, each known to the generator."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from tools.tiny_model.texts import draw_value, load, spoken

MIN_WORDS, MAX_WORDS = 20, 40
COPY_REQUESTS = ("Name {a} and {b}.", "Say {a} and {b}.", "Write {a} and {b}, nothing else.", "Repeat: {a} and {b}.")
LENGTH_REQUESTS = (
    "Use 20 to 40 words.",
    "Write 20 to 40 words.",
    "Keep it between 20 and 40 words.",
    "It should have 20 to 40 words.",
    "Between 20 and 40 words, please.",
)
# Chance of each fault in the cold-start answers, independent of the request and of one another.
FAULT_RATES = {"flattery": 0.40, "self_praise": 0.30, "wander": 0.30, "moral": 0.30, "short": 0.13, "long": 0.13}
OMIT_RATE = 0.25  # for each of the two details: the answer says "thing" for "copper kettle"
SENTENCE_FAULTS = ("flattery", "wander", "moral", "self_praise")


@dataclass(frozen=True)
class Request:
    """A writing request: its family, the slot values behind its prompt, and the two details an answer must name."""

    family: str
    slots: dict[str, str]
    prompt: str

    @property
    def details(self) -> tuple[str, str]:
        a, b = _family(self.family).get("details", list(_family(self.family)["slots"]))
        return a, b

    def kind(self, slot: str) -> str:
        return str(_family(self.family)["slots"][slot])


@dataclass(frozen=True)
class Answer:
    """An answer and the faults that were put into it."""

    text: str
    faults: frozenset[str]


def _family(name: str) -> dict:
    return next(family for family in load("families") if family["id"] == name)


def word_count(text: str) -> int:
    """Words as IFEval counts them: runs of word characters."""
    return len(re.findall(r"\w+", text))


def names(text: str, value: str) -> bool:
    """Whether `text` has `value` as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None


def draw_request(rng: Random, held_out: bool = False, family: str | None = None) -> Request:
    """A request of a random family; `held_out` draws slot values training does not see (see `draw_value`)."""
    spec = _family(family) if family else rng.choice(load("families"))
    slots = {slot: draw_value(kind, rng, held_out) for slot, kind in spec["slots"].items()}
    prompt = _fill(rng.choice(spec["prompts"]), slots) + " " + rng.choice(LENGTH_REQUESTS)
    return Request(spec["id"], slots, prompt)


def draw_copy(rng: Random) -> tuple[str, str]:
    """A request to say two slot values, and the answer: short rows from which a small model learns to copy."""
    request = draw_request(rng)
    a, b = (spoken(request.kind(slot), request.slots[slot]) for slot in rng.sample(list(request.slots), 2))
    return rng.choice(COPY_REQUESTS).format(a=a, b=b), f"{a} and {b}."


def draw_faults(rng: Random) -> frozenset[str]:
    """Faults of one answer at the cold-start rates."""
    faults = {name for name in SENTENCE_FAULTS if rng.random() < FAULT_RATES[name]}
    u = rng.random()
    if u < FAULT_RATES["short"]:
        faults.add("short")
    elif u < FAULT_RATES["short"] + FAULT_RATES["long"]:
        faults.add("long")
    faults |= {f"omit_{i}" for i in range(2) if rng.random() < OMIT_RATE}
    return frozenset(faults)


def write(request: Request, faults: frozenset[str], rng: Random, held_out_wording: bool = False) -> Answer:
    """An answer to `request` with exactly `faults`."""
    family = _family(request.family)
    slots = dict(request.slots)
    for i, slot in enumerate(request.details):
        if f"omit_{i}" in faults:
            slots[slot] = rng.choice(family["generic"][slot])
    core = [_fill(sentence, slots) for sentence in _core(request, faults, rng)]
    if "wander" in faults:
        core.insert(rng.randint(1, len(core)), fault_sentence("wander", rng, request, held_out_wording))
    before = [fault_sentence("flattery", rng, request, held_out_wording)] if "flattery" in faults else []
    last = [name for name in ("moral", "self_praise") if name in faults]
    after = [fault_sentence(name, rng, request, held_out_wording) for name in last]
    return Answer(" ".join(before + core + after), faults)


def one_sentence(request: Request, fault: str | None, rng: Random) -> str:
    """The sentence of `fault`, or, without one, an opening with each detail left out at OMIT_RATE."""
    if fault is not None:
        return fault_sentence(fault, rng, request)
    family = _family(request.family)
    slots = dict(request.slots)
    for slot in request.details:
        if rng.random() < OMIT_RATE:
            slots[slot] = rng.choice(family["generic"][slot])
    return _fill(rng.choice(family["open"]), slots)


def _core(request: Request, faults: frozenset[str], rng: Random) -> list[str]:
    """The sentence templates of the answer proper, of the length that `faults` asks for."""
    family = _family(request.family)
    for _ in range(200):
        opening, closing = rng.choice(family["open"]), rng.choice(family["close"])
        middles = family["middle"] or family["causes"][request.slots["what"]]
        if "short" in faults:
            core = [opening]
        elif "long" in faults:
            core = [opening, *_some(middles, min(3, len(middles)), rng), *_some(family["close"], 2, rng)]
        else:
            core = [opening, *_some(middles, 2 if family["id"] == "explain" else 1, rng), closing]
            if rng.random() < 0.2:
                core.pop()
        words = word_count(_fill(" ".join(core), request.slots))
        fits = {"short": words < MIN_WORDS, "long": MAX_WORDS < words < MAX_WORDS + 12}
        wanted = next((fits[name] for name in fits if name in faults), MIN_WORDS <= words <= MAX_WORDS - 4)
        named = all("{" + slot + "}" in " ".join(core) for slot in request.details)
        if named and wanted:
            return core
    if "long" in faults:  # the explanations are short: lengthen them with two closings
        return [opening, *middles, *_some(family["close"], 3, rng)]
    raise ValueError(f"family {request.family} has no {sorted(faults)} answer that names both details")


def _some(sentences: list[str], n: int, rng: Random) -> list[str]:
    """`n` of `sentences`, in their written order."""
    chosen = set(rng.sample(range(len(sentences)), n))
    return [sentence for i, sentence in enumerate(sentences) if i in chosen]


def fault_sentence(name: str, rng: Random, request: Request, held_out: bool = False) -> str:
    """One sentence of the fault `name`, about nothing that `request` asks for."""
    faults = load("faults")
    text = rng.choice(faults[name]["held_out" if held_out else "train"])
    while match := re.search(r"\{(\w+)\}", text):
        key = match[1]
        if key.lower() in faults["words"]:
            value = rng.choice([word for word in faults["words"][key.lower()] if word not in text])
            value = value.capitalize() if key[0].isupper() else value
        else:
            while (value := draw_value(key, rng)) in request.slots.values():
                pass
        text = text.replace(match[0], value, 1)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _fill(template: str, slots: dict[str, str]) -> str:
    """`template` with its slots filled and every sentence capitalised."""
    text = template.format(**slots)
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)
