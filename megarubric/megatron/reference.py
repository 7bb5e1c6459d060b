"""The frozen policy that the KL is measured against: its weights on the host, in the model when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megarubric.megatron.fp8_params import loadable
from megarubric.megatron.optimizer import TrainedModel


class Reference:
    """A copy, on the host, of the weights that the models have when this is made."""

    def __init__(self, models: Iterable[torch.nn.Module]) -> None:
        self._values = [_on_host(loadable(p)) for m in models for p in m.parameters()]

    @contextmanager
    def in_place_of(self, model: TrainedModel) -> Iterator[None]:
        """The reference's weights in `model`, for the duration; the policy's come back bit for bit."""
        parameters = list(model.parameters())
        policy = [] if model.quantised else [_on_host(p) for p in parameters]
        _put(parameters, self._values)
        try:
            yield
        finally:
            if model.quantised:
                model.weights_from_masters()  # what FP8 values stand for does not always quantise to them again
            else:
                _put(parameters, policy)


def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)


def _on_host(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)
