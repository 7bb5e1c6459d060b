"""The routing an engine reports against transformers' routers, with the prefix cache in play; its way over the wire."""

from __future__ import annotations

import numpy as np
import pytest

from megarubric.exchange.rpc import Frames, WireError
from megarubric.rollout.messages import GenerateRequest, TokenTierQuery, unpack_routing


@pytest.mark.engine
def test_reported_routing_is_the_models_own(engine, run):
    """Eight samples of one prompt of 70 tokens: seven take two blocks from the cache, also while the first runs."""
    from tiny_moe import VOCABULARY, experts_chosen

    prompt = (np.arange(70) * 11 % VOCABULARY).astype(np.int32)
    longer = np.concatenate([prompt, prompt[:40]])
    requests = [GenerateRequest(p, 9 + i, seed=40 + i) for i, p in enumerate([prompt] * 7 + [longer] * 2)]
    noise = [TokenTierQuery(prompt[:33] + 1, np.array([1, 2], np.int32))]

    async def both() -> list:
        run_first = engine.client.generate(requests)
        await engine.client.tier_logprobs(noise)
        return await run_first

    samples = run(both())
    assert any(s.cached_tokens >= 64 for s in samples)
    wrong = total = 0
    for request, sample in zip(requests, samples):
        ids = np.concatenate([request.prompt_ids, sample.token_ids])
        assert sample.routing.shape == (len(ids), 4, 2) and sample.routing.dtype == np.uint8
        assert (sample.routing[-1] == 255).all()  # the last token was never read
        want = experts_chosen(engine.model_dir, ids[:-1])
        got = np.sort(sample.routing[:-1], -1)
        wrong, total = wrong + int((got != want).sum()), total + want.size
    assert wrong <= total // 1000, f"{wrong} of {total}"  # fp32 on both sides: a tie at most


def test_routing_on_the_wire():
    frames = Frames()
    rows = np.arange(5 * 2 * 3, dtype=np.uint16).reshape(5, 2, 3)
    spec = frames.add(rows)
    parts = unpack_routing(spec, [2, 0, 3], frames.buffers)
    assert [len(p) for p in parts] == [2, 0, 3] and np.array_equal(np.concatenate(parts), rows)
    assert unpack_routing(None, [2, 3], []) == [None, None]
    with pytest.raises(WireError, match="the samples have 6 tokens"):
        unpack_routing(spec, [2, 4], frames.buffers)
