"""Remakes the tiny model from nothing: its texts, tokenizer, training rows, and the quickstart rubrics."""
