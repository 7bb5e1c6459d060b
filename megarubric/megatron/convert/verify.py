"""Is a converted checkpoint its source, bit for bit? Reads both, whichever is which, through the same map of places.

The map read backwards is the way back, so equality here is the equality of a round trip: with the recorded cut, the
files of the other direction would be the source's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash

from megarubric.errors import BadInput
from megarubric.megatron import hf_files, manifest
from megarubric.megatron.convert import plan, pool
from megarubric.megatron.convert.bands import Sources
from megarubric.megatron.convert.conversion import read_cut_file
from megarubric.megatron.convert.options import Options, Progress
from megarubric.megatron.dist_files import Places, is_megatron, open_places
from megarubric.megatron.families import family_of

_UNIT_BYTES = 256 << 20


def verify(source: Path, target: Path, options: Options, progress: Progress) -> int:
    """Compare `target` with the `source` it was converted from; how many tensors are equal, which is all.

    Checks each config.json against its tensors, the manifest's hashes of every file, each tensor's bytes, the cut of
    the Hugging Face files and what is carried along. Raises BadInput naming the first thing that differs.
    """
    hf, places = open_places(source, options.config)
    theirs, copies = open_places(target, options.config if not (target / "config.json").is_file() else None)
    _same_config(target, hf, theirs)
    _same_cut(source, target, places, copies, recut=options.max_shard_bytes is not None)
    _same_files(options.beside(source), target)
    files = []
    for directory in (source, target):
        if (directory / manifest.NAME).is_file():
            listed = manifest.check(directory, hashes=False)
            files += [(directory, name, file) for name, file in listed.files.items()]
    shapes = family_of(hf, str(source)).manifest(hf)
    groups = _groups({**copies, **places}, shapes)
    units: list[Any] = [*groups, *files]
    sizes = sum(_nbytes(places, name, shapes) for group in groups for name in group)
    progress.start("verifying", 2 * sizes + sum(file.nbytes for _, _, file in files), 0)

    def work(number: int, count: pool.Count) -> None:
        unit = units[number]
        if isinstance(unit, tuple):
            directory, name, file = unit
            if manifest.hash_file(directory / name) != file.xxh3_128:
                raise BadInput(directory, name, "is corrupt: its hash is not the manifest's")
            count(file.nbytes)
            return
        with Sources() as sources:
            for name in unit:
                if _digest(sources, places, name, shapes, count) != _digest(sources, copies, name, shapes, count):
                    raise BadInput(target, name, "differs from the source")

    try:
        pool.run(
            list(range(len(units))),
            work,
            processes=options.workers,
            finished=lambda *_: None,
            progress=progress.advance,
        )
    finally:
        progress.end()
    return sum(len(group) for group in groups)


def _groups(places: Places, shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name in places:
        nbytes = _nbytes(places, name, shapes)
        if groups[-1] and filled + nbytes > _UNIT_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    return groups


def _shape(name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    return shapes.get(name) or shapes["model.embed_tokens.weight"]  # a repeated head of tied embeddings


def _nbytes(places: Places, name: str, shapes: dict[str, tuple[int, ...]]) -> int:
    return hf_files.nbytes(_shape(name, shapes), plan.source_places(places, name)[0].info.dtype)


def _digest(
    sources: Sources, places: Places, name: str, shapes: dict[str, tuple[int, ...]], count: pool.Count
) -> tuple[str, str]:
    """dtype and xxh3_128 of a tensor's bytes."""
    digest = xxhash.xxh3_128()
    stored = plan.source_places(places, name)
    shape = _shape(name, shapes)
    for band in plan.piece_bands({name: stored}, plan.Piece(name, 0, shape[0]), {name: shape}):
        for view in sources.read(band):
            digest.update(view)
            count(len(view))
    return stored[0].info.dtype, digest.hexdigest()


def _same_config(target: Path, hf: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key in sorted(hf.keys() | theirs.keys()):
        if key not in ("dtype", "torch_dtype") and hf.get(key) != theirs.get(key):
            raise BadInput(target / "config.json", key, f"is {theirs.get(key)!r}, the source has {hf.get(key)!r}")


def _same_cut(source: Path, target: Path, places: Places, copies: Places, *, recut: bool) -> None:
    if not is_megatron(source):
        if plan.read_cut(source, places) != read_cut_file(target / hf_files.CUT):
            raise BadInput(target, hf_files.CUT, "does not describe the source's files")
        return
    recorded = source / hf_files.CUT
    if recorded.is_file() and not recut and plan.read_cut(target, copies) != read_cut_file(recorded):
        raise BadInput(target, None, "its files are not cut as the source records")


def _same_files(source: Path, target: Path) -> None:
    for path in hf_files.carried_files(source):
        copy = target / path.name
        if not copy.is_file() or manifest.hash_file(copy) != manifest.hash_file(path):
            raise BadInput(target, path.name, "is not the source's")
