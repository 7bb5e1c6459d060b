"""The authors' texts (texts/*.yaml) and the slot values that fill them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

TEXTS = Path(__file__).parent / "texts"
# How a value is spoken of in a criterion: "Names Marta and the copper kettle."
_ARTICLE = {"question": "the fact that ", "weather": "", "person": "", "place": "", "day": "", "hour": ""}


@lru_cache
def load(name: str) -> Any:
    """The parsed texts/`name`.yaml."""
    return yaml.safe_load((TEXTS / f"{name}.yaml").read_text(encoding="utf-8"))


def spoken(kind: str, value: str) -> str:
    """`value` with the words a sentence needs in front of it."""
    return _ARTICLE.get(kind, "the ") + value


def _is_held_out(value: str) -> bool:
    return hashlib.sha256(value.encode()).digest()[0] < 32  # one joined value in eight


def draw_value(kind: str, rng: Random, held_out: bool = False) -> str:
    """A slot value of `kind`.

    Joined values (adjective + noun) come from disjoint train and held-out sets. Names are shared, except that one
    held-out draw in four takes a name that training never shows; one training name in seven is put together from
    syllables, so that the model learns to copy names it has not met.
    """
    spec = load("slots")[kind]
    if "join" in spec:
        while True:
            value = " ".join(rng.choice(words) for words in spec["join"])
            if _is_held_out(value) == held_out:
                return value
    if held_out and "held_out" in spec and rng.random() < 0.25:
        return str(rng.choice(spec["held_out"]))
    if not held_out and "syllables" in spec and rng.random() < 1 / 7:
        while (value := "".join(rng.choice(part) for part in spec["syllables"])) in spec["held_out"]:
            pass
        return value
    return str(rng.choice(spec["values"]))
