"""The engine process against transformers, and against bad requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import zmq
from tiny_moe import VOCABULARY, log_softmax, token_logprobs

from megarubric.exchange.rpc import RemoteError
from megarubric.rollout.messages import GenerateRequest, TokenTierQuery

pytestmark = pytest.mark.engine


def prompt(n: int, start: int = 5) -> np.ndarray:
    return (np.arange(start, start + n) * 7 % VOCABULARY).astype(np.int32)


def test_sampled_logprobs_are_the_models_own(engine, run):
    requests = [GenerateRequest(prompt(20 + i, i), 24, seed=i) for i in range(12)]
    for request, got in zip(requests, run(engine.client.generate(requests))):
        assert got.finish_reason == "length" and got.weight_version == engine.version
        assert got.token_ids.dtype == np.int32 and got.logprobs.dtype == np.float32
        assert len(got.token_ids) == len(got.logprobs) == 24
        want = token_logprobs(engine.model_dir, np.concatenate([request.prompt_ids, got.token_ids]))
        assert np.abs(want[len(request.prompt_ids) - 1 :] - got.logprobs).max() < 1e-4


def test_logprobs_are_untempered_at_any_temperature(engine, run):
    (hot,) = run(engine.client.generate([GenerateRequest(prompt(20), 16, seed=3, temperature=1.7, top_p=0.7)]))
    want = token_logprobs(engine.model_dir, np.concatenate([prompt(20), hot.token_ids]))[19:]
    assert np.abs(want - hot.logprobs).max() < 1e-4


def test_greedy_takes_the_most_probable_token(engine, run):
    (got,) = run(engine.client.generate([GenerateRequest(prompt(9), 12, seed=1, temperature=0.0)]))
    table = log_softmax(engine.model_dir, np.concatenate([prompt(9), got.token_ids]))
    assert table[8:-1].argmax(-1).tolist() == got.token_ids.tolist()


def test_same_seeds_same_tokens_other_seeds_other_tokens(engine, run):
    first = run(engine.client.generate([GenerateRequest(prompt(12), 16, seed=s) for s in range(8)]))
    again = run(engine.client.generate([GenerateRequest(prompt(12), 16, seed=s) for s in range(8)]))
    assert [c.token_ids.tolist() for c in first] == [c.token_ids.tolist() for c in again]
    assert len({tuple(c.token_ids.tolist()) for c in first}) == 8


def test_more_prompts_than_one_step_can_read(engine, run):
    """Prompt tokens beyond a step's budget: a chunked prefill would rewind a CPU generator, which has no offset."""
    requests = [GenerateRequest(prompt(90, i), 2, seed=i) for i in range(64)]
    assert {c.finish_reason for c in run(engine.client.generate(requests))} == {"length"}


def test_stop_token_ends_the_sample_and_is_kept(engine, run):
    (free,) = run(engine.client.generate([GenerateRequest(prompt(15), 16, seed=5)]))
    stop = int(free.token_ids[6])
    (got,) = run(engine.client.generate([GenerateRequest(prompt(15), 16, seed=5, stop_token_ids=(stop,))]))
    end = free.token_ids.tolist().index(stop) + 1
    assert got.finish_reason == "stop"
    assert got.token_ids.tolist() == free.token_ids[:end].tolist() and len(got.logprobs) == end


def test_tier_logprobs_are_unrestricted(engine, run):
    tiers = [np.array(ids, np.int32) for ids in ([40, 41], [7, 3, 500], [9, 9], list(range(100, 140)))]
    queries = [TokenTierQuery(prompt(33 + i, i), t) for i, t in enumerate(tiers)]
    for query, got in zip(queries, run(engine.client.tier_logprobs(queries))):
        want = log_softmax(engine.model_dir, query.prompt_ids)[-1, query.tier_token_ids]
        assert got.error is None and np.abs(want - got.logprobs).max() < 1e-4


def test_tier_queries_share_their_prefix(engine, run):
    run(engine.client.reset_prefix_cache())
    before = run(engine.client.stats())
    shared = prompt(96)
    queries = [
        TokenTierQuery(np.concatenate([shared, prompt(4, 50 + i)]), np.array([1, 2], np.int32)) for i in range(4)
    ]
    scores = run(engine.client.tier_logprobs(queries))
    after = run(engine.client.stats())
    assert sorted(s.cached_tokens for s in scores) == [0, 96, 96, 96]
    assert after.cached_tokens - before.cached_tokens == 3 * 96
    assert after.prefill_tokens - before.prefill_tokens == 400 - 3 * 96


def test_score_tokens_despite_a_warm_prefix_cache(engine, run):
    ids = prompt(100)
    for _ in range(2):
        (got,) = run(engine.client.score_tokens([ids]))
        assert got.logprobs is not None and got.logprobs.shape == (99,)
        assert np.abs(got.logprobs - token_logprobs(engine.model_dir, ids)).max() < 1e-4


def test_a_bad_sequence_fails_alone(engine, run):
    good = GenerateRequest(prompt(10), 4, seed=1)
    bad = [
        (GenerateRequest(np.array([1, VOCABULARY], np.int32), 4, seed=1), "token id 512"),
        (GenerateRequest(np.array([-1], np.int32), 4, seed=1), "token id -1"),
        (GenerateRequest(np.empty(0, np.int32), 4, seed=1), "empty prompt"),
        (GenerateRequest(prompt(256), 4, seed=1), "max_model_len 256"),
        (GenerateRequest(prompt(5), 4, seed=1, top_p=1.5), "top_p"),
        (GenerateRequest(prompt(5), 4, seed=1, temperature=2.5), "temperature"),
        (GenerateRequest(prompt(5), 0, seed=1), "max_tokens"),
    ]
    first, *rest, last = run(engine.client.generate([good, *(r for r, _ in bad), good]))
    assert first.error is None and first.token_ids.tolist() == last.token_ids.tolist()
    for completion, (_, reason) in zip(rest, bad, strict=True):
        assert completion.finish_reason == "error" and len(completion.token_ids) == 0
        assert reason in (completion.error or "")
    (no_tiers,) = run(engine.client.tier_logprobs([TokenTierQuery(prompt(5), np.empty(0, np.int32))]))
    assert no_tiers.logprobs is None and no_tiers.error == "empty tier token"


def test_a_malformed_message_is_answered_and_the_engine_lives(engine, run):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(engine.endpoint)
    for parts in ([b"\xff", b"\xff"], [b"\x93\x01\x07\xc2", b"\x81\xa4type\xa4Nope"], [b"x"]):
        socket.send_multipart(parts)
        assert socket.poll(10_000)
        assert socket.recv_multipart()
    socket.close()
    context.term()
    assert run(engine.client.generate([])) == []
    assert run(engine.client.stats()).running == 0


def test_sleep_says_what_it_did(engine, run):
    slept = run(engine.client.sleep(1))
    assert slept.outcome == "ignored" and "CPU" in slept.reason
    assert run(engine.client.wake()).outcome == "ignored"
    assert len(run(engine.client.generate([GenerateRequest(prompt(10), 4, seed=1)]))[0].token_ids) == 4


def test_samples_come_as_they_end(engine, run):
    async def order() -> list[int]:
        requests = [GenerateRequest(prompt(10), n, seed=1) for n in (100, 1, 40)]
        return [i async for i, _ in engine.client.stream(requests)]

    assert run(order()) == [1, 2, 0]


def test_calls_from_several_clients_at_once(engine, run, tiny_models: list[Path]):
    from megarubric.rollout.client import EngineClient

    async def both() -> None:
        other = EngineClient(engine.endpoint, peer_status=engine.status)
        try:
            a, b = await asyncio.gather(
                engine.client.generate([GenerateRequest(prompt(10), 30, seed=2)]),
                other.generate([GenerateRequest(prompt(10), 30, seed=2)]),
            )
            assert a[0].token_ids.tolist() == b[0].token_ids.tolist()
        finally:
            await other.close()

    run(both())


def test_update_out_of_turn_is_refused(engine, run):
    with pytest.raises(RemoteError, match="no update has begun"):
        run(engine.client.finish_update(5, "00"))
    assert run(engine.client.checksum()).version == engine.version
