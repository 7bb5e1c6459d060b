"""Evaluation: held-out rubric reward before, during and after a run."""
