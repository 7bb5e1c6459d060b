"""Pieces: which rectangle of which Hugging Face tensor lives in which rectangle of which local Megatron parameter.

Import, export, the weight exchange, checksums and conversion are all loops over pieces. A tensor-parallel slice is read
from, and written to, its place in the Hugging Face tensor; nothing is gathered, on any layout.

    for piece in model_pieces(models, hf_config, layout):
        piece.place.copy_(hf_tensor[piece.hf_index])          # import: every piece
        if piece.owned: hf_tensor[piece.hf_index] = piece.local   # export: each element by exactly one rank
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megarubric.config.layout import ParallelLayout
from megarubric.megatron.families import ParamSource, family_of, param_source
from megarubric.megatron.fp8_params import loadable, plain


@dataclass(frozen=True)
class Piece:
    """One rectangle. `hf_index` and `local_index` have one slice a dimension and select equal shapes.

    `param` is the live parameter: views are taken anew at each call, because Megatron's gradient buffers and optimizer
    move a parameter's storage. `owned` is True on exactly one rank for each element of each Hugging Face tensor.
    """

    hf_name: str
    hf_shape: tuple[int, ...]
    hf_index: tuple[slice, ...]
    param: Tensor
    local_index: tuple[slice, ...]
    owned: bool

    @property
    def local(self) -> Tensor:
        """To read: the view into the local parameter, shape of the rectangle, no gradient; of an FP8 parameter a copy,
        what its values stand for."""
        return plain(self.param)[self.local_index]

    @property
    def place(self) -> Tensor:
        """To write when weights are loaded: the live view, of an FP8 parameter into what its masters come from."""
        return loadable(self.param)[self.local_index]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.hf_index)


def model_pieces(models: Sequence[torch.nn.Module], hf_config: dict[str, Any], layout: ParallelLayout) -> list[Piece]:
    """All pieces of this rank, in a fixed order: model chunk by chunk, within it embedding, layers, final norm, head.

    `models` are the chunks of `model.build_model`, wrapped (DDP) or not. The pieces cover every element of every
    parameter but the rows that pad the vocabulary. With tied embeddings on a pipeline the last stage's copy of the
    embedding has pieces too, owned by none. Needs Megatron's process groups. Raises KeyError for a parameter the family
    does not know.
    """
    from megatron.core import parallel_state  # models exist, so megatron is there, bridged if need be

    family = family_of(hf_config, "config.json")
    manifest = family.manifest(hf_config)
    dense = parallel_state.get_tensor_model_parallel_rank(), layout.tp
    expert = parallel_state.get_expert_tensor_parallel_rank(), layout.etp
    first_dense = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    first_expert = parallel_state.get_expert_data_parallel_rank() == 0
    tied_copy = bool(hf_config.get("tie_word_embeddings", False)) and layout.pp > 1
    pieces: list[Piece] = []
    for name, param, key in _named_sources(models, hf_config):
        source = param_source(family, hf_config, *key)
        rank, size = expert if source.expert else dense
        owned = first_expert if source.expert else first_dense
        if tied_copy and name == "output_layer.weight":
            owned = False
        pieces += cut_parameter(source, param, manifest, rank, size, owned=owned)
    return pieces


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# An expert is a module of its own in SequentialMLP and a numbered weight of Transformer Engine's grouped linear.
_SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")


def _named_sources(
    models: Sequence[torch.nn.Module], hf_config: dict[str, Any]
) -> Iterator[tuple[str, Tensor, tuple[int | None, str, int | None]]]:
    """Each parameter of each chunk with its global layer, name in the layer, and global expert."""
    for model in models:
        model = unwrap(model)
        for name, param in model.named_parameters():
            match = _LAYER.fullmatch(name)
            if match is None:
                yield name, param, (None, name, None)
                continue
            layer, rest = model.decoder.layers[int(match[1])], match[2]
            number = layer.layer_number - 1
            if grouped := _GROUPED.fullmatch(rest):
                yield name, param, (number, f"experts.{grouped[1]}", _global_expert(layer, int(grouped[2])))
            elif sequential := _SEQUENTIAL.fullmatch(rest):
                yield name, param, (number, f"experts.{sequential[2]}", _global_expert(layer, int(sequential[1])))
            else:
                yield name, param, (number, rest, None)


def _global_expert(layer: Any, local: int) -> int:
    return int(layer.mlp.local_expert_indices[local])


def unwrap(model: torch.nn.Module) -> Any:
    """The GPTModel inside Megatron's wrappers."""
    inside: Any = model
    while not hasattr(inside, "decoder"):
        inside = inside.module
    return inside


def cut_parameter(
    source: ParamSource,
    param: Tensor,
    manifest: dict[str, tuple[int, ...]],
    rank: int,
    size: int,
    *,
    owned: bool,
) -> list[Piece]:
    """The pieces of one local parameter on tensor parallel rank `rank` of `size`.

    `param` is that rank's share, rows padded up to a multiple of `size` where they do not divide. `owned` says whether
    this is the replica that writes; of a parameter that tensor parallelism does not split, only rank 0's does. Raises
    ValueError when the parameter's rows do not fit the source.
    """
    owned = owned and (source.split is not None or rank == 0)
    pieces: list[Piece] = []
    top = 0  # local row where the part begins
    for part in source.parts:
        rows = sum(run.stop - run.start for run in part)
        share = -(-rows // size) if source.split == "rows" else rows
        first = rank * share if source.split == "rows" else 0  # row of the whole part where this rank's begin
        position = 0
        for run in part:
            # Intersect the run, rows [position, position + length) of the part, with [first, first + share).
            length = run.stop - run.start
            low, high = max(position, first), min(position + length, first + share)
            if low < high:
                shape = manifest[run.name]
                hf_index = [slice(run.start + low - position, run.start + high - position)]
                local_index = [slice(top + low - first, top + high - first)]
                if len(shape) == 2:
                    width = shape[1] // size if source.split == "columns" else shape[1]
                    column = rank * width if source.split == "columns" else 0
                    hf_index.append(slice(column, column + width))
                    local_index.append(slice(0, width))
                pieces.append(Piece(run.name, shape, tuple(hf_index), param, tuple(local_index), owned))
            position += length
        top += share
    if top != param.shape[0]:
        name = source.parts[0][0].name
        raise ValueError(f"the parameter of {name} has {param.shape[0]} rows on this rank, its family says {top}")
    return pieces
