"""The controller's side of the trainer: one typed coroutine a command. Imports neither torch nor megatron."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarubric.errors import ProcessDied
from megarubric.exchange.rpc import Client, CurveKeys, Frames, RemoteError, read_array
from megarubric.megatron import messages as m


class TrainerClient:
    """Talks to rank 0 of the trainer. Calls are executed one after the other.

    Every call raises RemoteError with the trainer's one-line reason, and ProcessDied when a rank has ended, which
    `peer_status` or the trainer itself says.
    """

    def __init__(
        self, endpoint: str, keys: CurveKeys | None = None, peer_status: Callable[[], str | None] = lambda: None
    ) -> None:
        self._client = Client(endpoint, m.Reply, keys, peer_status)

    async def describe(self, timeout_s: float | None = None) -> m.Description:
        """Wait until the model is loaded; who answers."""
        reply: m.Description = await self._ask(m.Describe(), timeout_s=timeout_s)
        return reply

    async def logprobs(
        self, batch: m.TrainBatch, which: m.Which = "policy", temperature: float = 1.0
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Log-probabilities and entropies of the batch's tokens, float32[T] each, 0 at first tokens."""
        frames = Frames()
        request = m.Logprobs(m.WireBatch.pack(batch, frames), which, temperature)
        reply, received = await self._call(request, frames)
        return read_array(reply.logprobs, received), read_array(reply.entropy, received)

    async def train(self, batch: m.TrainBatch, loss: m.LossSettings, lr: float) -> m.Trained:
        """One optimizer step for each update of `batch`."""
        frames = Frames()
        reply: m.Trained = await self._ask(m.Train(m.WireBatch.pack(batch, frames), loss, lr), frames)
        return reply

    async def begin_publish(self, version: int) -> m.PublishPlan:
        reply: m.PublishPlan = await self._ask(m.BeginPublish(version))
        return reply

    async def fill_bucket(self, version: int, index: int) -> m.Filled:
        """Have bucket `index` written; says that nobody reads bucket index - 2 any more."""
        reply: m.Filled = await self._ask(m.FillBucket(version, index))
        return reply

    async def end_publish(self, version: int) -> m.WeightsChecksum:
        """The version's checksum and what went between hosts, after its last bucket."""
        reply: m.WeightsChecksum = await self._ask(m.EndPublish(version))
        return reply

    async def publish(self, version: int) -> AsyncIterator[m.Filled]:
        """All buckets in turn; the consumer is done with a bucket when it asks for the one after the next."""
        plan = await self.begin_publish(version)
        for index in range(len(plan.table.buckets)):
            yield await self.fill_bucket(version, index)

    async def checksum(self) -> str:
        """Checksum of the present weights as they would be published."""
        reply: m.WeightsChecksum = await self._ask(m.Checksum())
        return reply.checksum

    async def save(self, path: str, extra: str = "{}", *, background: bool = False) -> m.CheckpointSaved:
        """Save to the new directory `path` with the caller's JSON `extra`; with `background`, `finish_save` makes it a
        checkpoint, or the next save does."""
        reply: m.CheckpointSaved = await self._ask(m.SaveCheckpoint(path, extra, background))
        return reply

    async def finish_save(self, *, wait: bool = True) -> m.CheckpointSaved | None:
        """Finish a save in the background; None when there is none, or, without `wait`, it is not written yet."""
        reply = await self._ask(m.FinishSave(wait))
        return reply if isinstance(reply, m.CheckpointSaved) else None

    async def load(self, path: str) -> m.CheckpointLoaded:
        reply: m.CheckpointLoaded = await self._ask(m.LoadCheckpoint(path))
        return reply

    async def export_hf(self, path: str) -> None:
        """Write the policy as a Hugging Face directory."""
        await self._ask(m.ExportHF(path))

    async def offload(self, parameters: bool = False) -> None:
        """Free the accelerator for the engines: of gradients and optimizer, or of `parameters` as well."""
        await self._ask(m.Offload(parameters))

    async def onload(self) -> None:
        await self._ask(m.Onload())

    async def shutdown(self, timeout_s: float = 30.0) -> None:
        """End all ranks cleanly."""
        await self._ask(m.Shutdown(), timeout_s=timeout_s)

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, body: Any, frames: Frames | None = None, timeout_s: float | None = None) -> Any:
        return (await self._call(body, frames, timeout_s))[0]

    async def _call(
        self, body: Any, frames: Frames | None = None, timeout_s: float | None = None
    ) -> tuple[Any, list[bytes]]:
        try:
            return await self._client.call(body, frames.buffers if frames else (), timeout_s)
        except RemoteError as error:
            kind, _, reason = str(error).partition(": ")
            if kind == ProcessDied.__name__:  # rank 0 said so with its last breath
                raise ProcessDied(reason) from None
            raise
