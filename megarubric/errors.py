"""The errors a user can cause, each one line: what, where, why. The command line turns them into exit statuses."""

from __future__ import annotations


class MegarubricError(Exception):
    """Base of every error this project raises on purpose. `exit_status` follows spec/cli.md."""

    exit_status = 2


class BadInput(MegarubricError):
    """A file, or an item in it, that cannot be used.

    `where` is the file (or "config", "command line"), `item` the line, rubric id or key, `reason` the sentence a
    person needs. Renders as one line: ``where: item: reason``.
    """

    def __init__(self, where: object, item: object, reason: str) -> None:
        self.where = str(where)
        self.item = "" if item is None else " ".join(str(item).split())
        self.reason = " ".join(reason.split())
        super().__init__(": ".join(part for part in (self.where, self.item, self.reason) if part))


class ProcessDied(MegarubricError):
    """A trainer rank or an engine ended before it was told to; the run's state up to its last checkpoint is saved."""

    exit_status = 3


class Interrupted(MegarubricError):
    """The run stopped on request (signal, deadline) with its state saved."""

    exit_status = 3
