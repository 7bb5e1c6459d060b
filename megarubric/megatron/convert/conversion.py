"""The conversion itself, both ways: plan, restart, streams of bytes, and what makes the result whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from megarubric.errors import BadInput
from megarubric.megatron import hf_files, manifest
from megarubric.megatron.convert import archive, plan, pool
from megarubric.megatron.convert.bands import Sources
from megarubric.megatron.convert.options import Options, Progress
from megarubric.megatron.dist_files import WEIGHTS, Places, dist_tensors, is_megatron, open_places
from megarubric.megatron.families import family_of
from megarubric.megatron.torch_dist import DTYPES

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Converted:
    """What was done: which way, tensors and bytes of them, and how many bytes an earlier start had already done."""

    direction: str
    tensors: int
    nbytes: int
    resumed: int


class _Done(msgspec.Struct, frozen=True):
    """A line of the journal: a unit, and what is to be known of it in the end."""

    unit: int
    result: Any = None


class _Start(msgspec.Struct, frozen=True):
    """The first line of the journal: what is converted, from which files, in which units. Nothing else goes on here."""

    source: str
    files: dict[str, tuple[int, int]]
    units: str


def convert(source: Path, target: Path, options: Options, progress: Progress) -> Converted:
    """Convert `source` into the new directory `target`.

    Raises BadInput when the source is no checkpoint, its config.json does not fit its tensors, `target` exists, another
    conversion is writing it or there is no room; ProcessDied when a process was killed. `target` appears whole or not
    at all; what was done stays in a directory beside it for the next start.
    """
    if target.exists():
        raise BadInput(target, None, "exists already; --verify would compare it with the source")
    hf, places = open_places(source, options.config)
    if is_megatron(source):
        return _Conversion(source, target, options, progress, hf, places).to_hf()
    return _Conversion(source, target, options, progress, hf, places).to_megatron()


class _Conversion:
    def __init__(
        self, source: Path, target: Path, options: Options, progress: Progress, hf: dict[str, Any], places: Places
    ) -> None:
        self.source, self.target, self.options, self.progress = source, target, options, progress
        self.hf, self.places = hf, places
        self.family = family_of(hf, str(source))
        self.manifest = self.family.manifest(hf)
        self.partial = target.with_name(f".{target.name}.partial")

    def _result(self, direction: str, units: list[plan.Unit], resumed: int) -> Converted:
        return Converted(direction, len(self.manifest), sum(unit.nbytes for unit in units), resumed)

    # To Megatron -----------------------------------------------------------------------------------------------------

    def to_megatron(self) -> Converted:
        tensors = dist_tensors(self.family, self.hf)
        units = plan.megatron_units(tensors, self.places, self.source)
        cut = plan.read_cut(self.source, self.places)
        with self._journal(units) as (results, resumed):
            self._carry(self.source)
            (self.partial / hf_files.CUT).write_bytes(msgspec.json.encode(cut))
            (self.partial / WEIGHTS).mkdir(exist_ok=True)
            self._run("writing distributed checkpoint", units, self._write_archives, results, archive.import_torch)
            stored = (
                (a.key, a.dtype, a.offsets, a.sizes, unit.file, *place)
                for number, unit in enumerate(units)
                for a, place in zip(unit.archives, results[number]["places"])
            )
            shapes = {key: tensor.shape for key, tensor in tensors.items()}
            made = archive.write_metadata(self.partial / WEIGHTS, shapes, stored)
            files = {
                f"{WEIGHTS}/{unit.file}": manifest.File(results[number]["nbytes"], results[number]["xxh3_128"])
                for number, unit in enumerate(units)
            }
            rest = [*made, *(p for p in self.partial.iterdir() if p.is_file() and p.name != JOURNAL)]
            for path in rest:
                manifest.sync(path)
                name = str(path.relative_to(self.partial))
                files[name] = manifest.File(path.stat().st_size, manifest.hash_file(path))
            dtype = DTYPES[self.places["model.embed_tokens.weight"][0].info.dtype]
            model = manifest.model_hash(self.manifest)
            manifest.write(self.partial, manifest.Manifest(manifest.FORMAT, 0, 0, {}, dtype, model, files))
        return self._result("Hugging Face to Megatron", units, resumed)

    def _write_archives(self, unit: plan.Unit, count: pool.Count) -> dict[str, Any]:
        stored = []
        with archive.HashedFile(self.partial / WEIGHTS / unit.file) as out, Sources() as sources:

            def data(item: plan.Archive) -> Iterator[memoryview]:
                for piece in item.pieces:
                    for band in plan.piece_bands(self.places, piece, self.manifest):
                        for view in sources.read(band):
                            yield view
                            count(len(view))

            for item in unit.archives:
                stored.append(archive.write_archive(out, item.dtype, item.sizes, data(item)))
            os.fsync(out.fileno())
            return {"nbytes": out.position, "xxh3_128": out.hexdigest(), "places": stored}

    # To Hugging Face -------------------------------------------------------------------------------------------------

    def to_hf(self) -> Converted:
        cut = None
        if self.options.max_shard_bytes is None and (self.source / hf_files.CUT).is_file():
            cut = read_cut_file(self.source / hf_files.CUT)
        shard = self.options.max_shard_bytes or hf_files.MAX_SHARD_BYTES
        wanted = plan.hf_plan(self.manifest, self.places, cut, shard, self.source)
        units = plan.hf_units(wanted)
        with self._journal(units) as (results, resumed):
            self._carry(self.options.beside(self.source))
            dtypes = {DTYPES[info.dtype] for info in wanted.tensors.values()}
            path = self.partial / "config.json"
            path.write_bytes(plan.fitting_config(path.read_bytes(), dtypes))
            if wanted.index is not None:
                (self.partial / hf_files.INDEX).write_text(wanted.index, encoding="utf-8")
            for file in wanted.files:
                self._allocate(self.partial / file.name, file)
            self._run("writing safetensors", units, self._write_range, results)
            for path in self.partial.iterdir():
                manifest.sync(path)
        return self._result("Megatron to Hugging Face", units, resumed)

    def _write_range(self, unit: plan.Unit, count: pool.Count) -> None:
        descriptor = os.open(self.partial / unit.file, os.O_WRONLY)
        try:
            at = unit.offset
            with Sources() as sources:
                for piece in unit.pieces:
                    for band in self._bands(piece):
                        for view in sources.read(band):
                            _write_all(descriptor, view, at)
                            at += len(view)
                            count(len(view))
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _bands(self, piece: plan.Piece) -> list[Any]:
        name = piece.name if piece.name in self.places else "model.embed_tokens.weight"
        return plan.piece_bands(self.places, piece._replace(name=name), self.manifest)

    def _allocate(self, path: Path, file: plan.HfFile) -> None:
        """The file at its full size, with its header; one that is there from an earlier start is left as it is."""
        if path.exists() and path.stat().st_size == file.nbytes:
            return
        with path.open("wb") as out:
            os.posix_fallocate(out.fileno(), 0, file.nbytes)
            out.write(file.beginning)

    # Both ------------------------------------------------------------------------------------------------------------

    def _carry(self, beside: Path) -> None:
        """Copy config.json, tokenizer, generation config and what else lies beside the weights."""
        for path in [beside / "config.json", *hf_files.carried_files(beside)]:
            shutil.copyfile(path, self.partial / path.name)

    @contextmanager
    def _journal(self, units: list[plan.Unit]) -> Iterator[tuple[dict[int, Any], int]]:
        """The partial directory, ready; results of units an earlier start finished, and their bytes.

        The directory becomes the target when the block ends without an error.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        with (self.partial / JOURNAL).open("a+b") as journal:
            self._lock(journal)
            results = self._read_journal(journal, units)
            resumed = sum(units[number].nbytes for number in results)
            self._check_room(sum(unit.nbytes for unit in units), resumed)
            self._log = journal
            yield results, resumed
        (self.partial / JOURNAL).unlink()
        self.partial.rename(self.target)
        manifest.sync(self.target.parent)

    def _lock(self, journal: Any) -> None:
        """One conversion at a time. Processes of one that was killed this moment need another to end."""
        for _ in range(20):
            try:
                return fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
        raise BadInput(self.target, None, "is being written by another conversion")

    def _read_journal(self, journal: Any, units: list[plan.Unit]) -> dict[int, Any]:
        """Results of an earlier start of this very conversion; else an empty directory and a new journal."""
        paths = {place.info.path for places in self.places.values() for place in places}
        stats = {str(path): path.stat() for path in sorted(paths)}
        start = _Start(
            str(self.source.resolve()),
            {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()},
            xxhash.xxh3_128(repr((self.hf, units)).encode()).hexdigest(),
        )
        journal.seek(0)
        first, *lines = journal.read().split(b"\n")
        try:
            if msgspec.json.decode(first, type=_Start) == start:
                done = [msgspec.json.decode(line, type=_Done) for line in lines[:-1]]  # a line cut short has no end
                journal.seek(sum(len(line) + 1 for line in [first, *lines[:-1]]))
                journal.truncate()
                return {item.unit: item.result for item in done}
        except msgspec.DecodeError:
            pass
        for path in self.partial.iterdir():
            if path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        journal.seek(0)
        journal.truncate()
        journal.write(msgspec.json.encode(start) + b"\n")
        journal.flush()
        return {}

    def _check_room(self, total: int, resumed: int) -> None:
        """Refuse, before anything is written, what the disk has no room for (10 MB for what goes along)."""
        # Safetensors files of an earlier start have their full size already.
        held = sum(path.stat().st_blocks * 512 for path in self.partial.glob("*.safetensors"))
        free = shutil.disk_usage(self.partial).free + held
        needed = total - resumed
        if free < needed + (10 << 20):
            if not resumed:
                shutil.rmtree(self.partial)
            raise BadInput(self.target, None, f"no room: {needed >> 20} MiB needed, {free >> 20} MiB free")

    def _run(
        self,
        what: str,
        units: list[plan.Unit],
        write: Callable[[plan.Unit, pool.Count], Any],
        results: dict[int, Any],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        left = [number for number in range(len(units)) if number not in results]
        before = sum(units[number].nbytes for number in results)

        def finished(number: int, result: Any) -> None:
            results[number] = result
            self._log.write(msgspec.json.encode(_Done(number, result)) + b"\n")
            self._log.flush()

        self.progress.start(what, sum(unit.nbytes for unit in units), before)
        try:
            pool.run(
                left,
                lambda number, count: write(units[number], count),
                processes=self.options.workers,
                finished=finished,
                progress=lambda done: self.progress.advance(before + done),
                meanwhile=meanwhile,
            )
        finally:
            self.progress.end()


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def read_cut_file(path: Path) -> plan.Cut:
    try:
        return msgspec.json.decode(path.read_bytes(), type=plan.Cut)
    except msgspec.DecodeError as error:
        raise BadInput(path, None, f"cannot be read: {error}") from None
