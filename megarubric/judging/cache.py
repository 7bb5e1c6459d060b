"""Judgements kept for good: one SQLite file, shared by any number of processes, so that nothing is judged twice.

A reply is named by the SHA-256 of everything that decides it: judge identity, rubric hash, criterion, prompt, response,
template hash, rendered prompt, tier signs, sampling, draw. The first reply stored under a name is the reply from then
on, in every process: that makes a replay give the same rewards to the byte. Calibration is no part of the name: what is
kept is what the judge said, and that is calibrated anew at every reading.

A reply is committed in the very step of the event loop that received it, before the next one is looked at. The database
is in WAL mode, so what is committed survives the process: killed at any moment, it loses the questions that were under
way, and of the replies that had come at most the one it was just reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from megarubric.errors import BadInput
from megarubric.judging.types import TextBackend, TextQuery, TextReply, TierBackend, TierQuery, TierReply, content_hash

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_APPLICATION_ID = 0x4D525542  # "MRUB": tells our file from any other SQLite database
_BUSY_TIMEOUT_S = 30.0
_PATIENCE_S = 0.05  # how long the event loop waits for another process's write; then the thread waits instead
_CHECKPOINT_EVERY = 500  # writes
_MISSING = "not in the judgement cache, and this is a replay"
_encode = msgspec.msgpack.Encoder().encode
_decode_tier = msgspec.msgpack.Decoder(TierReply).decode
_decode_text = msgspec.msgpack.Decoder(TextReply).decode


class CacheStats(msgspec.Struct, frozen=True):
    """`entries` and `bytes` of the file; `hits`, `misses` and `failed_writes` of this process."""

    entries: int
    bytes: int
    hits: int
    misses: int
    failed_writes: int

    @property
    def hit_rate(self) -> float:
        """Hits over look-ups, 0 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


class JudgeCache:
    """Key (hex digest) to value (bytes). Safe from several threads and processes at once.

    Raises BadInput when `path` is not a cache this version can use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hits = self.misses = self.failed_writes = self._writes = 0
        # Look-ups, and whatever must wait, have a thread and a connection of their own; a reply that has come is
        # written at once through the other connection, which does not wait for the disk (checkpoints are the thread's).
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge-cache")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db: sqlite3.Connection = self._thread.submit(self._open).result()
            self._now = sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
            self._now.execute("PRAGMA synchronous = NORMAL")
            self._now.execute("PRAGMA wal_autocheckpoint = 0")
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise BadInput(path, None, f"cannot be used as a judgement cache: {error}") from error

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # a crash of the process loses nothing, of the machine the tail
            db.execute("BEGIN IMMEDIATE")
            (owner,), (version,) = (
                db.execute("PRAGMA application_id").fetchone(),
                db.execute("PRAGMA user_version").fetchone(),
            )
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables == 0:
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                db.execute(
                    "CREATE TABLE reply (key TEXT PRIMARY KEY, judge TEXT NOT NULL, value BLOB NOT NULL) WITHOUT ROWID"
                )
            elif owner != _APPLICATION_ID:
                raise sqlite3.DatabaseError("it is another program's database")
            elif version != _SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"its format is version {version}, this program writes {_SCHEMA_VERSION}")
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    async def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The stored values among `keys`; counted as hits and misses, a repeated key once."""
        keys = list(dict.fromkeys(keys))
        found = await asyncio.wrap_future(self._thread.submit(self._get, keys))
        self.hits += len(found)
        self.misses += len(keys) - len(found)
        return found

    async def put(self, judge: str, values: Mapping[str, bytes]) -> dict[str, bytes]:
        """Store `values` in one transaction and return what is stored now: where another process was first, its value.

        A disk that is full or gone is reported once and costs the cache, not the judgements.
        """
        try:
            stored = self._put(self._now, judge, values)
        except sqlite3.Error:  # most likely another process is writing: the thread has the time to wait for it
            # Shielded: a judge call that is cancelled by its time-out still keeps the replies that had come.
            stored = await asyncio.shield(asyncio.wrap_future(self._thread.submit(self._put_late, judge, dict(values))))
        self._writes += 1
        if self._writes % _CHECKPOINT_EVERY == 0:
            self._thread.submit(self._checkpoint)
        return stored

    def _get(self, keys: Sequence[str]) -> dict[str, bytes]:
        return self._found(self._db, keys)

    @staticmethod
    def _found(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            found.update(db.execute(f"SELECT key, value FROM reply WHERE key IN ({marks})", some).fetchall())
        return found

    def _put(self, db: sqlite3.Connection, judge: str, values: Mapping[str, bytes]) -> dict[str, bytes]:
        db.execute("BEGIN IMMEDIATE")
        try:
            rows = [(key, judge, value) for key, value in values.items()]
            db.executemany("INSERT OR IGNORE INTO reply VALUES (?, ?, ?)", rows)
            stored = self._found(db, list(values))
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
        return stored

    def _put_late(self, judge: str, values: dict[str, bytes]) -> dict[str, bytes]:
        try:
            return self._put(self._db, judge, values)
        except sqlite3.Error as error:
            if not self.failed_writes:
                log.warning("%s: judgements are not being kept: %s", self.path, error)
            self.failed_writes += len(values)
            return values

    def _checkpoint(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    @property
    def size(self) -> int:
        """Bytes on disk."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(f.stat().st_size for f in files if f.exists())

    @property
    def hit_rate(self) -> float:
        """Hits over look-ups of this process, 0 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    def judges(self) -> list[str]:
        """The identities whose replies are stored, in alphabetical order."""
        query = "SELECT DISTINCT judge FROM reply ORDER BY judge"
        return [judge for (judge,) in self._thread.submit(lambda: self._db.execute(query).fetchall()).result()]

    def stats(self) -> CacheStats:
        (entries,) = self._thread.submit(lambda: self._db.execute("SELECT count(*) FROM reply").fetchone()).result()
        return CacheStats(entries, self.size, self.hits, self.misses, self.failed_writes)

    def close(self) -> None:
        self._now.close()
        self._thread.submit(self._db.close).result()
        self._thread.shutdown()


class CachedBackend:
    """A `TierBackend` that asks `backend` only what `cache` does not hold; errors are not kept.

    Without a backend (None) nothing is asked and what is missing is an error: replay. `identity` is then needed, to
    know whose replies to read (`replayed` finds it). Replies are stored call by call, each as large as the backend's
    `grain`.
    """

    def __init__(self, backend: TierBackend | None, cache: JudgeCache, *, identity: str | None = None) -> None:
        if backend is None and identity is None:
            raise ValueError("replay needs the identity of the judge to replay")
        self._backend, self._cache, self._replayed = backend, cache, identity
        self.grain = 64 if backend is None else backend.grain
        self.concurrency = 8 if backend is None else backend.concurrency
        self._asking: dict[str, asyncio.Future[Any]] = {}

    @property
    def identity(self) -> str:
        if self._backend is None:
            assert self._replayed is not None
            return self._replayed
        return self._backend.identity

    async def tier_logprobs(self, queries: Sequence[TierQuery]) -> list[TierReply]:
        keys = [content_hash(self.identity, q.content, *q.tiers, str(q.draw)) for q in queries]
        ask = None if self._backend is None else self._backend.tier_logprobs
        return await self._cached(keys, queries, ask, _decode_tier, TierReply(error=_MISSING))

    async def complete(self, queries: Sequence[TextQuery]) -> list[TextReply]:
        keys = [
            content_hash(self.identity, q.content, "text", str(q.max_tokens), repr(q.temperature), str(q.draw), form)
            for q in queries
            for form in [None if q.schema is None else msgspec.json.encode(q.schema, order="sorted").decode()]
        ]
        if self._backend is not None and not isinstance(self._backend, TextBackend):
            raise BadInput("judge", self.identity, "cannot write text")
        ask = None if self._backend is None else self._backend.complete
        return await self._cached(keys, queries, ask, _decode_text, TextReply(error=_MISSING))

    async def _cached[Q, R: (TierReply, TextReply)](
        self,
        keys: Sequence[str],
        queries: Sequence[Q],
        ask: Callable[[Sequence[Q]], Awaitable[list[R]]] | None,
        decode: Callable[[bytes], R],
        missing: R,
    ) -> list[R]:
        replies = {key: decode(value) for key, value in (await self._cache.get(keys)).items()}
        if ask is None:
            return [replies.get(key, missing) for key in keys]
        due = {key: q for key, q in zip(keys, queries) if key not in replies}
        # A question that another call is asking right now is waited for, not asked again.
        elsewhere = {key: self._asking[key] for key in due if key in self._asking}
        own = [(key, q) for key, q in due.items() if key not in elsewhere]
        groups = [own[i : i + self.grain] for i in range(0, len(own), self.grain)]
        for key, _ in own:
            self._asking[key] = asyncio.get_running_loop().create_future()

        async def ask_group(group: Sequence[tuple[str, Q]]) -> None:
            fresh = await ask([q for _, q in group])
            if len(fresh) != len(group):
                raise RuntimeError(f"wrong number of answers: {len(fresh)} for {len(group)} questions")
            got = {key: reply for (key, _), reply in zip(group, fresh)}
            keep = {key: _encode(reply) for key, reply in got.items() if reply.error is None}
            stored = await self._cache.put(self.identity, keep) if keep else {}
            got.update((key, decode(value)) for key, value in stored.items())
            replies.update(got)
            for key, reply in got.items():
                self._asking[key].set_result(reply)

        try:
            failures = await asyncio.gather(*map(ask_group, groups), return_exceptions=True)
        finally:
            for key, _ in own:
                future = self._asking.pop(key)
                if not future.done():
                    future.set_result(None)
        for failure in failures:
            if failure is not None:
                raise failure
        for key, future in elsewhere.items():
            reply = await asyncio.shield(future)
            if reply is None:
                raise RuntimeError("the same question failed in another call")
            replies[key] = reply
        return [replies[key] for key in keys]
