"""What is refused alike in several sections of a configuration."""

from __future__ import annotations

import msgspec


def positive(section: msgspec.Struct, name: str, *fields: str) -> str | None:
    """The first of `fields` that is not above 0, as ``key: sentence``, or None."""
    for field in fields:
        if getattr(section, field) <= 0:
            return f"{name}.{field}: must be above 0, is {getattr(section, field)}"
    return None
