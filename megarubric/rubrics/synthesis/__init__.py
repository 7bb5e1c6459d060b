"""Rubric synthesis, the part that talks to nobody: drafting prompts, reading drafts, splitting, mending, statistics.

`megarubric.recipe.synthesis` joins it to the models that write and judge.
"""
