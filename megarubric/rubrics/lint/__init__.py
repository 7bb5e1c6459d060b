"""Lint: what makes a rubric easy to game, hard to judge, or unscorable. Rules are in `rules` (one rubric) and `near`
(the corpus); `RULES` lists every one with its reason and an example."""

from megarubric.rubrics.lint.model import RULES, Finding, Rule
from megarubric.rubrics.lint.near import near_duplicates
from megarubric.rubrics.lint.run import fix_files, lint_paths, lint_rubric
from megarubric.rubrics.lint.weights import absence_share

__all__ = ["RULES", "Finding", "Rule", "absence_share", "fix_files", "lint_paths", "lint_rubric", "near_duplicates"]
