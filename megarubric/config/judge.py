"""The judge's section of a run configuration, and what is refused in it."""

from __future__ import annotations

from typing import Literal

import msgspec

from megarubric.config.section import positive

JudgeMode = Literal["tier", "reason", "all"]


class Judge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who judges the criteria that have no check, and how (docs/judging.md).

    kind: `frozen` (an engine with the weights in `model`, default the policy's first weights), `policy` (the policy
    engine itself, changing as it trains), `url` (an OpenAI-compatible server), `none` (judged criteria are masked).
    """

    kind: Literal["frozen", "policy", "url", "none"] = "frozen"
    model: str | None = None
    url: str | None = None
    url_model: str | None = None
    template: str = "tier"  # a name in judging/templates, or the path of a .txt file; one for each way of asking
    reason_template: str = "reason"
    all_template: str = "all"
    mode: JudgeMode = "tier"
    modes: dict[str, JudgeMode] = {}  # glob on criterion id, or on rubric id/criterion id: mode; the first that fits
    draws: int = 1  # in the modes that write: the median of so many replies, at `temperature`
    temperature: float = 0.0
    max_tokens: int = 512  # of one written reply
    min_tier_mass: float = 0.5  # spec/reward.md: below it the judgement is unread
    second: str | None = None  # asked where the first is unsure or unread: a model directory, or a URL[#model]
    second_template: str | None = None  # its template in mode tier; null = `template`
    escalate_above: float = 0.9  # unsure: entropy above this share of its maximum
    calibration: str | None = None  # a file that `eval --suite judge --fit-calibration` wrote for the first judge
    cache: str | None = None  # SQLite file of judgements: nothing is judged twice; several runs may share it
    replay_only: bool = False  # judge from the cache alone; no judge is started or asked
    concurrency: int = 64
    timeout_s: float = 120.0  # of one call; then it is repeated `retries` times, then masked
    retries: int = 1
    max_requests: int = 0  # budget of a url judge, each of the two; 0 = none; beyond it judgements are unread
    max_total_tokens: int = 0
    engines: int = 1  # of a frozen judge, each on `tensor_parallel` GPUs; a second judge has one
    tensor_parallel: int = 1
    max_model_len: int = 1024
    gpu_memory_utilization: float = 0.3
    cpu_kv_gib: float = 0.5


def check_judge(j: Judge) -> str | None:
    counts = ("engines", "tensor_parallel", "concurrency", "timeout_s", "max_model_len", "max_tokens", "draws")
    if wrong := positive(j, "judge", *counts):
        return wrong
    if j.engines > 1 and j.kind != "frozen":
        return f"judge.engines: given, but judge.kind is {j.kind}"
    for field in ("retries", "max_requests", "max_total_tokens", "temperature"):
        if getattr(j, field) < 0:
            return f"judge.{field}: must not be negative, is {getattr(j, field)}"
    for field in ("min_tier_mass", "escalate_above"):
        if not 0 <= getattr(j, field) <= 1:
            return f"judge.{field}: must be in [0, 1], is {getattr(j, field)}"
    if j.kind == "url" and not j.url:
        return "judge.url: judge.kind is url, so it needs the server's address"
    given = [("url", j.kind != "url"), ("url_model", j.kind != "url"), ("model", j.kind in ("policy", "url", "none"))]
    given += [(field, j.kind == "none") for field in ("second", "calibration", "cache", "replay_only")]
    given += [(field, not (j.kind == "url" or is_url(j.second))) for field in ("max_requests", "max_total_tokens")]
    for field, wrong_here in given:
        if wrong_here and getattr(j, field):
            return f"judge.{field}: given, but judge.kind is {j.kind}"
    if j.url and not is_url(j.url):
        return f"judge.url: {j.url} does not start with http:// or https://"
    if j.second_template and not j.second:
        return "judge.second_template: given, but judge.second names no second judge"
    if j.calibration and j.kind == "policy":
        return "judge.calibration: fitted for one judge, and judge.kind policy is another one after every step"
    if j.replay_only and not j.cache:
        return "judge.replay_only: needs judge.cache, the file to replay from"
    if j.replay_only and j.kind == "policy":
        return "judge.replay_only: judge.kind is policy, whose weights judge only while they train; see rollout.replay"
    writes = {j.mode, *j.modes.values()} - {"tier"}
    if j.draws > 1 and not writes:
        return f"judge.draws: {j.draws}, but no criterion is asked in a mode that writes (judge.mode, judge.modes)"
    if j.draws > 1 and j.temperature == 0:
        return f"judge.temperature: {j.draws} draws at temperature 0 are one draw; set it above 0"
    if writes and j.kind != "url" and j.max_tokens >= j.max_model_len:
        return f"judge.max_tokens: {j.max_tokens} leave no room for the prompt in judge.max_model_len {j.max_model_len}"
    return None


def is_url(judge: str | None) -> bool:
    """Whether a judge is named by a URL (and not by a model directory)."""
    return judge is not None and judge.startswith(("http://", "https://"))
