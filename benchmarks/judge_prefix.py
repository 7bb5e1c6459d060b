"""What prefix sharing saves a judge: 64 answers x 8 criteria on a real vLLM engine (CPU or GPU).

Measures, in one run: prompt tokens actually computed when the criteria of an answer share their prefix, against one
all-in-one prompt an answer; wall time against one plain call per criterion on an engine without prefix caching; and the
largest difference between the two engines' log-probabilities, which must be rounding only.

    python benchmarks/judge_prefix.py [--model models/tiny-qwen3-moe] [--answers 64] [--threads 2]

A directory without weights gets random ones: what is counted does not depend on them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from megarubric.judging.backends import load_tokenizer
from megarubric.judging.backends.engine import EngineBackend
from megarubric.judging.judge import Judge
from megarubric.judging.modes import tier_texts
from megarubric.judging.prompt import PromptEncoder, load_template, parse_template, render_all
from megarubric.judging.settings import JudgeSettings
from megarubric.judging.types import JudgeItem, TierQuery, TierReply
from megarubric.launch.plan import quiet_environment, write_json
from megarubric.launch.supervisor import last_words
from megarubric.rollout.client import EngineClient
from megarubric.rollout.messages import EngineConfig
from megarubric.rubrics import Rubric, parse_rubric

ASPECTS = [
    "states what happened and what it cost, without consoling the reader",
    "names concrete things that can be seen, heard or touched",
    "keeps to the question and adds nothing that was not asked",
    "opens without praise for the question or for the asker",
    "does not speak of its own quality or completeness",
    "uses short sentences and plain words throughout",
    "ends on an event or an image, not on a lesson",
    "keeps one point of view from the first line to the last",
]
SENTENCES = [
    "The boats were in before noon and two of them had lost their masts.",
    "My brother counted the men on the quay and then he counted them again.",
    "It rained until the evening, and the shop stayed shut.",
    "She put the letter on the table and went to feed the hens.",
    "Nobody had asked for the keys, so they hung where he had left them.",
    "The road was under water from the bridge to the mill.",
    "We ate the bread that was left and did not talk about the price.",
    "In the morning the ice on the bucket was as thick as a thumb.",
    "The teacher wrote three names on the board and rubbed one out.",
    "By the third winter the orchard was gone and the house was sold.",
]


def rubric() -> Rubric:
    tiers = [
        {"value": 0, "text": "Not at all, or only in one place."},
        {"value": 1, "text": "For the most part, with one or two lapses."},
        {"value": 2, "text": "Throughout."},
    ]
    criteria = [{"id": f"c{i}", "description": f"The answer {a}.", "tiers": tiers} for i, a in enumerate(ASPECTS)]
    return parse_rubric({"id": "bench", "criteria": criteria}, "benchmark")


def answers(count: int, sentences: int) -> list[JudgeItem]:
    rng, shared = random.Random(0), rubric()
    return [
        JudgeItem(
            shared, f"Write note {i} about the village after the storm.", " ".join(rng.choices(SENTENCES, k=sentences))
        )
        for i in range(count)
    ]


class Recording(EngineBackend):
    """Keeps what the engine said, by question."""

    def __init__(self, client: EngineClient, tokenizer: object) -> None:
        super().__init__(client, tokenizer, "benchmark")
        self.said: dict[str, tuple[float, ...]] = {}

    async def tier_logprobs(self, queries: list[TierQuery]) -> list[TierReply]:  # type: ignore[override]
        replies = await super().tier_logprobs(queries)
        self.said |= {q.content: r.logprobs for q, r in zip(queries, replies) if r.logprobs is not None}
        return replies


class Round(NamedTuple):
    """One pass over all questions."""

    seconds: float
    computed: int
    cached: int
    said: dict[str, tuple[float, ...]]


@contextlib.asynccontextmanager
async def engine(model: Path, sharing: bool, a: argparse.Namespace) -> AsyncIterator[EngineClient]:
    """An engine of its own process, ready."""
    with tempfile.TemporaryDirectory(prefix="mr-") as directory:
        config = EngineConfig(
            model_dir=str(model), role="judge", dtype="float32", max_model_len=a.context, max_num_seqs=64,
            max_num_batched_tokens=4096, block_size=a.block, enable_prefix_caching=sharing, kv_cache_gib=0.5,
            threads=a.threads,
        )  # fmt: skip
        path = write_json(Path(directory) / "engine.json", config)
        endpoint = f"ipc://{directory}/engine"
        command = [sys.executable, "-m", "megarubric.rollout.engine", "--endpoint", endpoint, "--config", str(path)]
        log = (Path(directory) / "engine.log").open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **quiet_environment(a.threads)})

        def ended() -> str | None:
            code = process.poll()
            return None if code is None else f"engine ended with status {code}: {last_words(Path(log.name))}"

        client = EngineClient(endpoint, peer_status=ended)
        try:
            await client.ready(timeout_s=300)
            yield client
        finally:
            await client.close()
            process.terminate()
            process.wait(30)


async def one_round(client: EngineClient, tokenizer: object, items: list[JudgeItem]) -> Round:
    """Judge all items; nothing is left of the round before."""
    await client.reset_prefix_cache()
    backend = Recording(client, tokenizer)
    judge = Judge(backend, JudgeSettings(template="tier_compact", timeout_s=600, retries=0))
    before, began = await client.stats(), time.perf_counter()
    rows = await judge.judge(items)
    seconds, after = time.perf_counter() - began, await client.stats()
    unread = [j.reason for row in rows for j in row.values() if j.reason and "mass" not in j.reason]
    assert not unread, unread[:3]
    computed, cached = after.prefill_tokens - before.prefill_tokens, after.cached_tokens - before.cached_tokens
    return Round(seconds, computed, cached, backend.said)


async def measure(model: Path, items: list[JudgeItem], a: argparse.Namespace) -> tuple[list[Round], list[Round]]:
    """Rounds with and without prefix sharing, taken in turn on two engines that are idle between their turns; the first
    of each, on a few items, only starts the kernels."""
    tokenizer = load_tokenizer(model)
    async with engine(model, True, a) as sharing, engine(model, False, a) as plain:
        rounds: tuple[list[Round], list[Round]] = ([], [])
        for number in range(a.rounds + 1):
            for client, kept in zip((sharing, plain), rounds):
                done = await one_round(client, tokenizer, items if number else items[:2])
                if number:
                    kept.append(done)
        return rounds


def all_in_one_tokens(model: Path, items: list[JudgeItem]) -> int:
    """Tokens of one prompt an answer that lists all criteria, in the same short form."""
    head = load_template("tier_compact").text.split("{{=criterion}}\n")[0]
    template = parse_template(head + "{{=criterion}}\n{{criteria}}<|im_end|>\n<|im_start|>assistant\n", "all_compact")
    encoder = PromptEncoder(load_tokenizer(model))
    total = 0
    for item in items:
        criteria = [(c.description, tier_texts(c)) for c in item.rubric.criteria]
        total += len(encoder.encode(render_all(template, item.prompt, item.response, criteria)))
    return total


def with_weights(model: Path, directory: Path) -> Path:
    """`model`, or a copy of it with random weights when it has none."""
    if list(model.glob("*.safetensors")):
        return model
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    copy = directory / "model"
    copy.mkdir()
    for file in model.glob("*.json"):
        shutil.copy(file, copy)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(copy)
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-qwen3-moe"))
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--sentences", type=int, default=36, help="sentences in an answer")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--block", type=int, default=32, help="tokens in a KV block, the grain of sharing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = with_weights(a.model, Path(directory))
        items = answers(a.answers, a.sentences)
        one = all_in_one_tokens(model, items)
        shared, plain = asyncio.run(measure(model, items, a))
    assert all(r.said.keys() == shared[0].said.keys() for r in (*shared, *plain))
    difference = max(abs(x - y) for key, row in shared[0].said.items() for x, y in zip(row, plain[0].said[key]))
    assert math.isfinite(difference)
    seconds = [statistics.median(r.seconds for r in rounds) for rounds in (shared, plain)]
    result = {
        "answers": a.answers,
        "criteria": len(ASPECTS),
        "all_in_one_tokens": one,
        "shared": {"seconds": [r.seconds for r in shared], "computed": shared[0].computed, "cached": shared[0].cached},
        "plain": {"seconds": [r.seconds for r in plain], "computed": plain[0].computed, "cached": plain[0].cached},
        "computed_over_all_in_one": shared[0].computed / one,
        "speedup_of_medians": seconds[1] / seconds[0],
        "max_abs_logprob_difference": difference,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
