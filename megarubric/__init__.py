"""megarubric: reinforcement learning from rubric rewards (arXiv 2508.12790)."""

__version__ = "0.1.0"
