"""What a conversion is asked for, and whom it tells how far it is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Options:
    """`processes` 0 is one a core, at most 8. `config` has the config.json of a source that has none. Towards Hugging
    Face, `max_shard_bytes` cuts anew; without it a converted checkpoint gets back the files it came from.
    """

    processes: int = 0
    config: Path | None = None
    max_shard_bytes: int | None = None

    @property
    def workers(self) -> int:
        return self.processes or min(8, os.cpu_count() or 1)

    def beside(self, source: Path) -> Path:
        """The directory that has the config.json and the tokenizer of `source`."""
        if self.config is None:
            return source
        return self.config if self.config.is_dir() else self.config.parent


class Progress(Protocol):
    """Hears what a phase is called, how many bytes it has, and how many are done."""

    def start(self, what: str, total: int, done: int) -> None: ...

    def advance(self, done: int) -> None: ...

    def end(self) -> None: ...
