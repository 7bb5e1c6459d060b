"""Asked to stop: finish the step, save, end with exit status 3."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from megarubric.errors import BadInput
from megarubric.observe.terminal import say

DEADLINE = "MEGARUBRIC_DEADLINE"  # seconds since the epoch; slurm/train.sbatch sets it from the job's time limit


def deadline() -> float | None:
    """When the run must stop, seconds since the epoch. Raises BadInput when the variable is no number."""
    text = os.environ.get(DEADLINE, "")
    if text and not text.isdecimal():
        raise BadInput("environment", DEADLINE, f"{text!r} is not a number of seconds since the epoch")
    return float(text) if text else None


class StopFlag:
    """`requested` turns true on the first SIGTERM, SIGUSR1 (Slurm's warning) or Ctrl-C, or at the `deadline`; a second
    Ctrl-C ends the process at once. Made inside a running event loop."""

    def __init__(self) -> None:
        self.requested = False
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._loop.add_signal_handler(number, self._ask)
        if (at := deadline()) is not None:
            self._loop.call_later(max(0.0, at - time.time()), self._ask)

    def _ask(self) -> None:
        if not self.requested:
            say("stopping after this step; the state will be saved (Ctrl-C again: now, from the last checkpoint)")
        self.requested = True
        self._loop.remove_signal_handler(signal.SIGINT)
