"""`megarubric sft`: supervised cold start, the same trainer with the likelihood as its loss."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from megarubric.config import SftConfig, dump, load_sft
from megarubric.errors import BadInput, Interrupted, ProcessDied
from megarubric.launch import hosts, plan
from megarubric.launch.agent import run_agent
from megarubric.launch.hosts import Place
from megarubric.launch.remote import meeting
from megarubric.launch.rundir import RunDir, claim
from megarubric.launch.signals import StopFlag
from megarubric.launch.supervisor import Supervisor
from megarubric.launch.system import System
from megarubric.megatron.client import TrainerClient
from megarubric.observe import terminal
from megarubric.observe.metrics import MetricsLog, check_wandb
from megarubric.recipe.algorithms import algorithm
from megarubric.recipe.learning import learning_rate
from megarubric.recipe.sft_data import Row, RowOrder, batches, make_batch, read_rows
from megarubric.rollout.data import ChatTokenizer


class SftState(msgspec.Struct, kw_only=True):
    """What is needed to go on, kept inside each checkpoint."""

    step: int = 0
    data: dict[str, int] = {}


def run_sft(path: str, overrides: Sequence[str], *, fresh: bool) -> int:
    """The verb. Exit status 0 done, 3 interrupted with state saved."""
    c = load_sft(path, overrides)
    plan.check_card(c.parallel, path)
    plan.check_layout(plan.read_hf_config(c.model.path), c.parallel, path)
    place = hosts.here(c.parallel.nodes)
    if place.node > 0:
        return run_agent(Path(c.runs_dir) / c.name, place, c.parallel.interface)
    check_wandb(c.wandb)
    with claim(c.runs_dir, c.name, fresh) as dir:
        return asyncio.run(_run(c, dir, place))


def _read(paths: Sequence[str], tokenizer: ChatTokenizer, max_tokens: int) -> list[Row]:
    rows: list[Row] = []
    for name in paths:
        found, too_long = read_rows(Path(name), tokenizer, max_tokens)
        if too_long:
            terminal.say(f"{name}: {too_long} rows left out (longer than {max_tokens} tokens)")
        rows += found
    return rows


async def _run(c: SftConfig, dir: RunDir, place: Place) -> int:
    tokenizer = ChatTokenizer(Path(c.model.path))
    rows = _read(c.data.train, tokenizer, c.data.max_tokens)
    heldout = _read(c.data.heldout, tokenizer, c.data.max_tokens)
    dir.write_config(dump(c))
    async with meeting(dir.path, place, c.parallel.interface) as fleet:
        system = System(Supervisor(dir.logs), plan.socket_dir(dir.path), fleet)
        return await _train(c, dir, system, rows, heldout)


async def _train(c: SftConfig, dir: RunDir, system: System, rows: Sequence[Row], heldout: Sequence[Row]) -> int:
    log: MetricsLog | None = None
    stop = StopFlag()
    try:
        trainer = system.trainer = system.start_trainer(
            plan.sft_worker_config(c), c.parallel.ranks, c.parallel.master_port
        )
        await system.ready()
        state, order = SftState(), RowOrder(rows, c.seed, c.data.tokens_per_step)
        if steps := dir.checkpoint_steps():
            saved = await trainer.load(str(dir.checkpoint_path(steps[0]).absolute()))
            state = msgspec.json.decode(saved.extra, type=SftState)
            order.load_state_dict(state.data)
            terminal.say(f"resumed from {dir.checkpoint_path(steps[0])}")
        log = MetricsLog(dir.path, c.wandb, c.name, msgspec.to_builtins(c), state.step)
        terminal.say(f"{len(rows)} rows, {sum(len(r.token_ids) for r in rows)} tokens; {c.train.steps} steps")
        await _steps(c, dir, trainer, state, order, heldout, log, stop)
        out = Path(c.out) if c.out else dir.path / "model"
        await trainer.export_hf(str(out.absolute()))
        terminal.say(f"model written to {out}")
    except ProcessDied as error:
        kept = dir.checkpoint_steps()
        raise ProcessDied(
            f"{await system.cause(error)}; saved: {f'step {kept[0]}' if kept else 'nothing yet'}"
        ) from error
    finally:
        if log is not None:
            log.close()
        await system.close()
    return 0


async def _steps(
    c: SftConfig,
    dir: RunDir,
    trainer: TrainerClient,
    state: SftState,
    order: RowOrder,
    heldout: Sequence[Row],
    log: MetricsLog,
    stop: StopFlag,
) -> None:
    settings = algorithm("sft").settings()
    began, seen, first = time.perf_counter(), 0, state.step + 1
    for step in range(first, c.train.steps + 1):
        batch = make_batch(order.take(), c.data.mean, c.data.prompt_loss_weight)
        trained = await trainer.train(batch, settings, learning_rate(c.train, step))
        u = trained.updates[0]
        seen += u.tokens
        rate = seen / (time.perf_counter() - began)
        values = {
            "train/loss": u.loss,
            "train/grad_norm": u.grad_norm,
            "train/lr": u.lr,
            "train/tokens": u.trained_tokens,
            "perf/train_s": trained.seconds,
            "perf/tokens_per_s": rate,
        }
        state.step = step
        last = step == c.train.steps
        saving = last or stop.requested or (c.checkpoint.every and step % c.checkpoint.every == 0)
        if saving and heldout:
            values["eval/loss"] = await heldout_loss(trainer, heldout, c.train.micro_batch_tokens)
        log.log(step, values)
        if step % 10 == 0 or saving:
            held = f"  held-out {values['eval/loss']:.4f}" if "eval/loss" in values else ""
            left = (c.train.steps - step) * (time.perf_counter() - began) / (step - first + 1)
            terminal.say(
                f"step {step:>5}/{c.train.steps}  loss {u.loss:.4f}{held}  lr {u.lr:.1e}  {rate:,.0f} tok/s"
                f"  {left / 60:.1f} min left"
            )
        if saving:
            path = dir.checkpoint_path(step)
            shutil.rmtree(path, ignore_errors=True)
            state.data = order.state_dict()
            await trainer.save(str(path.absolute()), msgspec.json.encode(state).decode())
            dir.prune(c.checkpoint.keep)
        if stop.requested and not last:
            raise Interrupted(f"stopped after step {step} of {c.train.steps}; the same command goes on from there")


async def heldout_loss(trainer: TrainerClient, rows: Sequence[Row], budget: int) -> float:
    """Mean negative log-likelihood (nats) of the trained tokens of `rows`."""
    total = count = 0.0
    for part in batches(rows, 4 * budget):
        batch = make_batch(part)
        if batch.loss_mask is None:
            raise BadInput("held-out rows", None, "have nothing to predict")
        logprobs, _ = await trainer.logprobs(batch)
        total -= float(np.dot(logprobs.astype(np.float64), batch.loss_mask))
        count += float(batch.loss_mask.sum())
    return total / count
