"""What a trainer rank needs of its device, looked at before it builds anything."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch

from megarubric.config import fp8
from megarubric.config.card import compare
from megarubric.errors import BadInput
from megarubric.megatron.messages import WorkerConfig

log = logging.getLogger(__name__)


def check(config: WorkerConfig) -> None:
    """Refuse a device that the run cannot have; a warning, on rank 0, where it is only another one than planned.

    Raises BadInput.
    """
    if not torch.cuda.is_available():
        if config.card is not None:
            raise BadInput("trainer", "parallel.card", f"is {config.card}, and this rank sees no GPU")
        if config.fp8 != "none":
            raise BadInput("trainer", "fp8", f"{config.fp8} needs a GPU, and this rank has none")
        if config.optimizer_offload:
            raise BadInput("trainer", "optimizer_offload", "the model is in the host's memory already: there is no GPU")
        return
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise BadInput("trainer", "parallel.ranks", f"local rank {local} needs a GPU of its own, this host has {count}")
    found = torch.cuda.get_device_properties(local)
    sm = found.major * 10 + found.minor
    if config.card is not None:
        refused, warned = compare(config.card, found.name, found.total_memory, sm)
        if refused:
            raise BadInput("trainer", "parallel.card", refused)
        if warned and os.environ.get("RANK", "0") == "0":
            log.warning("parallel.card %s", warned)
    if wrong := fp8.refuse(config.fp8, sm, config.dtype, config.fp8_bf16_layers, "this GPU"):
        raise BadInput("trainer", "train.fp8", wrong)
    if config.fp8 != "none" and importlib.util.find_spec("transformer_engine") is None:  # Megatron would train in bf16
        raise BadInput("trainer", "train.fp8", f"{config.fp8} needs Transformer Engine, which is not installed")
