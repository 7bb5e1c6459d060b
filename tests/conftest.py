"""Settings shared by all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No per-example deadline: shared machines make time meaningless as a verdict.
settings.register_profile("megarubric", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megarubric")

# Several processes share the cores; tests that start engines say how many threads those get.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
