"""An engine made of arithmetic, for tests of what calls it: a token follows from the tokens before it, the seed and the
weight version. It holds and ends races as `megarubric.rollout.serving` does, one token a sample and step."""

from __future__ import annotations

import asyncio
import hashlib

import numpy as np

from megarubric.rollout.messages import Completion, GenerateRequest, Race

STOP = 0


def toy_logprob(version: int, token: int) -> np.float32:
    """The version and the token of a toy token can be read from it."""
    return np.float32(-(version + token / 1000))


class ToyEngine:
    """`stop_one_in`: how rare the stop token is, so that answers have a long tail; `version` serves."""

    def __init__(self, stop_one_in: int = 12, version: int = 0) -> None:
        self.stop_one_in, self.version = stop_one_in, version
        self.requests: list[GenerateRequest] = []
        self.running = 0
        self._held: dict[int, list[tuple[list[GenerateRequest], asyncio.Future]]] = {}

    async def generate(self, requests, race: Race | None = None) -> list[Completion]:
        self.requests += requests
        self.running += len(requests)
        if race is None:
            await asyncio.sleep(0)
            self.running -= len(requests)
            return [self._cut(r, self._whole(r), None) for r in requests]
        future = asyncio.get_running_loop().create_future()
        held = self._held.setdefault(race.id, [])
        held.append((list(requests), future))
        if len(held) == race.calls:
            self._run(self._held.pop(race.id), race)
        return await future

    def _run(self, calls, race: Race) -> None:
        whole = [[self._whole(r) for r in requests] for requests, _ in calls]
        ends = [max(len(tokens) for tokens in group) for group in whole]
        last = sorted(ends)[race.enough - 1]
        for k in sorted(range(len(calls)), key=lambda k: (min(ends[k], last), ends[k] > last)):
            requests, future = calls[k]
            self.running -= len(requests)
            future.set_result([self._cut(r, tokens, last) for r, tokens in zip(requests, whole[k])])

    def _whole(self, r: GenerateRequest) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < r.max_tokens and (not tokens or tokens[-1] != STOP):
            text = np.concatenate([r.prompt_ids, np.array(tokens, np.int32)]).tobytes()
            number = int.from_bytes(hashlib.blake2b(text + f"{r.seed} {self.version}".encode()).digest()[:4], "little")
            tokens.append(STOP if number % self.stop_one_in == 0 else 1 + number % 97)
        return tokens

    def _cut(self, r: GenerateRequest, tokens: list[int], last: int | None) -> Completion:
        cut = last is not None and len(tokens) > last
        reason = "abort" if cut else "stop" if tokens[-1] == STOP else "length"
        kept = np.array(tokens[:last] if cut else tokens, np.int32)
        logprobs = np.array([toy_logprob(self.version, int(t)) for t in kept], np.float32)
        routing = None if cut else np.full((len(r.prompt_ids) + len(kept), 1, 1), self.version, np.uint8)
        return Completion(kept, logprobs, reason, self.version, self.version, routing=routing)
