"""Algorithms by name: token weights and settings of the one loss. The trainer never sees a name.

| name    | weight of a trained token   | surrogate     | ratio    | clip low, high | source                        |
| ------- | --------------------------- | ------------- | -------- | -------------- | ----------------------------- |
| grpo    | 1 / (N len)                 | clip          | token    | 0.2, 0.2       | arXiv 2402.03300, eq. 3       |
| dr_grpo | 1 / (N max_new_tokens)      | clip          | token    | 0.2, 0.2       | arXiv 2503.20783, section 3   |
| dapo    | 1 / (trained tokens)        | clip          | token    | 0.2, 0.28      | arXiv 2503.14476, eq. 8       |
| gspo    | 1 / (N len)                 | clip          | sequence | 3e-4, 4e-4     | arXiv 2507.18071, section 5.1 |
| cispo   | 1 / (trained tokens)        | detached_clip | token    | 1, 4           | arXiv 2506.13585, eq. 4       |
| sft     | 1 / (trained tokens)        | logprob       | token    | unused         |                               |

N is the number of sequences of an optimizer step that have a trained token, len the trained tokens of the sequence.
Dr. GRPO also wants centred, unstandardised advantages (reward.advantage: center). CISPO's lower clip of 1 means none.
Weights are made for each optimizer step by itself, so one step's loss is a mean whatever the batch is split into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.errors import BadInput
from megarubric.megatron.messages import LossSettings

# trained tokens of each sequence [S], longest answer allowed -> weight of each sequence's trained tokens [S]
SequenceWeights = Callable[[NDArray[np.int64], int], NDArray[np.float64]]


def _sequence_mean(trained: NDArray[np.int64], max_new_tokens: int) -> NDArray[np.float64]:
    return 1.0 / (max(int((trained > 0).sum()), 1) * np.maximum(trained, 1))


def _constant_length(trained: NDArray[np.int64], max_new_tokens: int) -> NDArray[np.float64]:
    return np.full(len(trained), 1.0 / (max(int((trained > 0).sum()), 1) * max_new_tokens))


def _token_mean(trained: NDArray[np.int64], max_new_tokens: int) -> NDArray[np.float64]:
    return np.full(len(trained), 1.0 / max(int(trained.sum()), 1))


@dataclass(frozen=True)
class Algorithm:
    """A name's token weights and its loss with default clips."""

    name: str
    sequence_weights: SequenceWeights
    loss: LossSettings

    def token_weights(
        self,
        loss_mask: NDArray[np.float32],
        lengths: NDArray[np.int32],
        max_new_tokens: int,
        updates: NDArray[np.int32] | None = None,
    ) -> NDArray[np.float32]:
        """float32[T] weights of `TrainBatch`, 0 where `loss_mask` (float32[T], 0 or 1) is 0.

        lengths: int32[S], sum T. updates: int32[S], the optimizer step each sequence takes part in, None for one step.
        """
        trained = np.add.reduceat(loss_mask, np.cumsum(lengths) - lengths).astype(np.int64)
        weights = np.zeros(len(lengths))
        groups = np.zeros(len(lengths), dtype=np.int32) if updates is None else updates
        for u in np.unique(groups):
            rows = groups == u
            weights[rows] = self.sequence_weights(trained[rows], max_new_tokens)
        return (np.repeat(weights, lengths) * loss_mask).astype(np.float32)

    def settings(
        self,
        *,
        clip_low: float | None = None,
        clip_high: float | None = None,
        tis_cap: float = 0.0,
        tis_mode: str = "truncate",
        reject_below: float = 0.0,
        reject_above: float = 0.0,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
        temperature: float = 1.0,
    ) -> LossSettings:
        """The loss with the run's numbers; a clip of None keeps the algorithm's own."""
        return msgspec.convert(
            {
                **msgspec.structs.asdict(self.loss),
                "clip_low": self.loss.clip_low if clip_low is None else clip_low,
                "clip_high": self.loss.clip_high if clip_high is None else clip_high,
                "tis_cap": tis_cap,
                "tis_mode": tis_mode,
                "reject_below": reject_below,
                "reject_above": reject_above,
                "kl_coef": kl_coef,
                "kl_estimator": kl_estimator,
                "entropy_coef": entropy_coef,
                "temperature": temperature,
            },
            LossSettings,
        )


ALGORITHMS = {
    a.name: a
    for a in (
        Algorithm("grpo", _sequence_mean, LossSettings()),
        Algorithm("dr_grpo", _constant_length, LossSettings()),
        Algorithm("dapo", _token_mean, LossSettings(clip_high=0.28)),
        Algorithm("gspo", _sequence_mean, LossSettings(ratio="sequence", clip_low=3e-4, clip_high=4e-4)),
        Algorithm("cispo", _token_mean, LossSettings(surrogate="detached_clip", clip_low=1.0, clip_high=4.0)),
        Algorithm("sft", _token_mean, LossSettings(surrogate="logprob")),
    )
}


def algorithm(name: str) -> Algorithm:
    """The algorithm called `name`; raises BadInput naming those there are."""
    if name not in ALGORITHMS:
        raise BadInput("config", "algorithm.name", f"{name!r} is none of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
