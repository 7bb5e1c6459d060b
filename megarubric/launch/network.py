"""What of the weights crosses from host to host in an exchange, by the layout: arithmetic, before anything starts.

A host needs every tensor for its engines, and receives what none of its own trainer ranks holds (exchange/spread.py).
So nothing crosses when each host's ranks hold a whole model between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarubric.config.schema import Parallel
from megarubric.launch.memory import WIDTH, layers_of, values_of
from megarubric.megatron.families import family_of

Cell = tuple[int, str, int]  # pipeline stage, kind of parameter, rank that has a share of them


def received_bytes(hf: Mapping[str, Any], p: Parallel, dtype: str) -> list[int]:
    """Bytes that each host receives with every version, without `exchange.delta`. The layout must be one that the model
    can have."""
    cells = _cells(dict(hf), p)
    tied = bool(hf.get("tie_word_embeddings", False)) and p.pp > 1
    out = []
    for host in range(p.nodes):
        held: set[Cell] = set()
        for rank in range(host * p.ranks_per_node, (host + 1) * p.ranks_per_node):
            stage, tp = rank // (p.ranks // p.pp), rank % p.tp
            held |= {(stage, "split", tp), (stage, "whole", 0), (stage, "expert", rank % (p.ep * p.etp))}
            if stage == 0 or (tied and stage == p.pp - 1):
                held.add((0, "embedding", tp))
        out.append(sum(n for cell, n in cells.items() if cell not in held) * WIDTH[dtype])
    return out


def _cells(hf: dict[str, Any], p: Parallel) -> dict[Cell, int]:
    """Values in each share of the parameters, counted once however many ranks hold it."""
    family = family_of(hf, "config.json")
    shapes = family.manifest(hf)
    cells: dict[Cell, int] = {}

    def add(stage: int, kind: str, ways: int, n: int) -> None:
        for share in range(ways):
            cells[stage, kind, share] = cells.get((stage, kind, share), 0) + n // ways

    for stage in range(p.pp):
        for layer in layers_of(stage, hf["num_hidden_layers"], p):
            for source in family.layer_params(hf, layer).values():
                add(stage, "split" if source.split else "whole", p.tp if source.split else 1, values_of(source, shapes))
            if family.is_moe_layer(hf, layer):
                one = sum(values_of(s, shapes) for s in family.expert_params(hf, layer, 0).values())
                add(stage, "expert", p.ep * p.etp, one * family.num_experts(hf))
    table = hf["vocab_size"] * hf["hidden_size"]
    add(0, "embedding", p.tp, table)
    add(p.pp - 1, "whole", 1, hf["hidden_size"])
    if not hf.get("tie_word_embeddings", False):
        add(p.pp - 1, "split", p.tp, table)
    return cells
