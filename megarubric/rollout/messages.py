"""What travels between the controller and an engine process, and the settings an engine starts with.

Wire messages are msgspec structs (see `megarubric.exchange.rpc`); token ids and log-probabilities travel as raw frames.
Many short arrays share two frames as a `Ragged`. No engine library is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.exchange.buckets import Bucket, DeviceBuffers, TensorSpec
from megarubric.exchange.rpc import Array, Frames, WireError, read_array


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one engine process, read from the JSON file that it is started with.

    `model_dir` is a Hugging Face directory (config.json and safetensors), `weight_version` the label of its weights.
    `max_model_len` counts prompt and answer tokens together. On a GPU the engine takes `gpu_memory_utilization` of the
    device; on a CPU the KV cache takes `kv_cache_gib` GiB of host memory and `threads` cores compute. `block_size`
    tokens share one KV block, the grain of prefix sharing (0: vLLM's choice on a GPU, 32 on a CPU).

    `staging` says how a weight update arrives: "host" keeps the whole new version in host memory until it is verified,
    so that a bad update leaves the old version serving; "direct" loads bucket by bucket into an idle engine, without
    the copy and without the old version to fall back on. `capture_routing` returns with every sample which experts its
    tokens went to. With `structured_output` the engine loads the tokenizer, and requests may bring a JSON schema.
    """

    model_dir: str
    role: Literal["policy", "judge"] = "policy"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 0
    block_size: int = 0
    tensor_parallel: int = 1
    enforce_eager: bool = True
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.5
    kv_cache_gib: float = 1.0
    threads: int = 1
    seed: int = 0
    sleep_mode: bool = True
    weight_version: int = 0
    staging: Literal["host", "direct"] = "host"
    structured_output: bool = False
    capture_routing: bool = False

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "tensor_parallel", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needs at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization is {self.gpu_memory_utilization}, needs to lie in (0, 1]")
        if self.kv_cache_gib <= 0:
            raise ValueError(f"kv_cache_gib is {self.kv_cache_gib}, needs to be positive")


# --- arrays of unequal length ---------------------------------------------------------------------------------------


class Ragged(msgspec.Struct, frozen=True, array_like=True):
    """A list of one-dimensional arrays: their concatenation and their lengths (int32)."""

    values: Array
    lengths: Array


def pack_ragged(frames: Frames, arrays: Sequence[NDArray[Any]], dtype: Any) -> Ragged:
    """Append `arrays` (each [n_i], converted to `dtype`) to `frames` as two frames."""
    flat = np.concatenate([np.asarray(a, dtype=dtype) for a in arrays]) if arrays else np.empty(0, dtype)
    return Ragged(frames.add(flat), frames.add(np.array([len(a) for a in arrays], np.int32)))


def unpack_ragged(spec: Ragged, frames: Sequence[bytes | memoryview]) -> list[NDArray[Any]]:
    """The arrays that `pack_ragged` put in `frames`, as read-only views.

    Raises WireError when the lengths do not add up.
    """
    values, lengths = read_array(spec.values, frames), read_array(spec.lengths, frames)
    if values.ndim != 1 or lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != len(values):
        raise WireError(f"ragged array: lengths add up to {int(lengths.sum())}, there are {values.size} values")
    ends = np.cumsum(lengths, dtype=np.int64)
    return [values[end - n : end] for end, n in zip(ends.tolist(), lengths.tolist())]


def unpack_routing(
    spec: Array | None, lengths: Sequence[int], frames: Sequence[bytes | memoryview]
) -> list[NDArray[Any] | None]:
    """`Completion.routing` of samples with `lengths` tokens each, prompts included. Raises WireError for a misfit."""
    if spec is None:
        return [None] * len(lengths)
    rows = read_array(spec, frames)
    if rows.ndim != 3 or len(rows) != sum(lengths):
        raise WireError(f"routing has shape {rows.shape}, the samples have {sum(lengths)} tokens")
    ends = np.cumsum(lengths, dtype=np.int64)
    return [rows[end - n : end] for end, n in zip(ends.tolist(), lengths)]


# --- what callers hold ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sample to draw. `prompt_ids` int32 [P]; `max_tokens` new tokens at most, the stop token counted.

    `temperature` 0 is greedy. Generation ends with the first token in `stop_token_ids`, which is kept. With a
    `json_schema` (the schema as JSON text; `EngineConfig.structured_output`) only tokens that go on a text of that
    schema can be drawn. `prefix` as in `TokenTierQuery`.
    """

    prompt_ids: NDArray[np.int32]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    json_schema: str = ""
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A sample as the engine gave it.

    `token_ids` int32 [n] and `logprobs` float32 [n], natural logarithms of the sampled tokens' probabilities under the
    model's own distribution: before temperature and top-p, so a trainer that computes log-softmax of its logits gets
    the same numbers at any sampling temperature. (At temperature 1 and top-p 1 they are also the probabilities that
    the tokens were drawn with; otherwise the importance ratio to the sampler is not theirs.)

    `finish_reason`: "stop" (a stop token was drawn), "length", "abort" (cut short in a `Race`, perhaps before its first
    token), or "error" with `error` set and no tokens. `weight_version` drew the last token, `first_version` the first;
    they differ when an update was told to keep running requests, or the sample was continued after one
    (`rollout.partial`). `cached_tokens` prompt tokens came from the prefix cache.

    `routing` uint8 or uint16 [P + n, L, K] with `EngineConfig.capture_routing`: the K experts of each of L layers that
    a token, prompt tokens first, was sent to when it was read; the dtype's largest number where that is not known, as
    for the last token, which was never read. None for a sample that was cut short.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: str
    weight_version: int
    first_version: int
    cached_tokens: int = 0
    error: str | None = None
    routing: NDArray[np.unsignedinteger[Any]] | None = None


@dataclass(frozen=True, slots=True)
class TokenTierQuery:
    """Asks for the log-probabilities of `tier_token_ids` int32 [T] as the token after `prompt_ids` int32 [P].

    `prefix` stays on this side of the wire: prompts with one number (0: not known) begin alike for most of their length
    and belong on one engine, which reads that beginning once.
    """

    prompt_ids: NDArray[np.int32]
    tier_token_ids: NDArray[np.int32]
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities float32 of the tokens asked about, or None with the reason in `error`."""

    logprobs: NDArray[np.float32] | None
    weight_version: int
    cached_tokens: int = 0
    error: str | None = None


# --- requests -------------------------------------------------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Sampling settings of one sample: see `GenerateRequest`."""

    max_tokens: int
    seed: int
    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    json_schema: str = ""


class Race(msgspec.Struct, frozen=True, array_like=True):
    """Some of several `Generate` calls are enough: `calls` calls carry this `id`, and when `enough` of them have ended,
    the engine cuts the samples of the others short in that very step, and answers with what they have.

    The engine begins when all of the calls have come, in the order they came. So what is cut where depends on the
    calls alone and not on when messages arrive (as long as the engine has nothing else to do): a run can be repeated.
    """

    id: int
    calls: int
    enough: int


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Draw one sample for each of `prompts` (int32); answered by `Generated` when all have finished, or were cut short
    in the `race`."""

    prompts: Ragged
    sampling: tuple[Sampling, ...]
    race: Race | None = None


class TierLogprobs(msgspec.Struct, frozen=True, tag=True):
    """For each query, log-softmax over the whole vocabulary after `prompts[i]`, read at `tier_tokens[i]` (int32).

    Answered by `Scored`, float32 of the lengths of `tier_tokens`.
    """

    prompts: Ragged
    tier_tokens: Ragged


class ScoreTokens(msgspec.Struct, frozen=True, tag=True):
    """Log-probability of each token of `sequences` (int32) given those before it.

    Answered by `Scored`; a sequence of n tokens has n-1 scores, the first for its second token.
    """

    sequences: Ragged


class BeginUpdate(msgspec.Struct, frozen=True, tag=True):
    """Announce weight version `version` with every tensor it will have, and the device buffers it will come through
    (None: shared memory)."""

    version: int
    manifest: tuple[TensorSpec, ...]
    devices: DeviceBuffers | None = None


class LoadBucket(msgspec.Struct, frozen=True, tag=True):
    """One filled bucket of the update under way. Once acknowledged, the sender may fill the segment again."""

    version: int
    bucket: Bucket


class FinishUpdate(msgspec.Struct, frozen=True, tag=True):
    """Put `version` in service if it is complete and its checksum is `checksum`.

    Requests sent before are finished under the old version first (`in_flight` "wait"), or go on under the new one
    with their KV cache computed again ("keep"); requests sent after are served by the new version only.
    """

    version: int
    checksum: str
    in_flight: Literal["wait", "keep"] = "wait"


class AbortUpdate(msgspec.Struct, frozen=True, tag=True):
    """Forget the update under way; without one, nothing happens."""


class Checksum(msgspec.Struct, frozen=True, tag=True):
    """Ask for the checksum of the weights in service, as they were received."""


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Free device memory once running requests have finished: level 1 keeps the weights on the host, 2 drops them."""

    level: Literal[1, 2] = 1


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Take device memory again: all of it, or only that tagged "weights" or "kv_cache"."""

    tags: tuple[Literal["weights", "kv_cache"], ...] = ()


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Forget all cached prefixes once running requests have finished. (A weight update does so by itself.)"""


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Ask for `EngineStats`."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the process; requests that have not finished are answered with an error."""


Request = (
    Generate
    | TierLogprobs
    | ScoreTokens
    | BeginUpdate
    | LoadBucket
    | FinishUpdate
    | AbortUpdate
    | Checksum
    | Sleep
    | Wake
    | ResetPrefixCache
    | Stats
    | Shutdown
)

# --- replies --------------------------------------------------------------------------------------------------------


class SampleEnd(msgspec.Struct, frozen=True, array_like=True):
    """How one sample ended: see `Completion`."""

    finish_reason: str
    weight_version: int
    first_version: int
    cached_tokens: int
    error: str | None


class Generated(msgspec.Struct, frozen=True, tag=True):
    """Samples in the order of the request: `token_ids` int32, `logprobs` float32."""

    token_ids: Ragged
    logprobs: Ragged
    ends: tuple[SampleEnd, ...]
    routing: Array | None = None  # that of all samples' prompts and tokens, one after the other


class Scored(msgspec.Struct, frozen=True, tag=True):
    """Scores in the order of the request, `logprobs` float32; `finish_reason` of a good one is "scored"."""

    logprobs: Ragged
    ends: tuple[SampleEnd, ...]


class Weights(msgspec.Struct, frozen=True, tag=True):
    """State of the weights: `version` in service (-1: none), `checksum` of its tensors, what the receiver is doing."""

    version: int
    checksum: str
    state: str
    seconds: float = 0.0


class Slept(msgspec.Struct, frozen=True, tag=True):
    """Answer to Sleep and Wake. `outcome` is "ignored", with the reason, where the platform cannot free memory."""

    outcome: Literal["slept", "awake", "partly awake", "ignored"]
    reason: str = ""


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """Counts since the start (tokens, requests) and of this moment (`running`, `waiting` requests)."""

    model_dir: str
    role: str
    weight_version: int
    running: int
    waiting: int
    finished: int
    prefill_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    step_seconds: float
    start_seconds: float


class Done(msgspec.Struct, frozen=True, tag=True):
    """Nothing more to say."""


Reply = Generated | Scored | Weights | Slept | EngineStats | Done
