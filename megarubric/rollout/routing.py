"""Which experts the engine sent each token to: captured where vLLM does not return it by itself.

vLLM returns routed experts with its second model runner, which needs Triton; its CPU build has the first one only.
There `CpuRoutingCapture` reads the routers' choices layer by layer and knows from the runner's batch whose they are.
Tokens that a request took from the prefix cache were routed for another request: their rows are found by the tokens of
their block and of all blocks before it, which is what the cache itself goes by.

Arrays are uint8 or uint16 [tokens, layers, experts a token]; a dtype's largest number marks a token without a record.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarubric.exchange.vllm_backend import WorkerExtension

Rows = NDArray[np.unsignedinteger[Any]]


def routing_dtype(n_experts: int) -> np.dtype[Any]:
    """The narrowest dtype that holds every expert and the mark."""
    return np.dtype(np.uint8 if n_experts < 256 else np.uint16)


def unrecorded(n: int, layers: int, topk: int, dtype: np.dtype[Any]) -> Rows:
    """`n` tokens without a record."""
    return np.full((n, layers, topk), np.iinfo(dtype).max, dtype)


class RoutingWorkerExtension(WorkerExtension):
    """A vLLM worker that can also tell where tokens went."""

    def start_routing_capture(self) -> None:
        """From now on, keep the routing of every request until it is taken."""
        self._routing_capture = CpuRoutingCapture(self.model_runner)  # type: ignore[attr-defined]

    def take_routing(self, request_id: str) -> Rows | None:
        """The routing of a request's tokens that were read, [n, L, K], and forget it; None for an unknown request."""
        return self._routing_capture.take(request_id)

    def forget_routing(self) -> None:
        """Forget the blocks: the prefix cache was reset."""
        self._routing_capture.blocks.clear()


class CpuRoutingCapture:
    """Sits on a model runner and its routers."""

    def __init__(self, runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        config = runner.model_config
        self.layers, self.topk = config.get_total_num_hidden_layers(), config.get_num_experts_per_tok()
        self.dtype = routing_dtype(config.get_num_experts())
        self.runner = runner
        self.block = runner.cache_config.block_size
        self.blocks: OrderedDict[bytes, Rows] = OrderedDict()
        self.most_blocks = 2 * (runner.cache_config.num_gpu_blocks or 4096)
        self.requests: dict[str, list[tuple[int, Rows]]] = {}
        self._step: dict[int, NDArray[Any]] = {}
        for module in runner.get_model().modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self._capture, module.layer_id))
        self._execute = runner.execute_model
        runner.execute_model = self._execute_and_record

    def take(self, request_id: str) -> Rows | None:
        """See `RoutingWorkerExtension.take_routing`."""
        parts = self.requests.pop(request_id, None)
        if parts is None:
            return None
        out = unrecorded(max(start + len(rows) for start, rows in parts), self.layers, self.topk, self.dtype)
        for start, rows in parts:
            out[start : start + len(rows)] = rows
        return out

    def _capture(self, layer: int, topk_ids: Any) -> None:
        self._step[layer] = topk_ids.to("cpu").numpy().astype(self.dtype)

    def _execute_and_record(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._step = {}
        for request_id in scheduler_output.finished_req_ids:
            self.requests.pop(request_id, None)  # ended without being taken: a judgement, an aborted request
        result = self._execute(scheduler_output, *args, **kwargs)
        if self._step:
            self._record(scheduler_output.num_scheduled_tokens)
        return result

    def _record(self, scheduled: dict[str, int]) -> None:
        """Share this step's rows out to the requests, in the order of the runner's batch."""
        batch = self.runner.input_batch
        total = sum(scheduled.values())
        rows = np.zeros((total, self.layers, self.topk), self.dtype)
        for layer, ids in self._step.items():
            rows[:, layer] = ids[:total]
        offset, fresh = 0, []
        for index, request_id in enumerate(batch.req_ids):
            n, start = scheduled[request_id], int(batch.num_computed_tokens_cpu[index])
            parts = self.requests.get(request_id)
            if parts is None:
                parts = self.requests[request_id] = []
                fresh.append((index, parts, start))
            parts.append((start, rows[offset : offset + n]))
            self._keep_blocks(batch.token_ids_cpu[index], start, rows[offset : offset + n])
            offset += n
        for index, parts, cached in fresh:  # after all blocks of this step are kept: one may be another's prefix
            self._find_blocks(batch.token_ids_cpu[index], cached, parts)

    def _keep_blocks(self, tokens: NDArray[Any], start: int, rows: Rows) -> None:
        """Keep the blocks that lie in these rows as a whole."""
        first, last = -(-start // self.block), (start + len(rows)) // self.block
        for number, key in enumerate(self._keys(tokens, last)):
            if number >= first:
                at = number * self.block - start
                self.blocks[key] = rows[at : at + self.block]
                self.blocks.move_to_end(key)
        while len(self.blocks) > self.most_blocks:
            self.blocks.popitem(last=False)

    def _find_blocks(self, tokens: NDArray[Any], cached: int, parts: list[tuple[int, Rows]]) -> None:
        for number, key in enumerate(self._keys(tokens, -(-cached // self.block))):
            rows = self.blocks.get(key)
            if rows is not None:
                start = number * self.block
                parts.insert(
                    0, (start, rows[: cached - start])
                )  # what the request computed itself comes later, and wins

    def _keys(self, tokens: NDArray[Any], n_blocks: int) -> list[bytes]:
        """A digest for each of the first blocks, of its tokens and all before."""
        digest, keys = hashlib.blake2b(digest_size=16), []
        for number in range(n_blocks):
            digest.update(np.ascontiguousarray(tokens[number * self.block : (number + 1) * self.block]).tobytes())
            keys.append(digest.copy().digest())
        return keys
