"""The judge of a run: from the `judge` section of its configuration to backends, cache, calibration."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megarubric.config import TrainConfig
from megarubric.config.judge import is_url
from megarubric.errors import BadInput
from megarubric.judging.backends import backend_for_engines, backend_for_url, model_identity
from megarubric.judging.cache import JudgeCache
from megarubric.judging.calibration import Calibration
from megarubric.judging.judge import Judge, load_templates
from megarubric.judging.opening import EngineFactory, JudgeUse, assembled, replayed
from megarubric.judging.settings import settings_of
from megarubric.judging.types import TierBackend
from megarubric.launch import plan
from megarubric.rubrics import Rubric

if TYPE_CHECKING:
    from megarubric.launch.system import System


def check_judge(c: TrainConfig, where: object, rubrics: Iterable[Rubric]) -> None:
    """Look at everything the judge will read from files, before any process starts. Raises BadInput."""
    j = c.judge
    if j.kind == "none" or c.rollout.replay is not None:
        return
    load_templates(settings_of(j))
    settings_of(j).check_modes(rubrics, where)
    for key, name in (("judge.model", j.model), ("judge.second", j.second)):
        if name and not is_url(name) and not (j.replay_only and not Path(name).exists()):
            plan.read_hf_config(name, key)
    if j.calibration:
        Calibration.load(Path(j.calibration), model_identity(Path(_model(c)), c.model.dtype) if _starts(c) else None)
    if j.replay_only and not Path(str(j.cache)).is_file():
        raise BadInput(j.cache, None, "no such file; judge.replay_only has nothing to replay")
    if j.cache and Path(j.cache).exists():
        cache = JudgeCache(Path(j.cache))
        try:
            for name in filter(None, (_name(c), j.second) if j.replay_only else ()):
                replayed(cache, name, c.model.dtype)
        finally:
            cache.close()


def engines_of(c: TrainConfig) -> list[str]:
    """Names of the judge engines that the run starts for itself."""
    if c.rollout.replay is not None or c.judge.kind == "none" or c.judge.replay_only:
        return []
    second = c.judge.second
    first = _first_names(c) if c.judge.kind == "frozen" else []
    return first + ["second-judge"] * bool(second and not is_url(second))


def second_index(c: TrainConfig) -> int:
    """The place of the second judge's engine among those of the judges: one with GPUs of its own, if any are left."""
    j = c.judge
    first = j.engines if j.kind == "frozen" else 0
    left = c.parallel.card is not None and first < c.parallel.places(j.tensor_parallel)
    return first if left else 0


async def make_judge(c: TrainConfig, system: System) -> Judge:
    """The run's judge; starts the engines it needs of its own. What it holds open is closed with `system`."""
    j, settings = c.judge, settings_of(c.judge)
    if j.kind == "none" or c.rollout.replay is not None:
        return Judge(None, settings)
    cache = None
    if j.cache:
        cache = JudgeCache(Path(j.cache))
        system.at_end.callback(cache.close)
    second: TierBackend | None = None
    if j.replay_only:
        assert cache is not None
        first: TierBackend = replayed(cache, _name(c), c.model.dtype)
        second = replayed(cache, j.second, c.model.dtype) if j.second else None
    else:
        if j.kind == "url":
            first = _remote(c, _name(c), system)
        elif j.kind == "policy":
            first = _policy(c, system)
        else:
            first = await _own_engines(c, _first_names(c), _model(c), system)
        if j.second and is_url(j.second):
            second = _remote(c, j.second, system)
        elif j.second:  # one engine: it is asked about the few that the first is unsure of
            second = await _own_engines(c, ["second-judge"], j.second, system, second_index(c))
    return assembled(first, second, settings, cache, Path(j.calibration) if j.calibration else None)


def judge_use(c: TrainConfig, judge: str | None, engine_factory: EngineFactory) -> JudgeUse:
    """The configuration's judge for a verb that starts nothing else; `judge` (a name, see judging.opening) is examined
    in the place of the first when it is given."""
    j = c.judge
    return JudgeUse(
        judge=judge or _name(c),
        engine_factory=engine_factory,
        settings=settings_of(j),
        cache=Path(j.cache) if j.cache else None,
        replay_only=j.replay_only,
        second=j.second,
        calibration=Path(j.calibration) if j.calibration else None,
        concurrency=j.concurrency,
        max_requests=j.max_requests,
        max_total_tokens=j.max_total_tokens,
        dtype=c.model.dtype,
    )


def _starts(c: TrainConfig) -> bool:
    return c.judge.kind == "frozen" and Path(_model(c)).is_dir()


def _model(c: TrainConfig) -> str:
    return c.judge.model or c.model.path


def _name(c: TrainConfig) -> str:
    """The first judge's name as `judging.opening` reads it."""
    j = c.judge
    if j.kind == "url":
        return f"{j.url}#{j.url_model}" if j.url_model else str(j.url)
    return _model(c)


def _first_names(c: TrainConfig) -> list[str]:
    n = c.judge.engines
    return ["judge"] if n == 1 else [f"judge-{i}" for i in range(n)]


def _remote(c: TrainConfig, name: str, system: System) -> TierBackend:
    url, _, model = name.partition("#")
    backend = backend_for_url(
        url,
        model or None,
        c.judge.concurrency,
        timeout_s=c.judge.timeout_s,
        max_requests=c.judge.max_requests,
        max_total_tokens=c.judge.max_total_tokens,
    )
    system.at_end.push_async_callback(backend.aclose)
    return backend


async def _own_engines(c: TrainConfig, names: list[str], model: str, system: System, index: int = 0) -> TierBackend:
    """A judge on engines of these names, the first at place `index` among those of the judges."""
    config = plan.engine_config(c, "judge", model)
    await system.engines_started()
    engines = [system.start_engine(name, config, index + i) for i, name in enumerate(names)]
    system.judge_engines += engines
    limit = config.max_model_len - 1
    return backend_for_engines(
        engines, model, max_prompt_tokens=limit, dtype=c.model.dtype, timeout_s=c.judge.timeout_s
    )


def _policy(c: TrainConfig, system: System) -> TierBackend:
    """The policy as its own judge, named by the checksum of the weights in service: runs that share a cache, or a run
    that goes back to a checkpoint, never take one policy's judgements for another's."""
    config = plan.engine_config(c, "policy")
    before = model_identity(Path(c.model.path), c.model.dtype)
    return backend_for_engines(
        system.policies,
        c.model.path,
        identity=lambda: f"policy:{system.weights}:{c.model.dtype}" if system.weights else f"policy:{before}",
        max_prompt_tokens=config.max_model_len - 1,
        timeout_s=c.judge.timeout_s,
    )
