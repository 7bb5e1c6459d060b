"""The GPU that a run finds, against `parallel.card`, the one it was planned for."""

from __future__ import annotations

from megarubric.config.schema import CARDS


def compare(card: str, name: str, memory: int, sm: int) -> tuple[str | None, str | None]:
    """(why a GPU cannot stand in for `card`, what else a person should know); None where there is nothing to say.

    `name` and `memory` (bytes) are the device's own, `sm` its architecture (90: Hopper). A planned run fits a GPU of at
    least the card's architecture and memory; what a newer one refuses (config/fp8.py) is not looked at here.
    """
    planned_gb, planned_sm = CARDS[card]
    found = f"{name} (sm_{sm}, {memory / 1e9:.0f} GB)"
    if sm < planned_sm:
        return f"is {card}, sm_{planned_sm}, and this GPU is older: {found}", None
    if memory < planned_gb * 1e9:
        return f"is {card} with {planned_gb:g} GB, and this GPU has less: {found}", None
    if card.upper() not in name.upper().replace("-", " ").split():
        return None, f"is {card}, and this GPU is another one: {found}; memory and checks are those of {card}"
    return None, None
