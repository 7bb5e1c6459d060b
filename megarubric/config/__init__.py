"""Typed run configuration: YAML + dotted overrides, refused at parse time when it cannot run."""

from megarubric.config.load import dump, load_sft, load_train
from megarubric.config.schema import SftConfig, TrainConfig

__all__ = ["SftConfig", "TrainConfig", "dump", "load_sft", "load_train"]
