"""One weight exchange, seen from the controller: the trainer fills buckets, the engines take them in, all or nothing.

While the engines load bucket i the trainer already fills bucket i + 1 into the other segment; bucket i + 2 is asked for
only when every engine has acknowledged bucket i. A fault anywhere aborts the update on every engine, which go on with
the version they had.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from megarubric.errors import MegarubricError

if TYPE_CHECKING:
    from megarubric.megatron.client import TrainerClient
    from megarubric.rollout.client import EngineClient


class ExchangeError(MegarubricError):
    """An engine serves something else than what the trainer published."""


class ExchangeReport(msgspec.Struct, frozen=True):
    """`nbytes` of weights went to each engine in `seconds`; `checksum` names them. `network_bytes` went between hosts,
    in place of `network_raw_bytes` without deltas (0 on one host)."""

    version: int
    nbytes: int
    buckets: int
    seconds: float
    checksum: str
    network_bytes: int = 0
    network_raw_bytes: int = 0


async def exchange(
    trainer: TrainerClient, engines: Sequence[EngineClient], version: int, verify: bool = True
) -> ExchangeReport:
    """Put the trainer's present weights in service on all `engines` as `version`.

    Every engine reads the segments of its own host, or the buffers of its own devices. Raises ExchangeError when
    `verify` finds an engine whose checksum is not the trainer's, or an engine is on a host without trainer ranks;
    RemoteError and ProcessDied pass through after the update was aborted.
    """
    began = time.perf_counter()
    plan = await trainer.begin_publish(version)
    on_devices = plan.devices is not None  # then an engine finds its own device's buffers, whichever host that is on
    for number, engine in enumerate(engines):
        if not on_devices and engine.host >= len(plan.segments):
            raise ExchangeError(
                f"engine {number} is on host {engine.host}, trainer ranks on {len(plan.segments)} hosts"
            )
    count = len(plan.table.buckets)
    try:
        await asyncio.gather(*(e.begin_update(version, plan.table.manifest, plan.devices) for e in engines))
        loading: asyncio.Future[Any] | None = None
        for index in range(count):
            filled = await trainer.fill_bucket(version, index)
            if loading is not None:
                await loading
            here = [msgspec.structs.replace(filled.bucket, segment=pair[index % 2]) for pair in plan.segments]
            loading = asyncio.gather(*(e.load_bucket(version, here[0 if on_devices else e.host]) for e in engines))
        if loading is not None:
            await loading
        ended = await trainer.end_publish(version)
        checksum = ended.checksum
        await asyncio.gather(*(e.finish_update(version, checksum) for e in engines))
    except BaseException:
        for engine in engines:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(engine.abort_update(), 10)
        raise
    if verify:
        for number, engine in enumerate(engines):
            served = await engine.checksum()
            if (served.version, served.checksum) != (version, checksum):
                raise ExchangeError(
                    f"engine {number} serves version {served.version} with checksum {served.checksum}, "
                    f"the trainer published version {version} with {checksum}"
                )
    seconds, nbytes = time.perf_counter() - began, plan.table.payload_bytes
    return ExchangeReport(version, nbytes, count, seconds, checksum, ended.network_bytes, ended.network_raw_bytes)
