"""Units of work over forked processes: each is done by one, which tells this process when it has, and how far it is.

The processes inherit the plan; nothing is serialised on the way there, and JSON lines come back through a pipe. They
die with this process.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from megarubric.errors import BadInput, ProcessDied

Count = Callable[[int], None]
Work = Callable[[int, Count], Any]  # (number of a unit, called with bytes done now and then) -> a result, JSON
_POLL_S = 0.1


class Answer(msgspec.Struct, frozen=True):
    unit: int
    result: Any = None
    error: tuple[str, str, str] | None = None


def run(
    units: Sequence[int],
    work: Work,
    *,
    processes: int,
    finished: Callable[[int, Any], None],
    progress: Callable[[int], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Do `work` for each of `units`; `finished` gets each result as it comes, `progress` all bytes done so far.

    `meanwhile` is called in this process once the others are at work.

    Raises BadInput when a unit does, and ProcessDied when a process was killed; what was finished stays so.
    """
    if processes <= 1 or len(units) <= 1:
        total = 0

        def count(nbytes: int) -> None:
            nonlocal total
            total += nbytes
            progress(total)

        for unit in units:
            finished(unit, work(unit, count))
        return
    processes = min(processes, len(units))
    context = multiprocessing.get_context("fork")
    position = context.Value("q", 0)
    counters = memoryview(mmap.mmap(-1, 8 * processes)).cast("Q")
    pipes = [os.pipe() for _ in range(processes)]  # one each: lines of two processes in one pipe could mix

    def child(rank: int) -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the process that asked
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends that one, and with it this one
        for number, (read_end, write_end) in enumerate(pipes):
            os.close(read_end)
            if number != rank:
                os.close(write_end)

        def count(nbytes: int) -> None:
            counters[rank] += nbytes

        while True:
            with position.get_lock():
                number = position.value
                position.value += 1
            if number >= len(units):
                return
            try:
                answer = Answer(units[number], work(units[number], count))
            except BadInput as error:
                answer = Answer(units[number], error=(error.where, error.item, error.reason))
            except OSError as error:
                where = error.filename or "system"
                answer = Answer(units[number], error=(str(where), "", error.strerror or str(error)))
            with open(pipes[rank][1], "wb", buffering=0, closefd=False) as pipe:
                pipe.write(msgspec.json.encode(answer) + b"\n")
            if answer.error:
                return

    with _started([context.Process(target=child, args=(rank,), daemon=True) for rank in range(processes)]) as children:
        for _, write_end in pipes:
            os.close(write_end)
        meanwhile()
        for line in _lines([read_end for read_end, _ in pipes], lambda: progress(sum(counters))):
            answer = msgspec.json.decode(line, type=Answer)
            if answer.error:
                raise BadInput(answer.error[0], answer.error[1] or None, answer.error[2])
            finished(answer.unit, answer.result)
        for process in children:
            process.join()
            if process.exitcode:
                how = f"by signal {-process.exitcode}" if process.exitcode < 0 else f"with status {process.exitcode}"
                raise ProcessDied(f"a conversion process ended {how}; run the same command again to go on")


@contextmanager
def _started(processes: list[Any]) -> Iterator[list[Any]]:
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _lines(descriptors: list[int], idle: Callable[[], None]) -> Iterator[bytes]:
    """Whole lines of all pipes until every writer has closed; `idle` is called between reads."""
    rest = dict.fromkeys(descriptors, b"")
    try:
        while rest:
            idle()
            for descriptor in select.select(list(rest), [], [], _POLL_S)[0]:
                data = os.read(descriptor, 1 << 16)
                if not data:
                    del rest[descriptor]
                    continue
                *lines, rest[descriptor] = (rest[descriptor] + data).split(b"\n")
                yield from lines
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
