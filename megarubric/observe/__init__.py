"""Metrics, tables and files of a run."""
