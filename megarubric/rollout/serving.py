"""The loop of an engine process: read requests between model steps, step, answer what has finished.

Requests are taken strictly in the order of their arrival. One that needs an idle engine (a new weight version, sleep)
waits at the head of the queue until everything before it has finished, and everything behind it waits too: so a request
is served by one weight version from its first token to its last, and one sent after an update sees that update.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine import FinishReason
from vllm.v1.engine.llm_engine import LLMEngine

from megarubric.errors import MegarubricError
from megarubric.exchange.receiver import Receiver, State, UpdateFailed, UpdateRefused, checksum_of
from megarubric.exchange.rpc import Call, Server
from megarubric.rollout import messages as m
from megarubric.rollout.jobs import EngineRefused, Job, Race
from megarubric.rollout.routing import routing_dtype, unrecorded

log = logging.getLogger("megarubric.engine")


class EngineLoop:
    """Serves `server` with `engine` until it is told to stop."""

    def __init__(
        self, engine: LLMEngine, server: Server[m.Request], receiver: Receiver, config: m.EngineConfig, start_s: float
    ) -> None:
        self.engine, self.server, self.receiver, self.config = engine, server, receiver, config
        self.stopping = False
        self.start_seconds = start_s
        self._vocab_size = engine.model_config.get_vocab_size()
        self._queue: deque[Call] = deque()
        # Request id -> job, index in it, prompt tokens, and vLLM's own id of the request.
        self._jobs: dict[str, tuple[Job, int, int, str]] = {}
        self._race: Race | None = None
        self._capture = config.capture_routing and current_platform.is_cpu()
        if self._capture:
            engine.collective_rpc("start_routing_capture")
        self._ids = itertools.count()
        self._asleep: set[str] = set()  # of "weights", "kv_cache"
        self._finished = self._prefilled = self._cached = self._generated = self._steps = 0
        self._step_seconds = 0.0

    def run(self) -> None:
        """Loop until Shutdown or `stopping`; then every call that waits is answered with an error."""
        try:
            while not self.stopping:
                self._receive()
                self._admit()
                if self._jobs:
                    self._step()
        except Exception as error:
            self._fail_all(error)
            raise
        self._fail_all(EngineRefused("the engine was told to stop"))

    # --- requests -----------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take in all messages that are there; wait a little for one when there is nothing to do."""
        timeout = 0.0 if self._jobs else 0.1
        while (call := self.server.receive(timeout)) is not None:
            timeout = 0.0
            try:
                if not self._answer_at_once(call):
                    self._queue.append(call)
            except Exception as error:
                self._fail(call, error)

    def _answer_at_once(self, call: Call) -> bool:
        """Serve a call that need not wait its turn; False for one that must."""
        match call.body:
            case m.Stats():
                call.reply(self._stats())
            case m.Shutdown():
                self.stopping = True
                call.reply(m.Done())
            case m.BeginUpdate(version, manifest, devices) if self.receiver.staging == "host":
                self.receiver.begin(version, manifest, devices)
                call.reply(self._weights())
            case m.LoadBucket(version, bucket):
                self.receiver.load(version, bucket)
                call.reply(self._weights())
            case m.AbortUpdate():
                self.receiver.abort()
                call.reply(self._weights())
            case m.FinishUpdate() if self._loading_direct():
                self._finish_update(call)
            case _:
                return False
        return True

    def _admit(self) -> None:
        """Serve the queue from its head, as far as the present state allows."""
        while self._queue and not self._loading_direct():
            call = self._queue[0]
            keeps_running = isinstance(call.body, m.FinishUpdate) and call.body.in_flight == "keep"
            serves = isinstance(call.body, m.Generate | m.TierLogprobs | m.ScoreTokens | m.Checksum)
            if not serves and not keeps_running and self._jobs:
                return
            self._queue.popleft()
            try:
                self._serve(call)
            except Exception as error:
                self._fail(call, error)

    def _serve(self, call: Call) -> None:
        match call.body:
            case m.Generate(race=None):
                self._generate(call)
            case m.Generate(race=m.Race() as race):
                self._enter(call, race)
            case m.TierLogprobs(prompts, tier_tokens):
                queries = m.unpack_ragged(prompts, call.frames)
                self._tier_logprobs(call, queries, m.unpack_ragged(tier_tokens, call.frames))
            case m.ScoreTokens(sequences):
                self._score_tokens(call, m.unpack_ragged(sequences, call.frames))
            case m.BeginUpdate(version, manifest, devices):
                self._need_weights_awake(version)
                self.receiver.begin(version, manifest, devices)
                call.reply(self._weights())
            case m.FinishUpdate():
                self._finish_update(call)
            case m.Checksum():
                call.reply(self._weights(with_checksum=True))
            case m.Sleep(level):
                call.reply(self._sleep(level))
            case m.Wake(tags):
                call.reply(self._wake(tags))
            case m.ResetPrefixCache():
                self.engine.reset_prefix_cache()
                call.reply(m.Done())

    def _enter(self, call: Call, spec: m.Race) -> None:
        """Hold a call until all of its race are there, then begin them. A race that never filled ends with the next."""
        race = self._race
        if race is None or race.spec != spec:
            if race is not None and race.under_way:
                raise EngineRefused(f"race {spec.id}: race {race.spec.id} is still under way")
            entered = Race(spec)
            for held in race.held if race else ():
                held.fail(EngineRefused("this race never had all its calls"))
            self._race = race = entered
        race.held.append(call)
        if len(race.held) < spec.calls:
            return
        for held in race.held:
            try:
                race.jobs.append(self._generate(held))
            except Exception as error:
                self._fail(held, error)
        race.held.clear()
        self._end_race()

    def _end_race(self) -> None:
        """When enough calls of the race have ended, answer the others with what they have."""
        race = self._race
        if race is None or race.held or not race.decided:
            return
        cut = [internal for job, _, _, internal in self._jobs.values() if job in race.jobs]
        self._race = None
        for internal in cut:
            state = self.engine.output_processor.request_states[internal]
            output = state.make_request_output([], None, FinishReason.ABORT, None)  # before vLLM forgets the tokens
            self.engine.abort_request([internal], internal=True)
            assert isinstance(output, RequestOutput)
            self._finish(output)
        if cut and not self._jobs:
            self.engine.step()  # nothing to compute: the workers are told what to forget

    def _generate(self, call: Call) -> Job:
        prompts, sampling = m.unpack_ragged(call.body.prompts, call.frames), call.body.sampling
        if len(prompts) != len(sampling):
            raise EngineRefused(f"{len(prompts)} prompts with {len(sampling)} sampling settings")
        job = self._job(call, m.Generated, prompts)
        for i, (prompt, s) in enumerate(zip(prompts, sampling)):
            # The engine's own end tokens are ignored: what ends a sample is only what the request names.
            params = {
                "max_tokens": s.max_tokens,
                "temperature": s.temperature,
                "top_p": s.top_p,
                "seed": s.seed,
                "stop_token_ids": list(s.stop_token_ids),
                "logprobs": 0,
            }
            if s.json_schema:
                params["structured_outputs"] = StructuredOutputsParams(json=s.json_schema)
            self._add(job, i, prompt, params)
        return job

    def _tier_logprobs(
        self, call: Call, prompts: list[NDArray[np.int32]], tier_tokens: list[NDArray[np.int32]]
    ) -> None:
        """One prefill and one sampled token each; the sampler reads the named tokens of the full log-softmax."""
        if len(prompts) != len(tier_tokens):
            raise EngineRefused(f"{len(prompts)} prompts with {len(tier_tokens)} sets of tier tokens")
        job = self._job(call, m.Scored, prompts)
        for i, (prompt, tiers) in enumerate(zip(prompts, tier_tokens)):
            if wrong := self._bad_tokens(tiers, "tier token"):
                job.end(i, self._error_end(wrong))
                continue
            params = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": tiers.tolist()}
            self._add(job, i, prompt, params)

    def _score_tokens(self, call: Call, sequences: list[NDArray[np.int32]]) -> None:
        """Prompt log-probabilities; vLLM leaves the prefix cache aside for these, as cached tokens have no logits."""
        job = self._job(call, m.Scored, sequences)
        for i, sequence in enumerate(sequences):
            self._add(job, i, sequence, {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0})

    def _job(
        self, call: Call, reply_type: type[m.Generated] | type[m.Scored], prompts: Sequence[NDArray[np.int32]]
    ) -> Job:
        if self._asleep:
            raise EngineRefused(f"the engine is asleep ({', '.join(sorted(self._asleep))}): wake it first")
        if self.receiver.state is State.BROKEN:
            raise EngineRefused("no weight version is in service: send an update first")
        job = Job(call, reply_type, len(prompts))
        if not prompts:
            job.reply()
        return job

    def _add(self, job: Job, index: int, prompt: NDArray[np.int32], params: dict[str, Any]) -> None:
        """Hand one sequence to the engine; one that it cannot take ends at once, with its reason."""
        wrong = self._bad_tokens(prompt, "prompt")
        if not wrong and len(prompt) >= self.config.max_model_len:
            wrong = f"prompt of {len(prompt)} tokens leaves no room in max_model_len {self.config.max_model_len}"
        if not wrong:
            request_id = str(next(self._ids))
            try:
                sampling = SamplingParams(
                    **params,
                    ignore_eos=True,
                    detokenize=False,
                    flat_logprobs=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                internal = self.engine.add_request(request_id, tokens_input(prompt.tolist()), sampling)
            except Exception as error:  # vLLM's own validation, which has no common class
                wrong = " ".join(str(error).split()) or type(error).__name__
            else:
                self._jobs[request_id] = (job, index, len(prompt), internal)
                return
        job.end(index, self._error_end(wrong))

    def _bad_tokens(self, ids: NDArray[np.int32], what: str) -> str:
        if len(ids) == 0:
            return f"empty {what}"
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            return f"{what} holds token id {low if low < 0 else high}, the vocabulary has {self._vocab_size}"
        return ""

    def _error_end(self, reason: str) -> m.SampleEnd:
        return m.SampleEnd("error", self.receiver.version, self.receiver.version, 0, reason)

    # --- steps --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        started = time.perf_counter()
        outputs = self.engine.step()
        self._step_seconds += time.perf_counter() - started
        self._steps += 1
        for output in outputs:
            if output.finished and isinstance(output, RequestOutput):
                self._finish(output)
        self._end_race()

    def _finish(self, output: RequestOutput) -> None:
        job, index, prompt_tokens, internal = self._jobs.pop(output.request_id)
        sample = output.outputs[0]
        cached = output.num_cached_tokens or 0
        version = first = self.receiver.version
        if sample.weight_versions:
            first, version = (int(sample.weight_versions[i].version) for i in (0, -1))
        self._finished += 1
        self._cached += cached
        self._prefilled += prompt_tokens - cached
        if job.reply_type is m.Generated:
            job.tokens[index] = np.array(sample.token_ids, np.int32)
            job.logprobs[index] = np.array(sample.logprobs.logprobs, np.float32)
            self._generated += len(sample.token_ids)
            reason = sample.finish_reason or "error"
            if self.config.capture_routing and reason != "abort":
                job.routing[index] = self._routing(output, prompt_tokens + len(sample.token_ids), internal)
        elif isinstance(job.call.body, m.TierLogprobs):
            # The first entry is the sampled token; the tokens asked for follow in their order.
            job.logprobs[index] = np.array(sample.logprobs.logprobs[1:], np.float32)
            reason = "scored"
        else:
            # Position 0 has no entry, so what is there starts with the second token.
            job.logprobs[index] = np.array(output.prompt_logprobs.logprobs, np.float32)
            reason = "scored"
        job.end(index, m.SampleEnd(reason, version, first, cached, None))

    def _routing(self, output: RequestOutput, n: int, internal: str) -> NDArray[Any]:
        """`Completion.routing` of a finished sample with `n` tokens, its prompt included."""
        if self._capture:
            (found,) = self.engine.collective_rpc("take_routing", args=(internal,))
        else:
            found = output.outputs[0].routed_experts
        if found is None:
            raise EngineRefused("the engine recorded no routing for a sample")
        config = self.engine.model_config
        shape = config.get_total_num_hidden_layers(), config.get_num_experts_per_tok()
        rows = unrecorded(n, *shape, routing_dtype(config.get_num_experts()))
        rows[: min(n, len(found))] = found[:n]
        return rows

    # --- weights and memory -------------------------------------------------------------------------------------

    def _loading_direct(self) -> bool:
        return self.receiver.staging == "direct" and self.receiver.state is State.RECEIVING

    def _finish_update(self, call: Call) -> None:
        update: m.FinishUpdate = call.body
        self._need_weights_awake(update.version)
        seconds = self.receiver.finish(update.version, update.checksum)
        # Keys and values of the old weights must not be read again: vLLM does not forget them by itself. Requests
        # that go on compute theirs anew.
        if not self.engine.reset_prefix_cache(reset_running_requests=bool(self._jobs)):
            self.receiver.lose_weights()
            raise UpdateFailed(f"version {update.version}: keys and values of the old weights could not be dropped")
        if self._capture:
            self.engine.collective_rpc("forget_routing")
        self.engine.set_weight_version(str(update.version))
        log.info("serving weight version %d after %.3f s", update.version, seconds)
        call.reply(self._weights(with_checksum=True, seconds=seconds))

    def _need_weights_awake(self, version: int) -> None:
        if "weights" in self._asleep:
            raise UpdateRefused(f"version {version}: the weights are asleep, wake them first")

    def _weights(self, with_checksum: bool = False, seconds: float = 0.0) -> m.Weights:
        if with_checksum and not self.receiver.checksum and self.receiver.state is not State.BROKEN:
            self.receiver.checksum = checksum_of(Path(self.config.model_dir))  # the version it was started with
        return m.Weights(self.receiver.version, self.receiver.checksum, self.receiver.state.value, seconds)

    def _sleep(self, level: int) -> m.Slept:
        if reason := self._no_sleep():
            return m.Slept("ignored", reason)
        self.engine.sleep(level)
        self._asleep = {"weights", "kv_cache"}
        if level == 2:
            self.receiver.lose_weights()
        return m.Slept("slept")

    def _wake(self, tags: Sequence[str]) -> m.Slept:
        if reason := self._no_sleep():
            return m.Slept("ignored", reason)
        self.engine.wake_up(list(tags) or None)
        self._asleep -= set(tags) or self._asleep
        return m.Slept("partly awake" if self._asleep else "awake")

    def _no_sleep(self) -> str:
        if current_platform.is_cpu():
            return "vLLM has no sleep mode on a CPU: its memory stays"
        return "" if self.config.sleep_mode else "the engine was started without sleep mode"

    def _stats(self) -> m.EngineStats:
        return m.EngineStats(
            model_dir=self.config.model_dir,
            role=self.config.role,
            weight_version=self.receiver.version,
            running=len(self._jobs),
            waiting=len(self._queue),
            finished=self._finished,
            prefill_tokens=self._prefilled,
            cached_tokens=self._cached,
            generated_tokens=self._generated,
            steps=self._steps,
            step_seconds=self._step_seconds,
            start_seconds=self.start_seconds,
        )

    def _fail(self, call: Call, error: Exception) -> None:
        if not isinstance(error, MegarubricError):
            log.exception("%s failed", type(call.body).__name__)
        call.fail(error)

    def _fail_all(self, error: BaseException) -> None:
        calls = {id(job): job.call for job, *_ in self._jobs.values()}
        held = self._race.held if self._race else ()
        for call in [*calls.values(), *held, *self._queue]:
            call.fail(error)
        self._jobs.clear()
        self._race = None
        self._queue.clear()
