"""How much a text repeats itself. Plain arithmetic on word lists, linear in their length for a fixed period limit."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_PERIOD = 60  # words
MIN_WORDS = 12

_TOKEN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff]|[^\W_]+(?:'[^\W_]+)?")
_CHARACTER_RUN = re.compile(r"(\w{1,8}?)\1{23,}")


def tokens(text: str) -> list[str]:
    """Words; every Chinese or Japanese character is one."""
    return _TOKEN.findall(text)


def looping(words: Sequence[str], loops: int) -> bool:
    """Whether some stretch of p <= MAX_PERIOD words stands `loops` times in a row, in all at least MIN_WORDS words, or
    one word is a stretch of up to 8 characters 24 times over."""
    if any(len(w) >= 24 and _CHARACTER_RUN.search(w[:2000]) for w in words):
        return True
    for period in range(1, min(MAX_PERIOD, len(words) // 2) + 1):
        # a run of k matches w[i] == w[i - period] means k + period words that are turns of one stretch
        need = max(loops * period, MIN_WORDS) - period
        run = 0
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else 0
            if run >= need:
                return True
    return False


def repeated_share(words: Sequence[str], n: int) -> float:
    """Share of the words that stand in a run of n words which has occurred before, in [0, 1]."""
    if len(words) < n:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    covered = bytearray(len(words))
    for i in range(len(words) - n + 1):
        run = tuple(words[i : i + n])
        if run in seen:
            covered[i : i + n] = b"\x01" * n
        else:
            seen.add(run)
    return sum(covered) / len(words)
