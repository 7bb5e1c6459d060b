"""How the ranks share one model: degrees of parallelism, and the checks that refuse what cannot run.

Megatron's own terms. A rank has a place on the dense axes tp x cp x dp x pp and, for expert layers, on
etp x ep x edp x pp; both have the same number of ranks: ``dp = world / (tp * cp * pp)`` and
``edp = world / (etp * ep * pp)``. Expert parallelism therefore takes its ranks out of data, tensor and context
parallelism; it needs none of its own.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from megarubric.errors import BadInput

WHERE = "parallel layout"


class ParallelLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Degrees of parallelism. `vpp` is the number of model chunks a pipeline rank holds (None: not interleaved).

    `etp` is the tensor parallelism inside one expert; 1 keeps experts whole, which is what fine-grained experts want.
    `sequence_parallel` follows `tp`: Megatron's expert layers need it with tp > 1, and it saves activations anyway.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    cp: int = 1

    @property
    def sequence_parallel(self) -> bool:
        return self.tp > 1

    @property
    def smallest_world(self) -> int:
        """The least number of ranks this layout can run on; every valid world size is a multiple of it."""
        dense, expert = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        return math.lcm(dense, expert)

    def dp(self, world_size: int) -> int:
        """Data parallel size: how many ranks read different tokens with the same dense weights."""
        return world_size // (self.tp * self.cp * self.pp)

    def edp(self, world_size: int) -> int:
        """Expert data parallel size: how many ranks hold the same experts."""
        return world_size // (self.etp * self.ep * self.pp)

    def check(self, world_size: int, hf_config: dict[str, Any] | None = None) -> None:
        """Raise BadInput, one line, when `world_size` ranks cannot run it or `hf_config`'s model does not divide so."""
        for name in ("tp", "pp", "ep", "etp", "cp"):
            if getattr(self, name) < 1:
                raise BadInput(WHERE, name, f"must be at least 1, not {getattr(self, name)}")
        if self.vpp is not None and self.vpp < 2:
            raise BadInput(WHERE, "vpp", f"counts the chunks of a pipeline rank and must be at least 2, not {self.vpp}")
        if self.vpp is not None and self.pp < 3:
            # With two stages, the one before and the one after are the same rank, and Megatron's pairing of messages
            # mixes up activations and gradients of micro-batches that differ in length.
            raise BadInput(WHERE, "vpp", f"interleaving needs pp of at least 3, not {self.pp}")
        dense, expert = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        if world_size % dense:
            raise BadInput(
                WHERE,
                "tp * cp * pp",
                f"{world_size} ranks cannot be divided by tp {self.tp} * cp {self.cp} * pp {self.pp} = {dense}",
            )
        if world_size % expert:
            raise BadInput(
                WHERE,
                "etp * ep * pp",
                f"{world_size} ranks cannot be divided by etp {self.etp} * ep {self.ep} * pp {self.pp} = {expert}",
            )
        if hf_config is not None:
            self._check_model(hf_config)

    def _check_model(self, hf: dict[str, Any]) -> None:
        heads, groups, layers = hf["num_attention_heads"], hf["num_key_value_heads"], hf["num_hidden_layers"]
        if heads % self.tp:
            raise BadInput(WHERE, "tp", f"{heads} attention heads cannot be divided by tp {self.tp}")
        if groups % self.tp and self.tp % groups:
            raise BadInput(WHERE, "tp", f"{groups} key-value heads neither divide tp {self.tp} nor are divided by it")
        chunks = self.pp * (self.vpp or 1)
        if layers % chunks:
            what = f"pp {self.pp}" + (f" * vpp {self.vpp}" if self.vpp else "")
            raise BadInput(WHERE, "pp", f"{layers} layers cannot be divided by {what}")
        experts = hf.get("num_experts") or hf.get("num_local_experts") or 0
        if self.ep > 1 and (not experts or experts % self.ep):
            raise BadInput(WHERE, "ep", f"{experts or 'no'} experts cannot be divided by ep {self.ep}")
        width = hf.get("moe_intermediate_size")
        if width and width % self.etp:
            raise BadInput(WHERE, "etp", f"moe_intermediate_size {width} cannot be divided by etp {self.etp}")
