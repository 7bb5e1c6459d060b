"""The harness itself: a rank that fails or hangs fails the test, and nothing is left running."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest


def misbehave(directory: str, how: str) -> None:
    rank = os.environ["RANK"]
    Path(directory, rank).write_text(str(os.getpid()))
    if rank == "1" and how == "raise":
        raise ValueError("rank one gives up")
    time.sleep(600)


@pytest.mark.engine
@pytest.mark.parametrize("how,message", [("raise", "rank one gives up"), ("hang", "did not end within 2 s")])
def test_a_bad_rank_ends_the_job(how: str, message: str, ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=message):
        ranks(2, misbehave, timeout_s=2 if how == "hang" else 60, directory=str(tmp_path), how=how)
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
