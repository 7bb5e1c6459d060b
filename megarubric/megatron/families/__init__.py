"""Model families: what a Hugging Face config.json means to Megatron, and where its tensors live there.

One file a family, whose `FAMILY` is a `Family`; `family_of` finds it by ``model_type``. Adding one is a new file, a
line in `_FAMILIES` and a test against transformers.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megarubric.errors import BadInput

_FAMILIES = {name: f"megarubric.megatron.families.{name}" for name in ("qwen3_moe", "qwen3", "qwen2_moe")}


@dataclass(frozen=True)
class Run:
    """Rows `start` to `stop` of the Hugging Face tensor `name` (all of its columns, if it has any)."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class ParamSource:
    """How one whole (not yet tensor-parallel) Megatron parameter is made of Hugging Face tensors.

    `parts` are stacked along dimension 0 in the local parameter, each part being its runs one under the other. `split`
    says what tensor parallelism divides: the rows of each part ("rows": column-parallel linears, embeddings), the
    columns ("columns": row-parallel linears), or nothing (None). A fused gate/up projection thus has two parts, because
    each rank holds its rows of the gate above its rows of the up projection. `expert` parameters are divided by expert
    tensor parallelism instead and are replicated over the expert data parallel group.
    """

    parts: tuple[tuple[Run, ...], ...]
    split: Literal["rows", "columns"] | None = None
    expert: bool = False


class Family(Protocol):
    """What a family provides. `hf` is the parsed config.json, `where` its path for error messages.

    Parameters have Transformer Engine's names, which are those of distributed checkpoints on any machine.
    """

    def check(self, hf: dict[str, Any], where: str) -> None:
        """Raise BadInput for a config this family cannot build exactly."""

    def num_experts(self, hf: dict[str, Any]) -> int:
        """Routed experts of an MoE layer; 0 for a dense family."""

    def is_moe_layer(self, hf: dict[str, Any], layer: int) -> bool:
        """Whether layer `layer`, from 0, has experts."""

    def transformer_fields(self, hf: dict[str, Any]) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig that the architecture decides."""

    def rope_theta(self, hf: dict[str, Any]) -> float:
        """Base period of the rotary embedding."""

    def manifest(self, hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, in file order: all of a layer before the next."""

    def model_params(self, hf: dict[str, Any]) -> dict[str, ParamSource]:
        """The parameters outside the layers: embedding, final norm and, unless tied, the head."""

    def layer_params(self, hf: dict[str, Any], layer: int) -> dict[str, ParamSource]:
        """The parameters of a layer, without its routed experts, named below ``decoder.layers.N``."""

    def expert_params(self, hf: dict[str, Any], layer: int, expert: int) -> dict[str, ParamSource]:
        """The parameters of one routed expert: ``experts.linear_fc1.weight`` and ``experts.linear_fc2.weight``."""


def param_source(family: Family, hf: dict[str, Any], layer: int | None, name: str, expert: int | None) -> ParamSource:
    """Where a parameter of a live model comes from, under its local or its Transformer Engine name.

    `name` is Megatron's, below its decoder layer when `layer` (global, from 0) is given, and with ``experts.`` but
    without the expert's index when `expert` (global) is given. Raises KeyError for a name the family lacks.
    """
    if layer is None:
        if name == "output_layer.weight" and hf.get("tie_word_embeddings", False):  # a last stage's copy
            name = "embedding.word_embeddings.weight"
        return family.model_params(hf)[name]
    if expert is not None:
        return family.expert_params(hf, layer, expert)[name]
    params = family.layer_params(hf, layer)
    # The norm before a linear is a module of its own in the local spec, part of the linear in Transformer Engine's.
    fused = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
    if not family.is_moe_layer(hf, layer):
        fused["pre_mlp_layernorm.weight"] = "mlp.linear_fc1.layer_norm_weight"
    return params[fused.get(name, name)]


def read_config(config: dict[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    """A config.json, its directory, or its parsed content -> (content, name for messages). Raises BadInput."""
    if isinstance(config, dict):
        return config, "config.json"
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(path, None, error.strerror or str(error)) from None
    except ValueError as error:
        raise BadInput(path, None, f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise BadInput(path, None, "is not a JSON object")
    return parsed, str(path)


def family_of(hf: dict[str, Any], where: str) -> Family:
    """The family of a config.json. Raises BadInput for an unknown one and for a config the family refuses."""
    model_type = hf.get("model_type")
    if model_type not in _FAMILIES:
        raise BadInput(where, "model_type", f"{model_type!r} is not supported; known: {', '.join(_FAMILIES)}")
    family: Family = importlib.import_module(_FAMILIES[model_type]).FAMILY
    family.check(hf, where)
    return family
