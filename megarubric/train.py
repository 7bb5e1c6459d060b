"""The loop: sample, judge, aggregate, train, exchange, evaluate. This file is the method; the rest is its parts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from megarubric.errors import Interrupted
from megarubric.evaluate.summary import flat
from megarubric.launch.run import Run
from megarubric.observe.terminal import say, step_line, warn_of
from megarubric.recipe.algorithms import algorithm
from megarubric.recipe.experience import make_batch, score
from megarubric.recipe.learning import learn, learning_rate
from megarubric.recipe.records import write_rollouts
from megarubric.recipe.statistics import exchange_metrics, step_metrics


class Clock:
    """Seconds spent under each name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[f"perf/{name}_s"] += time.perf_counter() - began


async def train(run: Run) -> None:
    """Steps from where `run` stands to `train.steps`. Raises Interrupted, state saved, when asked to stop."""
    c, state, system = run.config, run.state, run.system
    trainer, judge = system.trainer, system.judge
    settings = algorithm(c.algorithm.name).settings(**run.loss_knobs)
    if state.step == 0 and run.heldout and run.rounds:
        say(f"held-out answers before training ({len(run.heldout)} prompts) ...")
        state.before = await run.evaluate()
        run.log.log(0, flat(state.before, "eval"))

    while state.step < c.train.steps:
        step, clock = state.step + 1, Clock()
        with clock("step"):
            # Sample and judge: groups of answers, each judged while the next is still being written. Dynamic sampling
            # replaces groups that say nothing; partial rollouts leave the longest for the next step (recipe/rounds.py).
            if run.rounds:
                answers, times = await run.rounds.step(step, state.version)
            else:
                answers, times = await run.replay(step)

            # Aggregate: criterion scores to rewards, rewards to advantages within each group.
            with clock("aggregate"):
                answers, degenerate = score(answers, c.reward, run.criterion_means)
                batch = make_batch(answers, c.algorithm, c.rollout.max_new_tokens, state.version)
                write_rollouts(run.dir.rollouts, step, answers)

            # Train: one or more optimizer steps on the batch.
            with clock("train"):
                await system.training()
                lr = learning_rate(c.train, step)
                trained = await learn(trainer, batch, settings, lr)

            # Exchange: the new weights go into service on every policy engine, as one version.
            with clock("exchange"):
                state.version += 1
                exchanged = await system.publish(state.version, c.exchange.verify)

        state.step = step
        metrics = step_metrics(answers, degenerate, times, trained) | judge.metrics() | clock.seconds
        metrics |= exchange_metrics(exchanged) | {"train/weight_version": state.version}
        await run.settle()
        last, best = step == c.train.steps, False
        if run.heldout and run.rounds and (last or (c.evaluate.every and step % c.evaluate.every == 0)):
            run.after = await run.evaluate()
            metrics |= flat(run.after, "eval")
            best = state.note(run.after) and c.checkpoint.keep_best
        run.log.log(step, metrics)
        say(step_line(step, c.train.steps, metrics))
        warn_of(metrics, c.algorithm.drift_alarm)

        if last or best or run.stop_requested or (c.checkpoint.every and step % c.checkpoint.every == 0):
            await run.save(last or run.stop_requested)
        if run.stop_requested and not last:
            raise Interrupted(f"stopped after step {step} of {c.train.steps}; the same command goes on from there")
