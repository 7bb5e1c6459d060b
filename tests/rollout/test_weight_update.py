"""Weight updates of a running engine: exact afterwards, refused whole when anything is wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import Engine
from tiny_moe import VOCABULARY, log_softmax, token_logprobs
from weights import publish, state_dict

from megarubric.exchange.buckets import Segment, TensorSpec
from megarubric.exchange.receiver import checksum_of, manifest_of
from megarubric.exchange.rpc import RemoteError
from megarubric.rollout.messages import GenerateRequest, TokenTierQuery

pytestmark = pytest.mark.engine
PROMPT = (np.arange(100) * 11 % VOCABULARY).astype(np.int32)


def worst_difference(engine: Engine, run, model_dir: Path) -> float:
    """Largest |log-probability difference| between what the engine serves and transformers with `model_dir`."""
    requests = [GenerateRequest(PROMPT[i : 40 + 3 * i], 16, seed=i) for i in range(6)]
    worst = 0.0
    for request, got in zip(requests, run(engine.client.generate(requests))):
        assert got.weight_version == got.first_version == engine.version
        want = token_logprobs(model_dir, np.concatenate([request.prompt_ids, got.token_ids]))
        worst = max(worst, float(np.abs(want[len(request.prompt_ids) - 1 :] - got.logprobs).max()))
    return worst


def update(engine: Engine, run, model_dir: Path, **options) -> None:
    weights = run(publish(engine.client, model_dir, engine.version + 1, **options))
    engine.version += 1
    engine.model_dir = model_dir
    assert (weights.version, weights.state) == (engine.version, "ready")
    assert weights.checksum == checksum_of(model_dir)


def test_an_update_is_exact_every_time(engine, run, tiny_models):
    """CPU kernels of experts keep a packed copy: a reload that does not pack again serves wrong answers silently."""
    for model_dir in (tiny_models[1], tiny_models[2], tiny_models[1]):
        update(engine, run, model_dir)
        assert worst_difference(engine, run, model_dir) < 1e-4
        assert run(engine.client.checksum()).checksum == checksum_of(model_dir)


@pytest.mark.parametrize("bucket_bytes", [1, 10_000_000])
def test_bucket_size_does_not_matter(engine, run, tiny_models, bucket_bytes):
    target = tiny_models[2] if engine.model_dir != tiny_models[2] else tiny_models[0]
    update(engine, run, target, bucket_bytes=bucket_bytes)
    assert worst_difference(engine, run, target) < 1e-4


def test_prefix_cache_is_forgotten(engine, run, tiny_models):
    query = TokenTierQuery(PROMPT, np.array([3, 5], np.int32))
    run(engine.client.tier_logprobs([query]))
    (warm,) = run(engine.client.tier_logprobs([query]))
    assert warm.cached_tokens == 96
    target = tiny_models[0] if engine.model_dir != tiny_models[0] else tiny_models[1]
    update(engine, run, target)
    (got,) = run(engine.client.tier_logprobs([query]))
    assert got.cached_tokens == 0 and got.weight_version == engine.version
    assert np.abs(got.logprobs - log_softmax(target, PROMPT)[-1, [3, 5]]).max() < 1e-4


def test_running_samples_finish_under_the_version_they_began_with(engine, run, tiny_models):
    old, new = engine.model_dir, tiny_models[0] if engine.model_dir != tiny_models[0] else tiny_models[1]
    requests = [GenerateRequest(PROMPT[:20], 200, seed=i) for i in range(4)]

    async def overlap():
        before = asyncio.create_task(engine.client.generate(requests))
        while (await engine.client.stats()).running == 0:
            await asyncio.sleep(0)
        changed = asyncio.create_task(publish(engine.client, new, engine.version + 1))
        while (await engine.client.stats()).waiting == 0 and not changed.done():
            await asyncio.sleep(0)
        after = await engine.client.generate([GenerateRequest(PROMPT[:20], 8, seed=0)])
        await changed
        return await before, after

    before, after = run(overlap())
    engine.version, engine.model_dir = engine.version + 1, new
    for completions, version, model_dir in ((before, engine.version - 1, old), (after, engine.version, new)):
        for got in completions:
            assert got.first_version == got.weight_version == version
            want = token_logprobs(model_dir, np.concatenate([PROMPT[:20], got.token_ids]))[19:]
            assert np.abs(want - got.logprobs).max() < 1e-4


def test_kept_samples_go_on_under_the_new_version_with_its_keys(engine, run, tiny_models):
    old, new = engine.model_dir, tiny_models[0] if engine.model_dir != tiny_models[0] else tiny_models[1]

    async def overlap():
        running = asyncio.create_task(engine.client.generate([GenerateRequest(PROMPT[:20], 230, seed=4)]))
        while (await engine.client.stats()).running == 0:
            await asyncio.sleep(0)
        await publish(engine.client, new, engine.version + 1, in_flight="keep")
        return (await running)[0]

    got = run(overlap())
    engine.version, engine.model_dir = engine.version + 1, new
    assert (got.first_version, got.weight_version) == (engine.version - 1, engine.version)
    ids = np.concatenate([PROMPT[:20], got.token_ids])
    by_old = np.abs(token_logprobs(old, ids)[19:] - got.logprobs) < 1e-4
    by_new = np.abs(token_logprobs(new, ids)[19:] - got.logprobs) < 1e-4
    switch = int(np.argmin(by_old))
    assert 0 < switch < len(got.token_ids) and by_old[:switch].all() and by_new[switch:].all()


def drop_tensor(name: str):
    def spoil(i, bucket, segment):
        entries = tuple(e for e in bucket.entries if e.name != name)
        if len(entries) == len(bucket.entries):
            return bucket
        from megarubric.exchange.buckets import digest_entries

        return msgspec.structs.replace(
            bucket, entries=entries, checksum=digest_entries(segment.buffer, entries).hexdigest()
        )

    return spoil


def reshape_first(i, bucket, segment):
    first = msgspec.structs.replace(bucket.entries[0], shape=bucket.entries[0].shape[::-1] + (1,))
    return msgspec.structs.replace(bucket, entries=(first, *bucket.entries[1:]))


def flip_a_byte(i, bucket: object, segment: Segment):
    if i == 2:
        segment.buffer[17] ^= 1
    return bucket


def lose_segment(i, bucket, segment):
    return msgspec.structs.replace(bucket, segment="megarubric-test-gone") if i == 1 else bucket


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"spoil": drop_tensor("model.norm.weight")}, "tensor model.norm.weight did not arrive"),
        ({"spoil": reshape_first}, r"arrived as float32\[.*, 1\], the manifest says"),
        ({"spoil": flip_a_byte}, "checksum .*, the sender's is"),
        ({"spoil": lose_segment}, "segment megarubric-test-gone: No such file"),
        ({"spoil": lambda i, bucket, segment: None if i == 3 else bucket}, "did not arrive"),
        ({"checksum": "0" * 32}, "what arrived has checksum"),
    ],
    ids=["missing tensor", "wrong shape", "flipped bit", "no segment", "missing bucket", "wrong checksum"],
)
def test_a_faulty_update_leaves_the_old_version_in_service(engine, run, tiny_models, options, reason):
    other = next(m for m in tiny_models if m != engine.model_dir)
    with pytest.raises(RemoteError, match=reason):
        run(publish(engine.client, other, engine.version + 1, **options))
    weights = run(engine.client.checksum())
    assert (weights.version, weights.state) == (engine.version, "ready")
    assert weights.checksum == checksum_of(engine.model_dir)
    assert worst_difference(engine, run, engine.model_dir) < 1e-4


def test_a_manifest_that_is_not_the_models_is_refused(engine, run):
    manifest = list(manifest_of(engine.model_dir))
    wrong_shape = msgspec.structs.replace(manifest[0], shape=(1, 2, 3))
    half = msgspec.structs.replace(manifest[0], dtype="int32")
    for changed, reason in (
        (manifest[1:], f"manifest lacks tensor {manifest[0].name}"),
        ([*manifest, TensorSpec("model.extra", "float32", (1,))], "the model has no tensor model.extra"),
        ([wrong_shape, *manifest[1:]], r"has shape \[1, 2, 3\]"),
        ([half, *manifest[1:]], "is int32"),
        ([manifest[0], *manifest], "names each tensor once"),
    ):
        with pytest.raises(RemoteError, match=reason):
            run(engine.client.begin_update(engine.version + 1, changed))
    assert run(engine.client.checksum()).state == "ready"


def test_an_aborted_update_can_be_followed_by_another(engine, run, tiny_models):
    manifest = manifest_of(engine.model_dir)
    run(engine.client.begin_update(engine.version + 1, manifest))
    with pytest.raises(RemoteError, match="is being received"):
        run(engine.client.begin_update(engine.version + 2, manifest))
    assert run(engine.client.abort_update()).state == "ready"
    target = next(m for m in tiny_models if m != engine.model_dir)
    update(engine, run, target)
    assert worst_difference(engine, run, target) < 1e-4


def test_update_with_half_precision_tensors_into_a_float32_engine(engine, run, tmp_path, tiny_models):
    """bfloat16 weights are exact in float32: taken, and the answers are those of the rounded model."""
    import torch
    from safetensors.torch import save_file

    tensors = {k: v.to(torch.bfloat16) for k, v in state_dict(tiny_models[2]).items()}
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny_models[2] / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    update(engine, run, tmp_path)
    assert worst_difference(engine, run, tmp_path) < 1e-4
    update(engine, run, tiny_models[0])


# --- staging "direct": no copy of the new version, none of the old --------------------------------------------------


def test_direct_loading_is_exact_although_buckets_cut_through_layers(direct_engine, run, tied_models):
    """The segments are filled again while layers are unfinished: what the reload still needs must have been copied.

    And a head tied to the embeddings, which gets no tensor of its own, must follow them.
    """
    for model_dir, bucket_bytes in ((tied_models[1], 20_000), (tied_models[2], 50_000)):
        update(direct_engine, run, model_dir, bucket_bytes=bucket_bytes)
        assert worst_difference(direct_engine, run, model_dir) < 1e-4


def test_a_fault_while_loading_directly_leaves_nothing_in_service(direct_engine, run, tied_models):
    good = direct_engine.model_dir
    with pytest.raises(RemoteError, match=r"checksum .*, the sender's is"):
        run(publish(direct_engine.client, tied_models[0], direct_engine.version + 1, spoil=flip_a_byte))
    weights = run(direct_engine.client.checksum())
    assert (weights.version, weights.state, weights.checksum) == (-1, "broken", "")
    with pytest.raises(RemoteError, match="no weight version is in service"):
        run(direct_engine.client.generate([GenerateRequest(PROMPT[:5], 2, seed=0)]))
    update(direct_engine, run, good)
    assert worst_difference(direct_engine, run, good) < 1e-4


def test_requests_wait_while_buckets_are_loaded_directly(direct_engine, run, tied_models):
    new = next(m for m in tied_models if m != direct_engine.model_dir)
    sent: list[asyncio.Task] = []

    def ask(i, bucket, segment):
        if i == 2:
            request = GenerateRequest(PROMPT[:20], 8, seed=0)
            sent.append(asyncio.get_running_loop().create_task(direct_engine.client.generate([request])))
        return bucket

    async def overlap():
        await publish(direct_engine.client, new, direct_engine.version + 1, spoil=ask)
        return (await sent[0])[0]

    got = run(overlap())
    direct_engine.version, direct_engine.model_dir = direct_engine.version + 1, new
    assert got.weight_version == direct_engine.version
    want = token_logprobs(new, np.concatenate([PROMPT[:20], got.token_ids]))[19:]
    assert np.abs(want - got.logprobs).max() < 1e-4
