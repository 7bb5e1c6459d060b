"""One training step on the trainer: the reference's log-probabilities when the loss needs them, then the update."""

from __future__ import annotations

import math
from dataclasses import replace

from megarubric.config.schema import Train
from megarubric.megatron.client import TrainerClient
from megarubric.megatron.messages import LossSettings, TrainBatch, Trained


def learning_rate(t: Train, step: int) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then the schedule down to ``min_lr_ratio * lr``."""
    if step <= t.warmup_steps:
        return t.lr * step / t.warmup_steps
    if t.schedule == "constant":
        return t.lr
    progress = min(1.0, (step - t.warmup_steps - 1) / max(1, t.steps - t.warmup_steps))
    left = 1 - progress if t.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return t.lr * (t.min_lr_ratio + (1 - t.min_lr_ratio) * left)


async def learn(trainer: TrainerClient, batch: TrainBatch | None, settings: LossSettings, lr: float) -> Trained | None:
    """Train on `batch`; None, and nothing changed, when there is nothing to learn from.

    A batch of several updates is measured against the policy before the first: the trainer computes those (old)
    log-probabilities itself. With a single update the policy is its own old policy.
    """
    if batch is None:
        return None
    if settings.kl_coef > 0:
        reference, _ = await trainer.logprobs(batch, "reference", settings.temperature)
        batch = replace(batch, ref_logprobs=reference)
    return await trainer.train(batch, settings, lr)
