"""Rewards from criterion scores: the reference, the compiled ops, group advantages, attribution."""
