"""One trainer rank: builds the policy, and answers log-probability, training, publishing and checkpoint calls.

All ranks make the same calls with the same arguments. What a call returns is complete on every rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megarubric.config import fp8
from megarubric.errors import MegarubricError
from megarubric.exchange.device_sender import DeviceSender
from megarubric.exchange.publisher import Publisher
from megarubric.exchange.rpc import CurveKeys
from megarubric.exchange.sender import Sender
from megarubric.megatron import cpu

cpu.ensure()  # before the megatron imports below

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from megarubric.megatron import checkpoint, device, parallel, weights  # noqa: E402
from megarubric.megatron.checks import check_batch  # noqa: E402
from megarubric.megatron.families import family_of, read_config  # noqa: E402
from megarubric.megatron.logprob import token_logprobs  # noqa: E402
from megarubric.megatron.loss import LossSums, TokenInputs, policy_loss  # noqa: E402
from megarubric.megatron.messages import LossSettings, TrainBatch, UpdateMetrics, Which, WorkerConfig  # noqa: E402
from megarubric.megatron.model import Recompute, build_model, fp8_fields  # noqa: E402
from megarubric.megatron.optimizer import AdamSettings, TrainedModel  # noqa: E402
from megarubric.megatron.packing import MicroBatch, PackSettings, pack, plan  # noqa: E402
from megarubric.megatron.pieces import model_pieces  # noqa: E402
from megarubric.megatron.reference import Reference  # noqa: E402
from megarubric.megatron.replay import RoutingReplay  # noqa: E402
from megarubric.megatron.residence import Residence  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NoReference(MegarubricError):
    """The reference was asked for and there is none."""


@dataclass(frozen=True)
class _Work:
    """A micro-batch on the device.

    input_ids, position_ids int64[1, P']: this rank's positions (all P without context parallelism). rows int64[n]:
    which of them have a prediction that is wanted; tokens int64[n]: the batch index of what they predict, -1 for the
    one row of a rank from which nothing is wanted. routing int64[P', L, K], -1 without a record.
    """

    packed: MicroBatch
    tokens: NDArray[np.int64]
    rows: Tensor
    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    params: Any
    inputs: TokenInputs | None
    routing: Tensor | None


class Trainer:
    """See the module. Making one joins torch.distributed (RANK, WORLD_SIZE, ... from the environment)."""

    def __init__(self, config: WorkerConfig, keys: CurveKeys | None = None) -> None:
        """Build the model and load its weights; `keys`, the run's, are needed on several hosts. Raises BadInput for a
        layout, config or checkpoint that cannot run."""
        device.check(config)
        torch.set_num_threads(config.threads)
        self.config = config
        self.layout = parallel.ParallelLayout(
            tp=config.tp, pp=config.pp, vpp=config.vpp, ep=config.ep, etp=config.etp, cp=config.cp
        )
        self.hf, where = read_config(config.model_dir)
        self.family = family_of(self.hf, where)
        self.dtype = DTYPES[config.dtype]
        parallel.initialize(self.layout, seed=config.seed, timeout_s=config.timeout_s)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else cpu.CPU
        # Commands and statistics go over gloo on the host on any machine, apart from the model's collectives.
        self.control = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_s))

        quantised = fp8_fields(config.fp8, config.fp8_bf16_layers, config.fp8_parameters)
        recompute: Recompute = "full" if config.recompute else "none"
        models = build_model(self.hf, self.layout, dtype=self.dtype, recompute=recompute, **quantised)
        if config.init == "load":
            weights.load_hf(models, config.model_dir, self.layout)
        else:
            weights.init_weights(models, self.hf, self.layout, config.seed)
        adam = AdamSettings(
            config.beta1, config.beta2, config.eps, config.weight_decay, config.grad_clip, config.optimizer_offload
        )
        self._reference = Reference(models) if config.reference else None
        self.model = TrainedModel(models, self.dtype, adam)
        self.replay = RoutingReplay(self.model.chunks, recompute=config.recompute)
        self.pieces = model_pieces(self.model.chunks, self.hf, self.layout)
        self.manifest = self.family.manifest(self.hf)
        self.residence = Residence(self.model, self.device)
        self.steps = 0
        self._saving: checkpoint.Save | None = None

        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.packing = PackSettings(
            budget=config.micro_batch_tokens * config.cp,
            dp=parallel_state.get_data_parallel_world_size(),
            micro_batch_multiple=config.pp if config.vpp else 1,
            sequence_multiple=2 * config.cp if config.cp > 1 else 1,
            total_multiple=fp8.token_multiple(config.fp8, self.layout),
        )
        # One tensor-parallel rank of the last stage speaks for its data: each token's values are reported once.
        self._reports = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        self.sender = self._make_sender(keys)

    def _make_sender(self, keys: CurveKeys | None) -> Publisher:
        config = self.config
        if config.exchange_through == "device":
            return DeviceSender(
                self.manifest,
                self.dtype,
                self.pieces,
                group=self.control,
                device=self.device,
                name=config.shm_prefix,
                bucket_bytes=config.bucket_bytes,
            )
        return Sender(
            self.manifest,
            self.dtype,
            self.pieces,
            group=self.control,
            shm_prefix=config.shm_prefix,
            bucket_bytes=config.bucket_bytes,
            hosts=config.hosts,
            keys=keys,
            address=os.environ.get("MEGARUBRIC_ADDRESS", "127.0.0.1"),
            delta=config.exchange_delta,
            timeout_s=config.timeout_s,
        )

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model, vocabulary padding not counted."""
        return sum(int(np.prod(shape)) for shape in self.manifest.values())

    # Log-probabilities and training --------------------------------------------------------------------------------

    def logprobs(
        self, batch: TrainBatch, which: Which = "policy", temperature: float = 1.0
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Log-probability and entropy of the tokens, float32[T] each: those of `loss_mask`, all without one, else 0.

        The forward is the one `train` makes, on the same micro-batches, so what it returns for the policy equals what
        `train` finds bit for bit, given the same `loss_mask`. The first token of a sequence has 0: nothing predicts it.
        Raises BadBatch for tokens outside the vocabulary, NoReference without a reference.
        """
        check_batch(batch, self.family, self.hf)
        if which == "reference":
            if self._reference is None:
                raise NoReference("this trainer keeps no reference: start it with reference = true")
            with self._reference.in_place_of(self.model):
                return self._logprobs(batch, temperature)
        return self._logprobs(batch, temperature)

    def _logprobs(self, batch: TrainBatch, temperature: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        out = np.zeros((2, len(batch.tokens)), dtype=np.float32)
        settings = LossSettings(temperature=temperature)
        for update in plan(batch.lengths, batch.updates, self.packing):
            work = [self._prepare(batch, rows, None) for rows in update[self.dp_rank]]
            for done, values in zip(work, self._run(work, settings, train=False)):
                self._scatter(done, values, out)
        total = torch.from_numpy(out)
        dist.all_reduce(total, group=self.control)  # each token from exactly one rank, zeros from the others
        return out[0], out[1]

    def train(self, batch: TrainBatch, settings: LossSettings, lr: float) -> list[UpdateMetrics]:
        """One optimizer step for each update of `batch`; the metrics of each.

        A batch with several updates and no `old_logprobs` gets those of the policy before the first. Raises BadBatch.
        """
        check_batch(batch, self.family, self.hf, settings)
        old = batch.old_logprobs
        if old is None and batch.n_updates > 1:
            old = self._logprobs(batch, settings.temperature)[0]
        metrics = []
        for update in plan(batch.lengths, batch.updates, self.packing):
            work = [self._prepare(batch, rows, self._inputs(batch, old)) for rows in update[self.dp_rank]]
            self.model.zero_grad()
            sums = self._run(work, settings, train=True)
            norm, stepped = self.model.step(lr)
            self.steps += int(stepped)
            metrics.append(self._metrics(sums, work, norm, lr, stepped))
        return metrics

    def _run(self, work: Sequence[_Work], settings: LossSettings, *, train: bool) -> list[Tensor]:
        """Forward (and backward) of the micro-batches through Megatron's pipeline schedule.

        On the last stage a tensor a micro-batch: `LossSums.vector` when training, else float32[2, P] log-probabilities
        and entropies. Nothing on other stages.
        """
        vocab_size = self.hf["vocab_size"]
        group = parallel_state.get_tensor_model_parallel_group()
        number = {id(chunk): k for k, chunk in enumerate(self.model.chunks)}

        def step(iterator: Iterator[_Work], model: torch.nn.Module) -> tuple[Tensor, Any]:
            item = next(iterator)
            self.replay.feed(number[id(model)], item.routing, train=train)

            def finish(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                values = token_logprobs(
                    logits,
                    item.targets,
                    vocab_size=vocab_size,
                    temperature=settings.temperature,
                    vocab_start=group.rank() * logits.shape[1],
                    group=group,
                    reuse_logits=train,
                )
                tokens = torch.zeros((), dtype=torch.int, device=logits.device)
                if not train:
                    return values[0].sum(), tokens, torch.stack(values)
                assert item.inputs is not None
                loss, sums = policy_loss(*values, item.inputs, settings, self._context_sum)
                return loss, tokens, sums.vector()

            output = model(
                item.input_ids,
                item.position_ids,
                attention_mask=None,
                packed_seq_params=item.params,
                output_processor=partial(_head, rows=item.rows),
            )
            return output, finish

        n_chunks = len(self.model.chunks)
        self.replay.clear()
        with torch.set_grad_enabled(train):
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(work) for _ in range(n_chunks)] if n_chunks > 1 else iter(work),
                model=self.model.chunks,
                num_microbatches=len(work),
                seq_length=max(item.input_ids.shape[1] for item in work),
                micro_batch_size=1,
                forward_only=not train,
            )

    def _context_sum(self, sums: Tensor) -> Tensor:
        """Per-sequence sums over the context-parallel ranks that share the sequences."""
        if self.layout.cp > 1:
            dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        return sums

    def _prepare(self, batch: TrainBatch, rows: NDArray[np.int64], inputs: dict[str, Any] | None) -> _Work:
        packed = pack(rows, batch.tokens, batch.lengths, self.packing)
        here = packed.context_slice(self.layout.cp, parallel_state.get_context_parallel_rank())
        wanted = packed.token_index >= 0
        if batch.loss_mask is not None:
            wanted &= packed.gather(batch.loss_mask) > 0
        at = np.flatnonzero(wanted[here])
        if not len(at):
            at = np.zeros(1, dtype=np.int64)  # an unwanted position, masked out: no kernel has to cope with no rows
        scored = here[at]
        tokens = np.where(wanted[scored], packed.token_index[scored], -1)

        def device(values: NDArray[Any], where: NDArray[np.int64] = scored) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values[where])).to(self.device)

        token_inputs = None
        if inputs is not None:
            fields: dict[str, Any] = {k: None if v is None else device(packed.gather(v)) for k, v in inputs.items()}
            token_inputs = TokenInputs(segment=device(packed.segment), n_sequences=len(rows), **fields)
        return _Work(
            packed=packed,
            tokens=tokens,
            rows=torch.from_numpy(at).to(self.device),
            input_ids=device(packed.input_ids, here)[None],
            position_ids=device(packed.position_ids, here)[None],
            targets=device(packed.targets),
            params=packed.packed_seq_params(self.device),
            inputs=token_inputs,
            routing=self._routing(batch, packed.input_index[here]),
        )

    def _routing(self, batch: TrainBatch, at: NDArray[np.int64]) -> Tensor | None:
        """The record of the input tokens at the flat batch indices `at` (-1: padding)."""
        if batch.routing is None:
            return None
        none = np.iinfo(batch.routing.dtype).max
        rows = np.where(at[:, None, None] >= 0, batch.routing[at], none).astype(np.int64)
        rows[rows[:, 0, 0] == none] = -1
        return torch.from_numpy(rows).to(self.device)

    @staticmethod
    def _inputs(batch: TrainBatch, old: NDArray[np.float32] | None) -> dict[str, Any]:
        return {
            "mask": batch.loss_mask,
            "weights": batch.weights,
            "advantages": batch.advantages,
            "old": old,
            "rollout": batch.rollout_logprobs,
            "ref": batch.ref_logprobs,
            "fresh": batch.fresh,
        }

    def _scatter(self, work: _Work, values: Tensor, out: NDArray[np.float32]) -> None:
        if not self._reports:
            return
        valid = work.tokens >= 0
        out[:, work.tokens[valid]] = values.float().cpu().numpy()[:, valid]

    def _metrics(
        self, sums: Sequence[Tensor], work: Sequence[_Work], norm: float, lr: float, stepped: bool
    ) -> UpdateMetrics:
        names = LossSums.names()
        is_max = torch.tensor([name.startswith("max_") for name in names])
        local = torch.zeros(len(names), dtype=torch.float64)
        if self._reports:
            stacked = torch.stack(list(sums)).cpu()
            local = torch.where(is_max, stacked.amax(0), stacked.sum(0))
        counts = torch.zeros(2, dtype=torch.float64)
        if self._reports:
            counts[0] = sum(item.packed.real_tokens for item in work) / self.layout.cp
            counts[1] = sum(item.packed.size for item in work) / self.layout.cp
        added = torch.cat([local, counts])
        largest = local.clone()
        dist.all_reduce(added, group=self.control)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        value = dict(zip(names, torch.where(is_max, largest, added[:-2]).tolist()))
        tokens, positions = added[-2:].tolist()
        n = max(value["tokens"], 1.0)
        return UpdateMetrics(
            loss=value["loss"],
            grad_norm=norm,
            lr=lr,
            kl=value["kl"] / n,
            kl_ref=value["kl_ref"] / n,
            entropy=value["entropy"] / n,
            logprob_abs_diff=value["logprob_abs_diff"] / value["fresh"] if value["fresh"] else math.nan,
            logprob_max_diff=value["max_logprob_diff"],
            ratio_max_deviation=value["max_ratio_deviation"],
            clip_fraction=value["clipped"] / n,
            tis_mean=value["tis"] / n,
            tis_clipped_fraction=value["tis_clipped"] / n,
            rejected_fraction=value["rejected"] / n,
            trained_tokens=round(value["tokens"]),
            tokens=round(tokens),
            micro_batches=len(work),
            padding_fraction=1.0 - tokens / max(positions, 1.0),
            skipped=not stepped,
        )

    # Weights and state -----------------------------------------------------------------------------------------------

    def save(self, path: str, extra: str) -> int:
        """Write a checkpoint directory; its size in bytes. See `checkpoint.save`. One in the background ends first."""
        self.finish_save(wait=True)
        return checkpoint.save(self, Path(path), extra)

    def begin_save(self, path: str, extra: str) -> None:
        """Start a checkpoint of the present state in the background, one at a time. See `checkpoint.begin`."""
        self.finish_save(wait=True)
        self._saving = checkpoint.begin(self, Path(path), extra)

    def finish_save(self, *, wait: bool) -> tuple[str, int] | None:
        """Finish the save in the background: its path and bytes. None when there is none, or, without `wait`, when a
        rank still writes. Raises BadInput when it could not be written."""
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        nbytes = checkpoint.finish(self, saving, wait=wait)
        if nbytes is None:
            self._saving = saving
            return None
        return str(saving.path), nbytes

    def load(self, path: str) -> str:
        """Restore a checkpoint; returns the saver's `extra`. See `checkpoint.load`."""
        self.finish_save(wait=True)
        return checkpoint.load(self, Path(path))

    def export_hf(self, path: str) -> None:
        """Write the policy as a Hugging Face directory, with the tokenizer files of the model it came from."""
        weights.export_hf(self.model.chunks, path, self.hf, self.layout, carry_from=self.config.model_dir)

    def offload(self, parameters: bool = False) -> None:
        """Leave the device to engines; see `Residence.offload`."""
        self.residence.offload(parameters)

    def onload(self) -> None:
        """Undo `offload`."""
        self.residence.onload()

    def close(self) -> None:
        self.sender.close()
        if not self.residence.suspended:  # what is suspended cannot be destroyed, and ends with the process
            parallel.shutdown()


def _head(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, rows: Tensor, **_: Any) -> Tensor:
    """Logits [n, V_local] of the positions `rows` of hidden states [P, 1, H]: prompt tokens cost no vocabulary.

    Under sequence parallelism a rank has a share of the positions, and the layer itself gathers them: choose after it.
    """
    if output_layer.sequence_parallel:
        logits, _ = output_layer(hidden_states, weight=output_weight)
        return logits.squeeze(1).index_select(0, rows)
    logits, _ = output_layer(hidden_states.index_select(0, rows), weight=output_weight)
    return logits.squeeze(1)
