"""What the controller and the trainer say to each other: msgspec structs, tagged unions of requests and replies.

The controller imports this without torch or megatron. Arrays travel as raw frames (`rpc.Array`); `TrainBatch` is their
numpy form on either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from megarubric.config import fp8
from megarubric.errors import MegarubricError
from megarubric.exchange.buckets import Bucket, BucketTable, DeviceBuffers
from megarubric.exchange.rpc import Array, Frames, read_array

Which = Literal["policy", "reference"]


class BatchError(MegarubricError):
    """A batch whose arrays do not fit together."""


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a trainer rank needs to know before the first command (the ``--config`` JSON file).

    `model_dir` holds config.json and, with ``init="load"``, the safetensors. World size comes from the launcher's
    environment; dp = world / (tp * pp * cp).
    """

    model_dir: str
    init: Literal["load", "random"] = "load"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch_tokens: int = 4096  # upper bound of a micro-batch on one DP rank, in tokens before padding
    recompute: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    optimizer_offload: bool = False  # Adam on the host; needs CUDA
    card: str | None = None  # the GPU this is meant for (config/schema.py); None: whatever there is
    fp8: fp8.Recipe = "none"
    fp8_parameters: bool = False  # the weights of quantised products are FP8 too
    fp8_bf16_layers: int = 1  # so many first and last layers keep bf16 linears
    reference: bool = False  # keep a host copy of the first weights for KL to a reference
    bucket_bytes: int = 64 << 20
    exchange_through: Literal["host", "device"] = "host"  # buckets in shared memory, or in the devices'
    hosts: int = 1  # host of a rank = rank * hosts // world
    exchange_delta: bool = False  # between hosts, send what changed since the last version
    shm_prefix: str = "megarubric"  # unique per run: names of shared memory segments begin with it
    threads: int = 1  # CPU threads of a rank
    timeout_s: float = 600.0  # of collectives: a rank that died silently is noticed at the latest after this


class LossSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one loss (megarubric.megatron.loss has the equation); algorithms are settings of it plus token weights."""

    surrogate: Literal["clip", "detached_clip", "logprob"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    tis_cap: float = 0.0  # importance sampling engine -> trainer, cut off at this ratio; 0 = off
    tis_mode: Literal["truncate", "mask"] = "truncate"  # a token beyond the cap: its cap, or nothing
    reject_below: float = 0.0  # a sequence whose geometric-mean ratio trainer : engine is outside is not trained on;
    reject_above: float = 0.0  # 0 = no bound
    kl_coef: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    temperature: float = 1.0  # log-probabilities are of softmax(logits / temperature)


@dataclass(frozen=True)
class TrainBatch:
    """S sequences of together T tokens, concatenated.

    tokens int32[T]; lengths int32[S] (each >= 1, sum T). Per-token arrays are float32[T] and aligned with the token
    they speak about: ``loss_mask[t]`` is 1 when token t, predicted from the tokens before it, is trained on, so the
    first token of a sequence is never trained on. `weights` carries the whole normalisation of the loss.
    `updates` int32[S] says in which optimizer step of this batch (0, 1, ...) a sequence takes part; None = all in one.
    `fresh` is 1 on the tokens of sequences that the present weights wrote from the first to the last: only there must
    trainer and engine agree (None = everywhere).
    `routing` uint8 or uint16 [T, L, K]: the K experts that the engine sent token t to, as an input, in each of the
    model's L layers; the dtype's largest number at [t, 0, 0] where it recorded none (None = every token routes itself).
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    loss_mask: NDArray[np.float32] | None = None
    advantages: NDArray[np.float32] | None = None
    weights: NDArray[np.float32] | None = None
    rollout_logprobs: NDArray[np.float32] | None = None
    old_logprobs: NDArray[np.float32] | None = None
    ref_logprobs: NDArray[np.float32] | None = None
    updates: NDArray[np.int32] | None = None
    fresh: NDArray[np.float32] | None = None
    routing: NDArray[np.unsignedinteger[Any]] | None = None

    def __post_init__(self) -> None:
        """Raises BatchError naming the array that does not fit."""
        if self.lengths.ndim != 1 or len(self.lengths) == 0 or int(self.lengths.min()) < 1:
            raise BatchError("batch: lengths must be a non-empty vector of numbers >= 1")
        n_tokens, n_seqs = int(self.lengths.sum()), len(self.lengths)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "lengths":
                continue
            expected = (n_seqs,) if field.name == "updates" else (n_tokens,)
            if field.name == "routing":
                expected = (n_tokens, *value.shape[1:3])
                if value.ndim != 3 or value.dtype not in (np.uint8, np.uint16):
                    raise BatchError(f"batch: routing is {value.dtype} {value.shape}, needs uint8 or uint16 [T, L, K]")
            if value.shape != expected:
                raise BatchError(f"batch: {field.name} has shape {value.shape}, {n_seqs} sequences need {expected}")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise BatchError(f"batch: {field.name} has a value that is not finite at {int(_first_bad(value))}")
        if self.tokens.size and int(self.tokens.min()) < 0:
            raise BatchError("batch: negative token id")
        if self.loss_mask is not None and self.loss_mask[self.starts].any():
            raise BatchError("batch: loss_mask trains on the first token of a sequence, which nothing predicts")
        if self.updates is not None:
            present = np.unique(self.updates)
            if present[0] != 0 or present[-1] != len(present) - 1:
                raise BatchError(
                    f"batch: updates must number the optimizer steps 0, 1, ... without a gap, has {present}"
                )

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of the first token of each sequence, int64[S]."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @property
    def n_updates(self) -> int:
        return 1 if self.updates is None else int(self.updates.max()) + 1


def _first_bad(value: NDArray[Any]) -> int:
    return int(np.argmin(np.isfinite(value)))


class WireBatch(msgspec.Struct, frozen=True):
    """`TrainBatch` as descriptors of raw frames."""

    tokens: Array
    lengths: Array
    loss_mask: Array | None = None
    advantages: Array | None = None
    weights: Array | None = None
    rollout_logprobs: Array | None = None
    old_logprobs: Array | None = None
    ref_logprobs: Array | None = None
    updates: Array | None = None
    fresh: Array | None = None
    routing: Array | None = None

    @classmethod
    def pack(cls, batch: TrainBatch, frames: Frames) -> WireBatch:
        """Put the arrays of `batch` into `frames`, as int32 and float32 (`routing` as it is)."""
        described: dict[str, Array] = {}
        for field in fields(batch):
            value = getattr(batch, field.name)
            if value is not None:
                dtype = value.dtype if field.name == "routing" else _wire_dtype(field.name)
                described[field.name] = frames.add(value.astype(dtype, copy=False))
        return cls(**described)

    def unpack(self, frames: Sequence[bytes | memoryview]) -> TrainBatch:
        """The batch, as read-only views of `frames`. Raises WireError or BatchError."""
        arrays: dict[str, Any] = {}
        for field in fields(TrainBatch):
            spec = getattr(self, field.name)
            if spec is None:
                continue
            arrays[field.name] = read_array(spec, frames)
            if field.name != "routing" and arrays[field.name].dtype != _wire_dtype(field.name):
                raise BatchError(f"batch: {field.name} has dtype {spec.dtype}, needs {_wire_dtype(field.name)}")
        return TrainBatch(**arrays)


def _wire_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(np.int32 if name in ("tokens", "lengths", "updates") else np.float32)


# Requests -------------------------------------------------------------------------------------------------------


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Ask who answers; the first call, it returns when the model is built and loaded."""


class Logprobs(msgspec.Struct, frozen=True, tag=True):
    """Log-probabilities of the batch's tokens (those of its loss_mask, all without one), by the training forward."""

    batch: WireBatch
    which: Which = "policy"
    temperature: float = 1.0


class Train(msgspec.Struct, frozen=True, tag=True):
    """One optimizer step for each update of the batch, all with learning rate `lr`."""

    batch: WireBatch
    loss: LossSettings
    lr: float


class BeginPublish(msgspec.Struct, frozen=True, tag=True):
    """Prepare to publish the present weights as `version`; replies `PublishPlan`."""

    version: int


class FillBucket(msgspec.Struct, frozen=True, tag=True):
    """Write bucket `index`. Buckets alternate between two segments, so asking for bucket i says that the receivers are
    done with bucket i - 2."""

    version: int
    index: int


class EndPublish(msgspec.Struct, frozen=True, tag=True):
    """All buckets are written: returns the checksum of the version."""

    version: int


class Checksum(msgspec.Struct, frozen=True, tag=True):
    """Checksum of the present weights as they would be published."""


class SaveCheckpoint(msgspec.Struct, frozen=True, tag=True):
    """Save model, optimizer and RNG to the directory `path`, which must not exist; `extra` is the caller's JSON. With
    `background`, the answer comes when the state cannot change any more, and `FinishSave` makes it a checkpoint."""

    path: str
    extra: str = "{}"
    background: bool = False


class FinishSave(msgspec.Struct, frozen=True, tag=True):
    """Finish the save in the background: answered by `CheckpointSaved`, or by `Done` when there is none or, without
    `wait`, it is not written yet."""

    wait: bool = True


class LoadCheckpoint(msgspec.Struct, frozen=True, tag=True):
    """Restore a saved checkpoint into the running ranks."""

    path: str


class ExportHF(msgspec.Struct, frozen=True, tag=True):
    """Write the policy as a Hugging Face directory (safetensors, config, tokenizer)."""

    path: str


class Offload(msgspec.Struct, frozen=True, tag=True):
    """Free the accelerator: optimizer state goes to host memory, gradients are dropped; `parameters` go to host memory
    as well. Nothing to do on a CPU."""

    parameters: bool = False


class Onload(msgspec.Struct, frozen=True, tag=True):
    """Undo `Offload`."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End every rank, cleanly."""


Request = (
    Describe
    | Logprobs
    | Train
    | BeginPublish
    | FillBucket
    | EndPublish
    | Checksum
    | SaveCheckpoint
    | FinishSave
    | LoadCheckpoint
    | ExportHF
    | Offload
    | Onload
    | Shutdown
)

# Replies --------------------------------------------------------------------------------------------------------


class Description(msgspec.Struct, frozen=True, tag=True):
    """The running trainer: world size, layout as ``{"tp": 1, ...}``, parameters of the whole model, optimizer steps."""

    world_size: int
    layout: dict[str, int]
    parameters: int
    dtype: str
    device: str
    steps: int
    pids: list[int]


class TokenValues(msgspec.Struct, frozen=True, tag=True):
    """float32[T] log-probabilities and entropies (nats), 0 where none was asked for; `seconds` of work."""

    logprobs: Array
    entropy: Array
    seconds: float


class UpdateMetrics(msgspec.Struct, frozen=True):
    """One optimizer step. Means are over the trained tokens of all ranks unless said otherwise.

    `loss` is the value that was differentiated (a sum with the weights in it). `kl` is k3 of the policy against the
    old policy, exactly 0 in the first update on fresh log-probabilities; `ratio_max_deviation` is max |ratio - 1|.
    `logprob_abs_diff` is the mean |trainer - engine| over fresh tokens, NaN without any. `skipped` is true when the
    gradient was not finite and the optimizer did not step. `tis_clipped_fraction` of the tokens were beyond the cap,
    `rejected_fraction` in a sequence that was rejected.
    """

    loss: float
    grad_norm: float
    lr: float
    kl: float
    kl_ref: float
    entropy: float
    logprob_abs_diff: float
    logprob_max_diff: float
    ratio_max_deviation: float
    clip_fraction: float
    tis_mean: float
    tis_clipped_fraction: float
    rejected_fraction: float
    trained_tokens: int
    tokens: int
    micro_batches: int
    padding_fraction: float
    skipped: bool


class Trained(msgspec.Struct, frozen=True, tag=True):
    """Result of `Train`: one entry an optimizer step; `steps` counts optimizer steps since the start of the run."""

    updates: list[UpdateMetrics]
    steps: int
    seconds: float


class PublishPlan(msgspec.Struct, frozen=True, tag=True):
    """The buckets that will be written, in order, and the two segments of each host they go to in turn; with `devices`
    they go to the trainer's buffers there instead."""

    version: int
    table: BucketTable
    segments: tuple[tuple[str, str], ...]
    segment_bytes: int
    devices: DeviceBuffers | None = None


class Filled(msgspec.Struct, frozen=True, tag=True):
    """Bucket `index` is written and may be read."""

    index: int
    bucket: Bucket
    seconds: float


class WeightsChecksum(msgspec.Struct, frozen=True, tag=True):
    """`WeightDigest` over all tensors, 32 hex digits. After a publish: bytes that went between hosts for it, and how
    many they would have been without deltas."""

    checksum: str
    network_bytes: int = 0
    network_raw_bytes: int = 0


class CheckpointSaved(msgspec.Struct, frozen=True, tag=True):
    """`nbytes` is 0 while the save goes on in the background."""

    path: str
    nbytes: int
    seconds: float


class CheckpointLoaded(msgspec.Struct, frozen=True, tag=True):
    """`extra` is what the saver gave; `steps` the optimizer steps taken at the time."""

    steps: int
    extra: str
    seconds: float


class Done(msgspec.Struct, frozen=True, tag=True):
    seconds: float


Reply = (
    Description
    | TokenValues
    | Trained
    | PublishPlan
    | Filled
    | WeightsChecksum
    | CheckpointSaved
    | CheckpointLoaded
    | Done
)
