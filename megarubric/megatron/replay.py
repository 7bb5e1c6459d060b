"""Routing replay: a token goes to the experts that the engine sent it to, with gates computed from live logits.

Trainer and engine compute a router's logits with different kernels, so near a tie they choose different experts, and a
whole feed-forward block changes for that token. Replaying the engine's choice (indices only) removes that part of the
mismatch; the gates stay a function of the trainer's own weights and carry their gradient. (R3, arXiv 2510.11370.)

Every router of a chunk gets a `LayerReplay` in the place where Megatron keeps its own replay object, and asks it for
its top-k. Ours differs in three ways: tokens without a record (the last of a sequence, padding) choose for themselves;
a layer knows its place in the whole model, so pipeline and virtual stages need no common order; and with recompute the
second forward of a micro-batch takes the record that its first one had, though others came in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megarubric.megatron import cpu

cpu.ensure()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

TopK = Callable[..., tuple[Tensor, Tensor]]


class LayerReplay:
    """The record of one layer. `layer` counts from 0 over the whole model."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.layer_number: int | None = layer + 1  # Megatron sets it
        self.current: Tensor | None = None  # int64 [tokens, topk], -1 where nothing is recorded; None: no replay
        self.twice = False  # this forward is under recompute: there will be a second
        self.waiting: deque[Tensor | None] = deque()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices [tokens, topk] of the experts to use. `scores` [tokens, experts]."""
        assert default_compute_topk is not None
        record = self.current
        if self.twice:  # the first forward runs without a graph; backward runs first in, first out
            if torch.is_grad_enabled():
                record = self.waiting.popleft()
            else:
                self.waiting.append(record)
        if record is None:
            return default_compute_topk(scores, topk, num_groups, group_topk)
        known = record[:, :1] >= 0
        if bool(known.all()):
            chosen = record
        else:
            _, own = default_compute_topk(scores.detach(), topk, num_groups, group_topk)
            chosen = torch.where(known, record, own)
        return scores.gather(1, chosen), chosen


class RoutingReplay:
    """The records of all routers of this rank's chunks; empty for a model without experts."""

    def __init__(self, chunks: Sequence[torch.nn.Module], *, recompute: bool) -> None:
        self.recompute = recompute
        self.layers: list[list[LayerReplay]] = []
        for chunk in chunks:
            routers = [m for m in chunk.modules() if isinstance(m, TopKRouter)]
            self.layers.append([])
            for router in routers:
                replay = LayerReplay(router.layer_number - 1)
                router.router_replay = replay
                self.layers[-1].append(replay)

    def feed(self, chunk: int, routing: Tensor | None, *, train: bool) -> None:
        """Set what the next forward of `chunk` replays.

        routing int64 [P', L, K] for the P' positions this rank computes before sequence parallelism divides them among
        the tensor-parallel ranks, -1 where nothing is recorded; None: every token chooses for itself.
        """
        if routing is not None:
            routing = self._share(routing)
        for replay in self.layers[chunk]:
            replay.twice = self.recompute and train
            replay.current = None if routing is None else routing[:, replay.layer].contiguous()

    def clear(self) -> None:
        """Forget everything; also after a step that failed in its middle."""
        for replay in (r for layers in self.layers for r in layers):
            replay.current, replay.twice = None, False
            replay.waiting.clear()

    @staticmethod
    def _share(routing: Tensor) -> Tensor:
        tp = parallel_state.get_tensor_model_parallel_world_size()
        return routing.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()] if tp > 1 else routing
