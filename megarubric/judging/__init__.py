"""Judging: prompts, tier scoring, judge models, cache, calibration, agreement, attacks. Needs no GPU library."""
