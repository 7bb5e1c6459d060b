"""Rubrics: schema, files, corpus, programmatic checks, lint and importers. Imports no torch, Megatron or vLLM."""

from megarubric.rubrics.corpus import Corpus
from megarubric.rubrics.load import load_rubrics
from megarubric.rubrics.parse import parse_rubric
from megarubric.rubrics.schema import (
    Check,
    Criterion,
    Pair,
    Provenance,
    Rubric,
    Saturation,
    Shaping,
    Tier,
    Veto,
    dumps,
    to_dict,
)

__all__ = [
    "Check",
    "Corpus",
    "Criterion",
    "Pair",
    "Provenance",
    "Rubric",
    "Saturation",
    "Shaping",
    "Tier",
    "Veto",
    "dumps",
    "load_rubrics",
    "parse_rubric",
    "to_dict",
]
