"""The numbers of one step, by the flat names that metrics.jsonl and W&B use (spec/cli.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megarubric.evaluate.summary import summarize
from megarubric.exchange.update import ExchangeReport
from megarubric.megatron.messages import Trained
from megarubric.recipe.experience import Answer, WritingTimes


def step_metrics(
    answers: Sequence[Answer], degenerate: float, times: WritingTimes, trained: Trained | None
) -> dict[str, float]:
    """Means over a step's answers and updates. Rewards: over valid answers only. A step without an update has no
    ``train/*`` numbers but ``train/skipped`` 1."""
    results = [a.result for a in answers if a.result is not None]
    s = summarize([a.judgements for a in answers], results, [a.text for a in answers])
    rewards = np.array([a.reward for a in answers if a.reward is not None])
    lengths = np.array([len(a.sample.completion.token_ids) for a in answers])
    entropy = [j.entropy for a in answers for j in a.judgements.values() if j.entropy is not None]
    values = {
        "reward/mean": s.reward,
        "reward/std": float(rewards.std()) if len(rewards) else float("nan"),
        "reward/valid_fraction": s.valid_fraction,
        "reward/degenerate_groups": degenerate,
        "veto/rate": s.veto_rate,
        "judge/unread_fraction": s.unread_fraction,
        "judge/entropy": float(np.mean(entropy)) if entropy else float("nan"),
        "rollout/tokens": float(lengths.sum()),
        "rollout/length": float(lengths.mean()),
        "rollout/words": s.words,
        "rollout/truncated_fraction": float(np.mean([a.sample.completion.finish_reason == "length" for a in answers])),
        "perf/rollout_s": times.rollout,
        "perf/judge_s": times.judge_tail,
        "perf/judge_busy_s": times.judge_busy,
    } | times.counts
    for name, c in s.criteria.items():
        if c.mean is not None:
            values[f"criterion/{name}/mean"] = c.mean
        values[f"veto/{name}"] = c.vetoes / len(answers)
    if trained is None:
        return values | {"train/skipped": 1.0}
    first, last = trained.updates[0], trained.updates[-1]
    return values | {
        "train/skipped": float(np.mean([u.skipped for u in trained.updates])),
        "train/loss": last.loss,
        "train/grad_norm": last.grad_norm,
        "train/lr": last.lr,
        "train/kl": first.kl,
        "train/kl_last_update": last.kl,
        "train/kl_reference": last.kl_ref,
        "train/entropy": first.entropy,
        "train/logprob_abs_diff": first.logprob_abs_diff,
        "train/logprob_max_diff": first.logprob_max_diff,
        "train/ratio_max_deviation": last.ratio_max_deviation,
        "train/clip_fraction": last.clip_fraction,
        "train/tis_mean": first.tis_mean,
        "train/tis_clipped_fraction": first.tis_clipped_fraction,
        "train/rejected_fraction": first.rejected_fraction,
        "train/tokens": float(sum(u.trained_tokens for u in trained.updates)),
        "train/padding_fraction": last.padding_fraction,
        "train/optimizer_steps": float(trained.steps),
    }


def exchange_metrics(report: ExchangeReport | None) -> dict[str, float]:
    """Bytes of weights that each engine took in, and bytes that went between hosts; none without engines."""
    if report is None:
        return {"perf/exchange_bytes": 0.0}
    between = {"perf/exchange_network_bytes": float(report.network_bytes)} if report.network_raw_bytes else {}
    return {"perf/exchange_bytes": float(report.nbytes)} | between
