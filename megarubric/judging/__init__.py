"""Judging: prompts, tier scoring, judge models, cache, calibration, agreement, attacks. Works with no GPU library at all."""
