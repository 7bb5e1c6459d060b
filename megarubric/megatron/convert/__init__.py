"""Conversion between Hugging Face checkpoints and Megatron's distributed ones (docs/checkpoints.md).

The direction is told from the source. Both kinds are read as places of Hugging Face tensors (`dist_files.open_places`),
so one stream of bytes serves both ways and any layout; no model is built and no tensor is held: each process has a
buffer. What is finished is written down, and the same command goes on where a killed one stopped.
"""

from megarubric.megatron.convert.conversion import Converted, convert
from megarubric.megatron.convert.options import Options, Progress
from megarubric.megatron.convert.verify import verify

__all__ = ["Converted", "Options", "Progress", "convert", "verify"]
