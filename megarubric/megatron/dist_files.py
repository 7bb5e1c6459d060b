"""Megatron's distributed checkpoints as Hugging Face tensors: which rectangle of which tensor lies where.

The global tensors of a distributed checkpoint do not depend on the parallel layout that wrote them, or will read them:
layers are numbered over all stages, experts over all ranks, and tensor-parallel slices are rectangles of one whole. So
one map from names to names serves every layout. No torch is imported.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarubric.errors import BadInput
from megarubric.megatron import manifest
from megarubric.megatron.families import Family, ParamSource, Run, family_of, read_config
from megarubric.megatron.hf_files import TensorInfo, open_checkpoint
from megarubric.megatron.torch_dist import Archives, Stored, read_metadata

WEIGHTS = "weights"


@dataclass(frozen=True)
class DistTensor:
    """One tensor of a distributed checkpoint: its rows, all but the last dimension flattened, are `runs` in order."""

    shape: tuple[int, ...]
    runs: tuple[Run, ...]


def dist_tensors(family: Family, hf: dict[str, Any]) -> dict[str, DistTensor]:
    """Key -> tensor of the distributed checkpoint of the whole model, in the order of the layers.

    The experts of a layer are stacked in one tensor. The vocabulary is not padded: a reader that pads it to its own
    tensor parallelism fills what is missing with zeros.
    """
    shapes = family.manifest(hf)
    tensors: dict[str, DistTensor] = {}

    def add(key: str, sources: list[ParamSource], stacked: bool = False) -> None:
        runs = tuple(run for source in sources for part in source.parts for run in part)
        rows = sum(run.stop - run.start for run in runs)
        shape = (rows, *shapes[runs[0].name][1:])
        if stacked:
            shape = (len(sources), rows // len(sources), *shape[1:])
        tensors[key] = DistTensor(shape, runs)

    params = family.model_params(hf)
    embedding = "embedding.word_embeddings.weight"
    add(embedding, [params.pop(embedding)])
    for layer in range(hf["num_hidden_layers"]):
        at = f"decoder.layers.{layer}"
        for name, source in family.layer_params(hf, layer).items():
            add(f"{at}.{name}", [source])
        if family.is_moe_layer(hf, layer):
            experts = [family.expert_params(hf, layer, i) for i in range(family.num_experts(hf))]
            for name in experts[0]:
                add(f"{at}.mlp.experts.{name}", [expert[name] for expert in experts], stacked=True)
    for name, source in params.items():
        add(name, [source])
    return tensors


@dataclass(frozen=True)
class Place:
    """A rectangle of a Hugging Face tensor and where it is stored: `info`'s rows, of which it is all.

    `row` and `column` say where in the tensor it begins; columns count elements of everything behind the first
    dimension.
    """

    row: int
    column: int
    info: TensorInfo

    @property
    def columns(self) -> int:
        return math.prod(self.info.shape[1:])

    def overlap(self, index: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Where the rectangle `index` of the tensor and this one meet: index into `info`, index into the rectangle."""
        begins, sizes = (self.row, self.column), (self.info.shape[0], self.columns)
        stored, wanted = [], []
        for axis, begin, size in zip(index, begins, sizes):
            low, high = max(axis.start, begin), min(axis.stop, begin + size)
            if low >= high:
                return None
            stored.append(slice(low - begin, high - begin))
            wanted.append(slice(low - axis.start, high - axis.start))
        return tuple(stored), tuple(wanted)


Places = dict[str, list[Place]]


def is_megatron(directory: str | Path) -> bool:
    """Whether `directory` is, or holds in `weights`, a distributed checkpoint."""
    return weights_directory(Path(directory)) is not None


def weights_directory(directory: Path) -> Path | None:
    for place in (directory / WEIGHTS, directory):
        if (place / ".metadata").is_file():
            return place
    return None


def open_places(directory: str | Path, config: str | Path | None = None) -> tuple[dict[str, Any], Places]:
    """config.json and the places of all tensors, of a checkpoint of either kind. Raises BadInput naming what is wrong.

    `config` is the directory, or the file, with the config.json of a distributed checkpoint that has none in it.
    """
    directory = Path(directory)
    if not is_megatron(directory):
        hf, tensors = open_checkpoint(directory)
        return hf, {name: [Place(0, 0, info)] for name, info in tensors.items()}
    hf, where = read_config(config or directory)
    weights = weights_directory(directory)
    assert weights is not None
    family = family_of(hf, where)
    if weights != directory:
        manifest.check(directory, hashes=False, under=f"{WEIGHTS}/")
    return hf, _hf_places(weights, read_metadata(weights), family, hf)


def _hf_places(weights: Path, stored: dict[str, Stored], family: Family, hf: dict[str, Any]) -> Places:
    places: Places = {name: [] for name in family.manifest(hf)}
    with Archives(weights) as archives:
        tensors = dist_tensors(family, hf)
        for key, tensor in tensors.items():
            if key not in stored:
                raise BadInput(weights, key, "is missing: config.json does not describe this checkpoint")
            _check_shape(weights, key, stored[key].shape, tensor.shape)
            tops = [0, *itertools.accumulate(run.stop - run.start for run in tensor.runs)]
            covered = 0
            for block in stored[key].blocks:
                for row, column, info in archives.rectangles(key, stored[key], block):
                    covered += math.prod(info.shape)
                    for name, at, part in _rows_of(tensor.runs, tops, row, info):
                        places[name].append(Place(at, column, part))
            if covered != math.prod(stored[key].shape):
                raise BadInput(weights, key, "has parts that are missing or overlap")
    unexpected = _weight_keys(stored) - tensors.keys()
    if unexpected:
        raise BadInput(weights, min(unexpected), "is unexpected: the model of config.json has no such tensor")
    return places


def _weight_keys(stored: dict[str, Stored]) -> set[str]:
    roots = ("embedding.", "decoder.", "output_layer.")
    return {key for key in stored if key.startswith(roots)}


def _check_shape(weights: Path, key: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    vocabulary = key in ("embedding.word_embeddings.weight", "output_layer.weight")
    fits = found == wanted or (vocabulary and found[1:] == wanted[1:] and found[0] >= wanted[0])
    if not fits:
        raise BadInput(weights, key, f"has shape {list(found)}, config.json asks for {list(wanted)}")


def _rows_of(
    runs: tuple[Run, ...], tops: list[int], row: int, info: TensorInfo
) -> Iterator[tuple[str, int, TensorInfo]]:
    """Cut stored rows, the first of which is row `row` of the runs, by Hugging Face tensor: name, row there, rows.

    `tops` are the rows at which the runs begin, and the end. Padding of the vocabulary lies behind it and is left out.
    """
    last = min(row + info.shape[0], tops[-1])
    number = bisect.bisect_right(tops, row) - 1
    while number < len(runs) and tops[number] < last:
        low, high = max(tops[number], row), min(tops[number + 1], last)
        offset = info.offset + (low - row) * info.row_bytes
        part = TensorInfo(info.path, info.dtype, (high - low, *info.shape[1:]), offset)
        yield runs[number].name, runs[number].start + low - tops[number], part
        number += 1
