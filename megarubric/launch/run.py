"""`megarubric train` and `eval`: configuration, running parts, resume, interruption, last table."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from megarubric.config import TrainConfig, dump, fp8, load_train
from megarubric.errors import BadInput, MegarubricError, ProcessDied
from megarubric.evaluate.heldout import evaluate
from megarubric.evaluate.summary import Summary
from megarubric.launch import dry_run, hosts, plan
from megarubric.launch.agent import run_agent
from megarubric.launch.hosts import Place
from megarubric.launch.judge import check_judge, engines_of, second_index
from megarubric.launch.rundir import RunDir, RunState, claim
from megarubric.launch.signals import StopFlag
from megarubric.launch.system import System, running
from megarubric.megatron.families import read_config
from megarubric.observe import terminal
from megarubric.observe.files import check_writable, whole_file
from megarubric.observe.metrics import MetricsLog, check_wandb
from megarubric.recipe.defence.apply import defend_rows, read_defences
from megarubric.recipe.experience import Answer, WritingTimes
from megarubric.recipe.records import read_rollouts
from megarubric.recipe.rounds import Rounds
from megarubric.reward.advantages import CriterionMeans
from megarubric.rollout.carry import read_carry, write_carry
from megarubric.rollout.data import (
    ChatTokenizer,
    Prompt,
    PromptOrder,
    PromptRow,
    held_out,
    read_prompts,
    tokenize_prompts,
)
from megarubric.rollout.partial import OpenGroup, PartialSampler
from megarubric.rollout.sampler import Sampler, SamplingSettings
from megarubric.rubrics import Rubric


class Prompts:
    """The prompts of a run: training order, held-out set, and the tokenizer that rendered them.

    Each carries the rubric of its row and the vetoes of `reward.defence`. `rows` and `kept_out` are the rows of
    `data.train` as they were read, split by `data.holdout`; `dropped` says which of them cannot be used, and why.
    """

    def __init__(self, c: TrainConfig) -> None:
        self.tokenizer = ChatTokenizer(Path(c.model.path), c.data.system_prompt)
        self.dropped: dict[str, str] = {}
        self._defences = read_defences(c.reward.defence)
        rows, out = held_out(self._read(c, c.data.train), c.data.holdout, c.data.train)
        self.rows, self.kept_out = rows, out
        self.train, held = self._ready(c, rows, c.data.train), self._ready(c, out, c.data.train)
        if c.data.heldout:
            held = self._ready(c, self._read(c, c.data.heldout), c.data.heldout)
        self.heldout = held[: c.evaluate.limit] if c.evaluate.limit is not None else held

    def rubrics(self) -> Iterator[Rubric]:
        """The rubrics of all prompts."""
        return (prompt.rubric for prompt in (*self.train, *self.heldout))

    def _read(self, c: TrainConfig, path: str) -> list[PromptRow]:
        rows = read_prompts(Path(path), [Path(p) for p in c.data.rubrics])
        if c.data.families:
            rows = [row for row in rows if row.rubric.family in c.data.families]
            if not rows:
                raise BadInput(path, "data.families", f"no prompt is of family {' or '.join(c.data.families)}")
        return rows

    def _ready(self, c: TrainConfig, rows: list[PromptRow], path: str) -> list[Prompt]:
        if not rows:
            return []
        rows = defend_rows(rows, self._defences, path)
        prompts = tokenize_prompts(rows, self.tokenizer, c.data.max_prompt_tokens, path)
        if prompts.dropped:
            self.dropped |= prompts.dropped
            reasons = ", ".join(f"{n} {reason}" for reason, n in prompts.dropped_by_reason.items())
            terminal.say(f"{path}: {len(prompts.dropped)} of {len(rows)} prompts left out ({reasons})")
        return list(prompts)


class Run:
    """Everything the loop holds."""

    def __init__(self, c: TrainConfig, dir: RunDir, prompts: Prompts, system: System) -> None:
        self.config, self.dir, self.system = c, dir, system
        self.log: MetricsLog | None = None
        self.tokenizer, self.heldout = prompts.tokenizer, prompts.heldout
        self.prompts = {p.id: p for p in prompts.train}
        self.order = PromptOrder(prompts.train, c.seed)
        self.state = RunState(fit=fit_of(c))
        self.criterion_means = CriterionMeans()
        self.after: Summary | None = None
        self._stop = StopFlag()
        r, stop = c.rollout, stop_tokens(c, self.tokenizer)
        draw = SamplingSettings(r.samples_per_prompt, r.max_new_tokens, stop, r.temperature, r.top_p, c.seed)
        self.rounds: Rounds | None = None
        if system.policies:
            assert system.judge is not None
            sampler = Sampler(system.policies, draw, r.max_num_seqs)
            partial = PartialSampler(system.policies, draw, r.oversample, r.max_staleness)
            parts = sampler, partial, system.judge, self.tokenizer, self.order
            self.rounds = Rounds(*parts, r, c.reward, self.criterion_means)
        self.eval_sampler = heldout_sampler(c, system, self.tokenizer) if system.policies else None

    @property
    def stop_requested(self) -> bool:
        return self._stop.requested

    @property
    def loss_knobs(self) -> dict[str, float | str | None]:
        a = self.config.algorithm
        return {
            "clip_low": a.clip_low,
            "clip_high": a.clip_high,
            "tis_cap": a.tis_cap,
            "tis_mode": a.tis_mode,
            "reject_below": a.reject_below,
            "reject_above": a.reject_above,
            "kl_coef": a.kl_coef,
            "kl_estimator": a.kl_estimator,
            "entropy_coef": a.entropy_coef,
        }

    async def evaluate(self) -> Summary:
        """Held-out summary of the policy as it is served now."""
        assert self.eval_sampler is not None and self.system.judge is not None
        return await evaluate(self.eval_sampler, self.system.judge, self.tokenizer, self.heldout)

    async def replay(self, step: int) -> tuple[list[Answer], WritingTimes]:
        """The recorded answers of `step`, with their recorded judgements. As many prompts are passed over."""
        assert self.config.rollout.replay is not None and self.system.judge is not None
        self.order.take(self.config.rollout.prompts_per_step)
        samples, texts, items, used = read_rollouts(Path(self.config.rollout.replay), step, self.prompts)
        judged = await self.system.judge.judge(items)
        parts = zip(samples, texts, judged, used)
        return [Answer(s, text, j, used=u) for s, text, j, u in parts], WritingTimes()

    async def save(self, last: bool = False) -> None:
        """Checkpoint of everything; older ones beyond `checkpoint.keep` go when the new one is whole. With
        `checkpoint.background` all but the `last` are written while training goes on, and `settle` finishes them."""
        assert self.system.trainer is not None
        self.state.data = self.order.state_dict()
        self.state.criterion_means = self.criterion_means.state_dict()
        self.state.carry = ""
        if self.rounds and self.rounds.partial.open:
            self.state.carry = write_carry(self.dir.carry_path(self.state.step), self.rounds.partial.open)
        path = self.dir.checkpoint_path(self.state.step)
        if path.exists():  # left by a run that died while it trained past this step with another configuration
            shutil.rmtree(path)
        background = self.config.checkpoint.background and not last
        async with self.system.trainer_at_home() as trainer:
            await trainer.save(str(path.absolute()), msgspec.json.encode(self.state).decode(), background=background)
        if not background:
            self._prune()

    async def settle(self) -> None:
        """Make a checkpoint of the save in the background if it is written."""
        if not self.config.checkpoint.background or self.system.trainer is None:
            return
        if await self.system.trainer.finish_save(wait=False) is not None:
            self._prune()

    def _prune(self) -> None:
        best = self.state.best[0] if self.state.best and self.config.checkpoint.keep_best else None
        self.dir.prune(self.config.checkpoint.keep, best)

    async def resume(self) -> None:
        """Go on from the newest checkpoint that is whole; a broken one is named and the one before it tried.

        Raises BadInput when checkpoints are there and none can be used, or when one does not fit the configuration.
        """
        assert self.system.trainer is not None
        refused: list[str] = []
        for step in self.dir.checkpoint_steps():
            path = self.dir.checkpoint_path(step)
            try:
                await self.system.training()
                extra = (await self.system.trainer.load(str(path.absolute()))).extra
                state = msgspec.json.decode(extra, type=RunState)
                still_open = self._read_carry(step, state.carry)
            except MegarubricError as error:
                refused.append(str(error))
                terminal.say(f"checkpoint {path} cannot be used ({error}); trying the one before")
                continue
            for key, value in self.state.fit.items():
                if state.fit.get(key) != value:
                    raise BadInput(
                        path, key, f"the checkpoint has {state.fit.get(key)}, the configuration says {value}"
                    )
            self.state = state
            self.order.load_state_dict(state.data)
            self.criterion_means.load_state_dict(state.criterion_means)
            if self.rounds:
                self.rounds.partial.open = still_open
            await self.system.publish(state.version, self.config.exchange.verify)
            terminal.say(f"resumed from {path}")
            return
        if refused:
            raise BadInput(self.dir.checkpoints, None, f"no checkpoint can be used: {refused[0]}; --fresh starts anew")
        async with self.system.trainer_at_home():
            pass  # a fresh start: on a GPU the engines are asleep until the trainer has left the devices

    def _read_carry(self, step: int, digest: str) -> list[OpenGroup]:
        return read_carry(self.dir.carry_path(step), digest, self.prompts) if digest and self.rounds else []


def stop_tokens(c: TrainConfig, tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Tokens that end an answer; none when a benchmark wants every answer at full length."""
    return () if c.rollout.ignore_eos else tokenizer.stop_token_ids


def heldout_sampler(c: TrainConfig, system: System, tokenizer: ChatTokenizer) -> Sampler:
    """The sampler of held-out answers, on the policy engines of `system`."""
    settings = SamplingSettings(
        c.evaluate.samples_per_prompt,
        c.rollout.max_new_tokens,
        stop_tokens(c, tokenizer),
        c.evaluate.temperature,
        c.rollout.top_p,
        c.seed,
    )
    return Sampler(system.policies, settings, c.rollout.max_num_seqs)


def fit_of(c: TrainConfig) -> dict[str, str]:
    """What a checkpoint and a configuration must agree on."""
    hf = plan.read_hf_config(c.model.path)
    shape = "x".join(str(hf.get(k)) for k in ("num_hidden_layers", "hidden_size", "num_experts", "vocab_size"))
    return {"model": shape, "model.dtype": c.model.dtype, "seed": str(c.seed), "data.train": c.data.train}


def run_train(path: str, overrides: Sequence[str], *, dry_run: bool, fresh: bool) -> int:
    """The verb. Exit status 0 done, 3 interrupted with state saved."""
    c = load_train(path, overrides)
    if not dry_run:
        plan.check_card(c.parallel, path)
    there = not (dry_run and c.model.architecture) or Path(c.model.path, "config.json").exists()
    hf = plan.read_hf_config(c.model.path) if there else read_config(c.model.architecture or "")[0]
    plan.check_layout(hf, c.parallel, path)
    if c.train.fp8 != "none" and (wrong := fp8.refuse_model(c.train.fp8, hf, c.parallel.layout)):
        raise BadInput(path, "train.fp8", wrong)
    if c.algorithm.routing_replay and not hf.get("num_experts"):
        raise BadInput(path, "algorithm.routing_replay", "is on, but the model has no experts")
    if dry_run:
        return _dry_run(c, hf, path, there)
    place = hosts.here(c.parallel.nodes)
    if place.node > 0:
        return run_agent(Path(c.runs_dir) / c.name, place, c.parallel.interface)
    check_wandb(c.wandb)
    with claim(c.runs_dir, c.name, fresh) as dir:
        return asyncio.run(_run_train(c, dir, path, place))


def _dry_run(c: TrainConfig, hf: dict[str, object], where: str, there: bool) -> int:
    """`there`: the model directory exists, so its tokenizer can be asked whether the prompts fit."""
    run_dir = Path(c.runs_dir) / c.name
    if there:
        check_judge(c, where, Prompts(c).rubrics())
    else:
        terminal.say(f"{c.model.path}: not there; model.architecture is read instead, prompts and judge are unchecked")
    nodes, share = c.parallel.nodes, c.parallel.ranks_per_node

    def named(name: str, host: int) -> str:
        return name if nodes == 1 else f"host {host}, {name}"

    def engine(name: str, index: int) -> tuple[str, Sequence[str]]:
        host = index % nodes
        return named(name, host), plan.command("engine", run_dir / f"logs/{name}.json", f"ipc://{name}")

    worker = plan.command("trainer", run_dir / "logs/trainer.json", "ipc://trainer")
    commands = [(named(f"trainer-{rank}", rank // share), worker) for rank in range(c.parallel.ranks)]
    if c.rollout.replay is None:
        commands += [engine(f"policy-{i}", i) for i in range(c.rollout.engines)]
    for i, name in enumerate(engines_of(c)):
        commands.append(engine(name, second_index(c) if name == "second-judge" else i))
    print(dry_run.describe(c, hf, commands))
    return 0


async def _run_train(c: TrainConfig, dir: RunDir, where: str, place: Place) -> int:
    from megarubric.train import train

    prompts = Prompts(c)
    check_judge(c, where, prompts.rubrics())
    dir.write_config(dump(c))
    steps = dir.checkpoint_steps()
    if steps and steps[0] >= c.train.steps:
        terminal.say(
            f"{dir.path}: all {c.train.steps} steps are done already (train.steps=N goes on, --fresh starts anew)"
        )
        return 0
    parts = f"{c.parallel.ranks} trainer rank(s), {c.rollout.engines} policy engine(s), judge"
    terminal.say(f"run {c.name}: starting {parts}" + (f" on {place.nodes} hosts" if place.nodes > 1 else ""))
    async with running(c, dir.path, plan.train_worker_config(c), place) as system:
        run = Run(c, dir, prompts, system)
        try:
            await run.resume()
            run.log = MetricsLog(dir.path, c.wandb, c.name, msgspec.to_builtins(c), run.state.step)
            await train(run)
            if c.checkpoint.export_hf:
                async with system.trainer_at_home() as trainer:
                    await trainer.export_hf(str((dir.path / "model").absolute()))
        except ProcessDied as error:
            kept = dir.checkpoint_steps()
            at = f"step {kept[0]}" if kept else "no checkpoint yet"
            cause = await system.cause(error)
            raise ProcessDied(f"{cause}; saved: {at}; the same command goes on from there") from error
        finally:
            if run.log is not None:
                run.log.close()
    _closing_words(run)
    return 0


def _closing_words(run: Run) -> None:
    before, after = run.state.before, run.after
    if before and after:
        terminal.before_after(before, after)
        terminal.show_examples(before, after)
        gain = after.reward - before.reward
        terminal.say(f"\nheld-out reward before {before.reward:.3f}, after {after.reward:.3f}, gain {gain:+.3f}")
        with whole_file(run.dir.path / "heldout.json") as f:
            f.write(msgspec.json.format(msgspec.json.encode({"before": before, "after": after}), indent=1).decode())
    terminal.where(run.dir.path)


def run_eval(path: str, overrides: Sequence[str], *, model: str, out: str, as_json: bool) -> int:
    """`megarubric eval`: held-out answers of the model in `model`, judged by the config's judge."""
    own = load_train(path, overrides)
    tested = [*overrides, f"model.path={model}"]
    if own.judge.kind == "frozen" and own.judge.model is None:  # the config's own model judges, not the one under test
        tested.append(f"judge.model={own.model.path}")
    c = load_train(path, tested)
    if not c.data.heldout and not c.data.holdout:
        raise BadInput(path, "data.heldout", "names no file: there is nothing to evaluate on")
    plan.read_hf_config(model)
    check_writable(Path(out))
    prompts = Prompts(c)
    check_judge(c, path, prompts.rubrics())

    parts = f"{c.rollout.engines} policy engine(s), judge {c.judge.kind}"
    asked = f"{len(prompts.heldout)} held-out prompts, {c.evaluate.samples_per_prompt} answers each"
    print(f"eval: {asked}; starting {parts}", file=sys.stderr, flush=True)

    async def work() -> Summary:
        async with running(c, Path(c.runs_dir) / f"{c.name}-eval", None) as system:
            assert system.judge is not None
            sampler = heldout_sampler(c, system, prompts.tokenizer)
            return await evaluate(sampler, system.judge, prompts.tokenizer, prompts.heldout)

    summary = asyncio.run(work())
    text = msgspec.json.format(msgspec.json.encode(summary), indent=1).decode()
    with whole_file(Path(out)) as f:
        f.write(text + "\n")
    if as_json:
        print(text)
    else:
        terminal.summary_table(summary, model)
        terminal.say(f"written to {out}")
    return 0
