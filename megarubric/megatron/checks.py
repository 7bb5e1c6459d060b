"""What a batch must have before ranks run on it: refused on all of them alike, and before any collective."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarubric.errors import MegarubricError
from megarubric.megatron.families import Family
from megarubric.megatron.messages import LossSettings, TrainBatch


class BadBatch(MegarubricError):
    """A batch that this model or these loss settings cannot use."""


def check_batch(batch: TrainBatch, family: Family, hf: dict[str, Any], settings: LossSettings | None = None) -> None:
    """Raises BadBatch for a batch that the model of config `hf` cannot take, or that `settings` cannot train on."""
    if int(batch.tokens.max()) >= hf["vocab_size"]:
        raise BadBatch(f"token id {int(batch.tokens.max())} is outside the vocabulary of {hf['vocab_size']}")
    if batch.routing is not None:
        _check_routing(batch.routing, family, hf)
    if batch.n_updates > len(batch.lengths):
        raise BadBatch(f"{batch.n_updates} updates of {len(batch.lengths)} sequences")
    if settings is None:
        return
    for name in ("loss_mask", "weights", "advantages"):
        if getattr(batch, name) is None:
            raise BadBatch(f"training needs {name}")
    for name in ("tis_cap", "reject_below", "reject_above"):
        if getattr(settings, name) > 0 and batch.rollout_logprobs is None:
            raise BadBatch(f"{name} is set, but the batch has no rollout_logprobs")
    if settings.kl_coef != 0 and batch.ref_logprobs is None:
        raise BadBatch("kl_coef is set, but the batch has no ref_logprobs")


def _check_routing(routing: NDArray[Any], family: Family, hf: dict[str, Any]) -> None:
    experts = family.num_experts(hf)
    if not experts:
        raise BadBatch("routing is given, but the model has no experts")
    shape = (hf["num_hidden_layers"], hf["num_experts_per_tok"])
    if routing.shape[1:] != shape:
        raise BadBatch(f"routing has {routing.shape[1:]} layers and experts a token, the model {shape}")
    recorded = routing[routing[:, 0, 0] != np.iinfo(routing.dtype).max]
    if recorded.size and int(recorded.max()) >= experts:
        raise BadBatch(f"routing names expert {int(recorded.max())}, the model has {experts}")
