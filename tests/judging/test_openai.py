from __future__ import annotations

import asyncio
import email.utils
import json
import math
import time
from typing import Any

import httpx
import pytest
from http_judge import Handler, HttpJudge, Reply, chat_reply, http_judge

from megarubric.errors import BadInput
from megarubric.judging.backends.openai import (
    OpenAIBackend,
    OpenAISettings,
    _duration,
    _retry_after,
    api_base,
    first_model,
)
from megarubric.judging.prompt import load_template, render_tier
from megarubric.judging.types import TextQuery, TextReply, TierQuery, TierReply

GOOD = [("1", {"1": math.log(0.6), " 0": math.log(0.1), "0": math.log(0.2), "x": math.log(0.1)})]


def query(answer: str = "The sea.", tiers: tuple[str, ...] = ("0", "1")) -> TierQuery:
    texts = [f"text {t}" for t in tiers]
    return TierQuery(tuple(render_tier(load_template("tier"), "q", answer, "c", texts)), tiers, answer)


def ask(handler: Handler, n: int = 1, **settings: Any) -> tuple[list[TierReply], HttpJudge, OpenAIBackend]:
    """Ask `n` different questions of a server with this `handler`."""

    async def main() -> tuple[list[TierReply], HttpJudge, OpenAIBackend]:
        async with http_judge(handler) as server:
            defaults = {"url": server.url, "model": "judge", "backoff_s": 0.001, "timeout_s": 2.0, "retries": 2}
            backend = OpenAIBackend(OpenAISettings(**(defaults | settings)))
            try:
                return await backend.tier_logprobs([query(f"answer {i}") for i in range(n)]), server, backend
            finally:
                await backend.aclose()

    return asyncio.run(main())


def always(reply: Reply) -> Handler:
    return lambda server, path, body: reply


def first_then(first: Reply, *then: Reply) -> Handler:
    """`first` for the first request, then the others in turn, the last for ever."""
    replies = [first, *then]
    return lambda server, path, body: replies[min(len(server.requests), len(replies)) - 1]


def test_tier_log_probabilities_sum_the_spellings_of_a_sign() -> None:
    replies, server, _ = ask(always(chat_reply(GOOD)))
    assert replies[0].logprobs == pytest.approx((math.log(0.3), math.log(0.6)))
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and body["temperature"] == 0 and body["logprobs"] is True
    assert [m["role"] for m in body["messages"]] == ["system", "user"]


def test_the_verdict_is_found_behind_the_agreed_prefix_and_nowhere_else() -> None:
    prefixed = [("Tier", {}), (" [", {}), *GOOD, ("]", {})]
    assert ask(always(chat_reply(prefixed)))[0][0].logprobs == pytest.approx((math.log(0.3), math.log(0.6)))
    for rest in ("0", ".5", "/2", "st"):  # ten, one and a half, one of two, first: none of them is tier 1
        longer = [*GOOD, (rest, {})]
        assert "no tier in the reply" in (ask(always(chat_reply(longer)))[0][0].error or ""), rest
    chatter = [("I", {}), (" give", {}), (" ", {}), *GOOD]
    assert "no tier in the reply" in (ask(always(chat_reply(chatter)))[0][0].error or "")


def test_a_sign_that_is_not_listed_has_probability_zero() -> None:
    replies, _, _ = ask(always(chat_reply([("1", {"1": -0.1, "y": -3.0})])))
    assert replies[0].logprobs == pytest.approx((-math.inf, -0.1))


def test_no_tier_among_the_listed_tokens_is_an_error_not_a_zero() -> None:
    replies, _, _ = ask(always(chat_reply([("yes", {"yes": -0.1, "no": -2.0})])))
    assert replies[0].logprobs is None and replies[0].verdict is None and replies[0].error


FAILURES = {
    "500": (Reply(b"oops", 500), "HTTP 500", 3),
    "503": (Reply(b"", 503), "HTTP 503", 3),
    "garbage": (Reply(b"<html>hello</html>"), "unreadable reply", 3),
    "empty body": (Reply(b""), "unreadable reply", 3),
    "half a JSON": (Reply(chat_reply(GOOD).body[:60]), "unreadable reply", 3),
    "connection cut in the body": (Reply(chat_reply(GOOD).body, cut=40), "connection failed", 3),
    "JSON of another shape": (Reply(b'{"choices": "no"}'), "no choices", 3),
    "a list": (Reply(b"[1, 2]"), "no choices", 3),
    "no content": (Reply(b'{"choices": [{"message": {}}]}'), "no message content", 3),
    "no answers": (chat_reply(GOOD, n=0), "wrong number of answers: 0", 3),
    "two answers": (chat_reply(GOOD, n=2), "wrong number of answers: 2", 3),
    "time-out": (Reply(hang=True), "timed out", 3),
    "401": (Reply(b"who are you", 401), "HTTP 401", 1),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_retried_where_that_can_help_and_then_reported(name: str) -> None:
    reply, reason, attempts = FAILURES[name]
    replies, server, backend = ask(always(reply), timeout_s=0.1 if reply.hang else 2.0)
    assert reason in (replies[0].error or "") and replies[0].logprobs is None and replies[0].verdict is None
    assert len(server.requests) == attempts == backend.requests and backend.retried == attempts - 1


@pytest.mark.parametrize("name", [n for n, (_, _, attempts) in FAILURES.items() if attempts > 1])
def test_one_failure_is_mended_by_the_retry(name: str) -> None:
    replies, _, _ = ask(first_then(FAILURES[name][0], chat_reply(GOOD)), timeout_s=0.3)
    assert replies[0].logprobs is not None


def test_a_bad_query_leaves_its_neighbours_alone() -> None:
    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        return Reply(b"", 500) if "answer 3" in body["messages"][1]["content"] else chat_reply(GOOD)

    replies, _, _ = ask(handler, n=6)
    assert [r.error is None for r in replies] == [True, True, True, False, True, True]


def test_the_deadline_bounds_a_query_with_all_its_retries() -> None:
    replies, _, _ = ask(always(Reply(b"", 500)), retries=10**6, deadline_s=0.3)
    assert "timed out after 0.3 s with retries" in (replies[0].error or "")


def test_retry_after_holds_for_every_query_of_the_client() -> None:
    arrivals: list[float] = []

    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        arrivals.append(time.monotonic())
        return Reply(b"", 429, {"retry-after": "0.4"}) if len(server.requests) == 1 else chat_reply(GOOD)

    replies, _, _ = ask(handler, n=3, concurrency=1)
    assert all(r.logprobs for r in replies) and len(arrivals) == 4
    assert arrivals[1] - arrivals[0] >= 0.4


def test_a_server_with_no_requests_left_is_left_alone_until_it_resets() -> None:
    arrivals: list[float] = []

    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        arrivals.append(time.monotonic())
        reply = chat_reply(GOOD)
        reply.headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"}
        return reply

    ask(handler, n=2, concurrency=1)
    assert arrivals[1] - arrivals[0] >= 0.3


@pytest.mark.parametrize(
    "headers",
    [
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0.3s"},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": str(int(time.time()) + 3600)},
    ],
    ids=["tokens", "moment"],
)
def test_other_ways_of_saying_that_nothing_is_left(headers: dict[str, str]) -> None:
    arrivals: list[float] = []

    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        arrivals.append(time.monotonic())
        reply = chat_reply(GOOD)
        reply.headers = headers if len(server.requests) == 1 else {}
        return reply

    ask(handler, n=2, concurrency=1, deadline_s=0.3)  # no wait is longer than the deadline
    assert len(arrivals) == 1 or arrivals[1] - arrivals[0] >= 0.29


def test_what_a_server_says_about_waiting() -> None:
    headers = [
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ]
    for given, seconds in headers:
        assert _retry_after(httpx.Headers(given)) == seconds
    past = email.utils.formatdate(time.time() - 60, usegmt=True)
    assert _retry_after(httpx.Headers({"retry-after": past})) == 0.0
    for text, expected in (("1s", 1.0), ("6m0.5s", 360.5), ("20ms", 0.02), ("3", 3.0), ("", None), ("1 s", None)):
        assert _duration(text) == expected
    assert _duration(str(time.time() + 50)) == pytest.approx(50, abs=5)
    assert _duration("1" * 100_000 + "x") is None  # at once


def test_a_server_that_is_down_is_left_alone_and_asked_again_later() -> None:
    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        return Reply(b"", 500) if len(server.requests) <= 8 else chat_reply(GOOD)

    async def main() -> tuple[list[TierReply], int, list[TierReply]]:
        async with http_judge(handler) as server:
            settings = OpenAISettings(
                url=server.url, model="m", backoff_s=0.001, retries=1, concurrency=1, give_up_after=4, cool_off_s=0.2
            )
            backend = OpenAIBackend(settings)
            first = await backend.tier_logprobs([query(f"answer {i}") for i in range(100)])
            sent = len(server.requests)
            await asyncio.sleep(0.25)
            later = await backend.tier_logprobs([query("later")])
            await backend.aclose()
            return first, sent, later

    first, sent, later = asyncio.run(main())
    assert sent == 8 and all(r.error for r in first) and "judge is down: 4 failures" in (first[-1].error or "")
    assert later[0].logprobs is not None


def test_the_base_of_the_api() -> None:
    assert api_base("http://host:8000") == api_base("http://host:8000/") == "http://host:8000/v1"
    assert api_base("https://host/api/v3/") == "https://host/api/v3"


def test_the_first_model_of_a_server() -> None:
    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        return Reply(json.dumps({"data": [{"id": "big"}, {"id": "small"}]}).encode())

    async def ask_name(handler: Handler) -> str:
        async with http_judge(handler) as server:
            return await asyncio.to_thread(first_model, server.url, 0.5)

    assert asyncio.run(ask_name(handler)) == "big"
    for reply in (Reply(b"", 404), Reply(b"[]"), Reply(b"{"), Reply(hang=True)):
        assert asyncio.run(ask_name(always(reply))) == "default"
    with pytest.raises(BadInput, match="does not answer"):
        first_model("http://127.0.0.1:9/v1")


def test_no_more_requests_than_agreed_are_under_way() -> None:
    _, server, _ = ask(always(chat_reply(GOOD)), n=40, concurrency=4)
    assert len(server.requests) == 40 and server.most_active <= 4


@pytest.mark.parametrize(("budget", "sent"), [({"max_requests": 5}, 5), ({"max_tokens_total": 300}, 3)])
def test_the_budget_is_kept(budget: dict[str, int], sent: int) -> None:
    replies, server, _ = ask(always(chat_reply(GOOD)), n=8, concurrency=1, **budget)
    assert len(server.requests) == sent
    assert sum("budget spent" in (r.error or "") for r in replies) == 8 - sent


def test_a_budget_of_requests_is_never_exceeded_however_many_wait() -> None:
    replies, server, _ = ask(always(Reply(b"", 429, {"retry-after": "0.05"})), n=12, concurrency=12, max_requests=20)
    assert len(server.requests) == 20 and all(r.error for r in replies)


def test_completions_are_the_fallback_and_stay_so() -> None:
    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        if path.endswith("/chat/completions"):
            return Reply(b"not here", 404)
        assert body["prompt"].endswith("Tier [") and body["max_tokens"] == 1
        top = {"0": math.log(0.25), "1": math.log(0.5)}
        return Reply(json.dumps({"choices": [{"text": "1", "logprobs": {"top_logprobs": [top]}}]}).encode())

    replies, server, _ = ask(handler, n=3, concurrency=1)
    assert [r.logprobs for r in replies] == [pytest.approx((math.log(0.25), math.log(0.5)))] * 3
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions", *["/v1/completions"] * 3]


def test_a_server_without_log_probabilities_is_read_by_its_strict_form() -> None:
    assert ask(always(chat_reply([], text="Tier [1]", logprobs=False)))[0][0] == TierReply(verdict=1)


def test_then_by_a_json_schema() -> None:
    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        if "response_format" in body:
            assert body["response_format"]["json_schema"]["schema"]["properties"]["tier"]["enum"] == ["0", "1"]
            return chat_reply([], text='{"tier": "1"}', logprobs=False)
        return chat_reply([], text="Yes, this is clearly tier 1.", logprobs=False)

    assert ask(handler)[0][0] == TierReply(verdict=1)


def test_and_free_text_stays_unread() -> None:
    replies, _, _ = ask(always(chat_reply([], text="Yes, clearly 1, the top tier!", logprobs=False)))
    assert replies[0].verdict is None and "no tier in the reply" in (replies[0].error or "")


def test_a_model_that_refuses_logprobs_is_asked_without() -> None:
    def handler(server: HttpJudge, path: str, body: dict[str, Any]) -> Reply:
        return Reply(b"logprobs unsupported", 400) if "logprobs" in body else chat_reply([], text="0", logprobs=False)

    assert ask(handler)[0][0] == TierReply(verdict=0)


def test_prefill_continues_the_assistant_message() -> None:
    _, server, _ = ask(always(chat_reply(GOOD)), prefill=True)
    body = server.requests[0][1]
    assert body["messages"][-1] == {"role": "assistant", "content": "Tier ["} and body["max_tokens"] == 1


def test_text_is_fetched_with_its_temperature_and_seed() -> None:
    async def main() -> list[TextReply]:
        async with http_judge(first_then(Reply(b"", 500), chat_reply([], text="So.\nTier [1]"))) as server:
            backend = OpenAIBackend(OpenAISettings(url=server.url, model="judge", backoff_s=0.001))
            try:
                replies = await backend.complete([TextQuery(query().parts, "c", 99, 0.5, 3)])
            finally:
                await backend.aclose()
            body = server.requests[1][1]
            assert (body["max_tokens"], body["temperature"], body["seed"]) == (99, 0.5, 3) and "logprobs" not in body
            return replies

    assert asyncio.run(main()) == [TextReply(text="So.\nTier [1]")]


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", "abc")
    _, server, backend = ask(always(chat_reply(GOOD)), key_env="TEST_JUDGE_KEY")
    assert server.requests[0][2]["authorization"] == "Bearer abc" and "abc" not in backend.identity


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(BadInput, match="http"):
        OpenAIBackend(OpenAISettings(url="localhost:8000", model="m"))
