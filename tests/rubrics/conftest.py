"""Hypothesis without a deadline: a busy machine is not a failure."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("rubrics", deadline=None, max_examples=50)
settings.load_profile("rubrics")
