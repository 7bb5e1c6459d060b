"""What every process of a run does first: die with its parent, and say in `ps` what it is."""

from __future__ import annotations

import ctypes
import os
import signal

import setproctitle

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process (SIGKILL) when the one that started it ends, however that ends.

    The signal follows the parent's *thread*, so a process is to be started from its parent's main thread. `parent` is
    the process id expected as parent (default: the present one); when it is already gone, this process exits with
    status 1 at once, because the kernel will not say so any more. Does nothing where there is no prctl(2).
    """
    parent = os.getppid() if parent is None else parent
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os._exit(1)


def set_title(title: str) -> None:
    """Name this process for ps(1) and top(1)."""
    setproctitle.setproctitle(title)
