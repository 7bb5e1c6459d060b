"""The run configuration: one typed struct a section, shallow on purpose, every default visible here.

Everything that can be refused is refused while parsing (`check_*` below), with the sentence a person needs, before a
process starts. This package imports neither torch nor vllm nor megatron.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from megarubric.config import fp8, slurm
from megarubric.config.judge import Judge, check_judge
from megarubric.config.layout import ParallelLayout
from megarubric.config.rollout import Rollout, check_rollout
from megarubric.config.section import positive
from megarubric.errors import BadInput

Family = Literal["instruction", "creative", "social", "humanities", "reasoning", "safety", "defence", "style"]


# Memory in GB and architecture.
CARDS = {"a100": (80.0, 80), "h100": (80.0, 90), "h200": (141.0, 90), "b200": (180.0, 100)}


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: unknown keys are errors."""


class Model(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy: a Hugging Face directory (config.json, safetensors, tokenizer)."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    architecture: str | None = None  # a config.json that --dry-run reads while `path` is not there


class Data(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prompts. Each file is a rubric file whose instance rubrics carry their prompt, or JSONL {id, prompt, rubric}.

    `rubrics` names further rubric files or directories that JSONL prompts refer to by id.
    """

    train: str
    heldout: str | None = None
    holdout: int = 0  # instead of `heldout`: so many prompts of `train`, the same in every run, are kept out of it
    families: list[str] = []  # only prompts whose rubric is of one of these families; empty = all
    rubrics: list[str] = []
    max_prompt_tokens: int = 256
    system_prompt: str | None = None


class Reward(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From rewards to advantages (spec/reward.md, group advantages)."""

    advantage: Literal["center", "standardize", "objective_wise"] = "standardize"
    gamma: float = 0.0  # objective_wise only: weight w * (1 - running mean score)^gamma
    defence: list[str] = []  # rubric files or directories whose vetoes gate every prompt's answers (docs/defence.md)


class Algorithm(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Policy optimisation. `name` chooses token weights and the surrogate; the numbers below are its knobs.

    A clip or cap of null takes the algorithm's own default (recipe/algorithms.py lists them).
    """

    name: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    tis_cap: float = 2.0  # importance sampling between engine and trainer, cut off at this ratio; 0 = off
    tis_mode: Literal["truncate", "mask"] = "truncate"  # a token beyond the cap keeps the cap, or is left out
    reject_below: float = 0.0  # answers whose geometric-mean ratio trainer : engine is below or above are left out;
    reject_above: float = 0.0  # 0 = no bound
    drift_alarm: float = 0.05  # warn when the mean |trainer - engine| log-probability of a step is above
    routing_replay: bool = False  # the trainer sends tokens to the experts the engine chose (R3, arXiv 2510.11370)
    entropy_coef: float = 0.0
    updates_per_step: int = 1  # optimizer steps a rollout batch is split into


class Train(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The optimizer and its budget."""

    steps: int = 20
    lr: float = 1e-6
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    micro_batch_tokens: int = 4096  # of a data-parallel rank
    recompute: bool = False
    optimizer_offload: bool = False  # Adam and its state on the host (Megatron's hybrid optimizer); a GPU, bfloat16
    fp8: fp8.Recipe = "none"  # of Transformer Engine's matrix products (config/fp8.py)
    fp8_parameters: bool = False  # the weights of those products are kept in FP8 as well (docs/layouts.md)
    fp8_bf16_layers: int = 1  # so many first and last layers keep bf16 linears; 0 with delayed scaling


class Parallel(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The trainer's layout. world size = `ranks` = dp * tp * pp * cp; experts: ep * etp divides dp * cp * tp."""

    ranks: int = 1
    nodes: int = 1  # hosts, with ranks / nodes of the ranks each; every host starts the same command (docs/hosts.md)
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int = 1
    threads: int | None = None  # CPU threads a rank; null = cores / ranks
    master_port: int | None = None  # null = a free one
    interface: str | None = None  # network interface between hosts, e.g. ib0; null = the one of the host's name
    card: Literal["a100", "h100", "h200", "b200"] | None = None  # the GPU this is meant for, for checks; null = a CPU

    @property
    def device_gb(self) -> float | None:
        """Memory of the card, 1e9 bytes; None on a CPU."""
        return CARDS[self.card][0] if self.card else None

    @property
    def sm(self) -> int | None:
        """Architecture of the card (90: Hopper); None on a CPU."""
        return CARDS[self.card][1] if self.card else None

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    def places(self, gpus: int) -> int:
        """How many engines on `gpus` GPUs each there is room for: none is on two hosts."""
        return self.ranks_per_node // gpus * self.nodes

    @property
    def layout(self) -> ParallelLayout:
        """The degrees as Megatron sees them."""
        return ParallelLayout(tp=self.tp, pp=self.pp, vpp=self.vpp, ep=self.ep, etp=self.etp, cp=self.cp)


class Exchange(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weight exchange: flat buckets, two of `bucket_mb` MiB each, in each host's shared memory or in each GPU's own."""

    bucket_mb: int = 64
    through: Literal["auto", "host", "device"] = "auto"  # device: CUDA IPC, where engines and ranks share GPUs (auto)
    delta: bool = False  # between hosts, send what changed; costs host memory of what travels, at both ends
    verify: bool = True  # compare the engine's checksum with the trainer's after every exchange


class Checkpoint(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything needed to go on: model, optimizer, data position, RNG. `every` 0 saves at the end only."""

    every: int = 10
    keep: int = 2
    background: bool = False  # ranks copy their state to the host and write while training goes on
    keep_best: bool = False  # also that of the best held-out reward, saved when an evaluation finds it
    export_hf: bool = True  # the last policy also as a Hugging Face directory


class Evaluate(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Held-out evaluation with the same judge and reward."""

    every: int = 0  # in steps; 0 = before and after only
    samples_per_prompt: int = 4
    limit: int | None = None
    temperature: float = 1.0


class Filter(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`megarubric filter`: a prompt is kept when its mean reward lies in the central part of the distribution, from
    quantile `low` to quantile `high`, and its answers differ (docs/filtering.md)."""

    samples_per_prompt: int = 8
    low: float = 0.2
    high: float = 0.8
    by: Literal["family", "all"] = "all"  # whose distribution: that of the rubric's family, or of all prompts
    min_std: float = 0.01  # population standard deviation of a prompt's rewards, at least
    limit: int | None = None  # only the first so many prompts


class Wandb(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weights & Biases. `offline` needs no account and no network."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "megarubric"
    entity: str | None = None
    group: str | None = None


class TrainConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`megarubric train`: one RL run."""

    name: str
    seed: int = 1
    runs_dir: str = "runs"
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    judge: Judge = Judge()
    reward: Reward = Reward()
    algorithm: Algorithm = Algorithm()
    train: Train = Train()
    parallel: Parallel = Parallel()
    exchange: Exchange = Exchange()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    filter: Filter = Filter()
    wandb: Wandb = Wandb()
    slurm: slurm.Slurm = slurm.Slurm()

    @property
    def policy_gpus_per_node(self) -> int:
        """GPUs of the fullest host that policy engines use: its first ones, as trainer ranks do."""
        return -(-self.rollout.engines // self.parallel.nodes) * self.rollout.tensor_parallel


class SftData(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Supervised rows (recipe/sft_data.py has their form). `train.steps` steps are taken, over as many passes as that
    needs; each has about `tokens_per_step` tokens, prompts included."""

    train: list[str]
    heldout: list[str] = []
    tokens_per_step: int = 8192
    mean: Literal["token", "row"] = "token"  # loss is a mean over trained tokens, or over rows of their token means
    prompt_loss_weight: float = 0.0  # adds this times the mean loss of the prompts' tokens
    max_tokens: int = 1024  # longer rows are left out, and counted


class SftModel(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`path` holds config.json and the tokenizer; `init` draws weights from the seed, or loads them from `path`."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    init: Literal["random", "load"] = "load"


class SftConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`megarubric sft`: supervised cold start with the same trainer."""

    name: str
    seed: int = 1
    runs_dir: str = "runs"
    model: SftModel
    data: SftData
    train: Train = Train()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    wandb: Wandb = Wandb()
    out: str | None = None  # where the trained model goes (Hugging Face directory); null = in the run directory


def check_parallel(p: Parallel) -> str | None:
    """First thing wrong with the layout itself (what depends on the model is checked against its config), or None."""
    wrong = positive(p, "parallel", "ranks", "nodes")
    if wrong:
        return wrong
    if p.ranks % p.nodes:
        return f"parallel.nodes: {p.nodes} hosts cannot share parallel.ranks {p.ranks} evenly"
    try:
        p.layout.check(p.ranks)
    except BadInput as error:
        return f"parallel.{error.item}: {error.reason}"
    return None


def check_optimizer(t: Train) -> str | None:
    wrong = positive(t, "train", "steps", "lr", "micro_batch_tokens", "eps", "grad_clip")
    if wrong:
        return wrong
    if not (0 <= t.beta1 < 1 and 0 <= t.beta2 < 1):
        return f"train: beta1 {t.beta1} and beta2 {t.beta2} must be in [0, 1)"
    if t.fp8_bf16_layers < 0:
        return f"train.fp8_bf16_layers: must not be negative, is {t.fp8_bf16_layers}"
    if t.warmup_steps > t.steps:
        return f"train.warmup_steps: {t.warmup_steps} is more than train.steps {t.steps}"
    return None


def check_algorithm(a: Algorithm) -> str | None:
    wrong = positive(a, "algorithm", "updates_per_step", "drift_alarm")
    if wrong:
        return wrong
    for field in ("tis_cap", "reject_below", "reject_above", "kl_coef", "entropy_coef"):
        if getattr(a, field) < 0:
            return f"algorithm.{field}: must not be negative, is {getattr(a, field)}"
    if a.tis_mode == "mask" and a.tis_cap <= 1:
        return (
            f"algorithm.tis_cap: mode mask keeps ratios from 1/cap to cap, so the cap must be above 1, is {a.tis_cap}"
        )
    if a.reject_below >= 1 or 0 < a.reject_above <= 1:
        return (
            "algorithm: reject_below must be below 1 and reject_above above 1 (or 0 = off), "
            f"are {a.reject_below} and {a.reject_above}: an answer on which trainer and engine agree has 1"
        )
    return None


def check_filter(f: Filter) -> str | None:
    if f.samples_per_prompt < 2:
        return f"filter.samples_per_prompt: a spread needs at least 2 answers, is {f.samples_per_prompt}"
    if not (0 <= f.low < f.high <= 1):
        return f"filter.low: needs 0 <= low < high <= 1, low is {f.low} and high {f.high}"
    if f.min_std < 0:
        return f"filter.min_std: must not be negative, is {f.min_std}"
    if f.limit is not None and f.limit <= 0:
        return f"filter.limit: must be above 0 (or null), is {f.limit}"
    return None


def check_offload(t: Train, dtype: str) -> str | None:
    if t.optimizer_offload and dtype != "bfloat16":
        return f"train.optimizer_offload: writes bfloat16 weights from float32 ones on the host, model.dtype is {dtype}"
    return None


def check_fp8(t: Train, p: Parallel, dtype: str) -> str | None:
    if wrong := fp8.refuse(t.fp8, p.sm, dtype, t.fp8_bf16_layers):
        return f"train.fp8: {wrong}"
    if t.fp8_parameters and (wrong := fp8.refuse_parameters(t.fp8, t.optimizer_offload)):
        return f"train.fp8_parameters: {wrong}"
    return None


def check_exchange(c: TrainConfig) -> str | None:
    if c.exchange.through != "device":
        return None
    if c.exchange.delta:
        return "exchange.delta: needs exchange.through host; through device whole buckets go between hosts"
    if c.rollout.replay is None and c.policy_gpus_per_node > c.parallel.ranks_per_node:
        return (
            f"exchange.through: device, but policy engines use {c.policy_gpus_per_node} GPUs of a host "
            f"and {c.parallel.ranks_per_node} have a trainer rank"
        )
    return None


def check_train(c: TrainConfig) -> str | None:
    """First reason why this run cannot run, as ``key: sentence``, or None."""
    wrong = check_parallel(c.parallel) or check_optimizer(c.train)
    wrong = wrong or check_offload(c.train, c.model.dtype) or check_fp8(c.train, c.parallel, c.model.dtype)
    wrong = wrong or check_rollout(c.rollout, c.algorithm.tis_cap)
    wrong = wrong or check_judge(c.judge)
    wrong = wrong or check_algorithm(c.algorithm) or check_filter(c.filter)
    if not wrong and (refused := slurm.refuse(c.slurm, c.parallel.ranks_per_node, c.parallel.card)):
        wrong = f"slurm.{refused}"
    wrong = wrong or positive(c.exchange, "exchange", "bucket_mb") or positive(c.checkpoint, "checkpoint", "keep")
    wrong = wrong or check_exchange(c)
    if wrong:
        return wrong
    if c.data.heldout and c.data.holdout:
        return "data.holdout: given beside data.heldout; one of them says what is held out"
    if c.data.holdout < 0:
        return f"data.holdout: must not be negative, is {c.data.holdout}"
    unknown = [f for f in c.data.families if f not in get_args(Family)]
    if unknown:
        return f"data.families: {unknown[0]!r} is none of {', '.join(get_args(Family))}"
    if c.rollout.prompts_per_step % c.algorithm.updates_per_step:
        return (
            f"algorithm.updates_per_step: {c.algorithm.updates_per_step} does not divide "
            f"rollout.prompts_per_step {c.rollout.prompts_per_step}"
        )
    j, p = c.judge, c.parallel
    if j.kind == "frozen" and p.card and j.engines > (room := p.places(j.tensor_parallel)):
        host = f"parallel.nodes {p.nodes} of {p.ranks_per_node}"
        return f"judge.engines: {j.engines} on {j.tensor_parallel} GPUs each, but {host} have room for {room}"
    if c.judge.kind == "policy" and c.rollout.replay:
        return "judge.kind: policy needs a policy engine, and rollout.replay starts none"
    return None


def check_sft(c: SftConfig) -> str | None:
    wrong = check_parallel(c.parallel) or check_optimizer(c.train)
    wrong = wrong or check_offload(c.train, c.model.dtype) or check_fp8(c.train, c.parallel, c.model.dtype)
    wrong = wrong or positive(c.data, "data", "tokens_per_step", "max_tokens")
    if not wrong and not c.data.train:
        return "data.train: names no file"
    return wrong
