"""Asked to stop: finish the step, save, end with exit status 3."""

from __future__ import annotations

import asyncio
import signal

from megarubric.observe.terminal import say


class StopFlag:
    """`requested` turns true on the first SIGTERM or Ctrl-C; a second Ctrl-C ends the process at once. Made inside a
    running event loop."""

    def __init__(self) -> None:
        self.requested = False
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        if not self.requested:
            say("stopping after this step; the state will be saved (Ctrl-C again: now, from the last checkpoint)")
        self.requested = True
        self._loop.remove_signal_handler(signal.SIGINT)
