"""The reference tables of the rubric documentation, from the code: lint rules and check kinds, as Markdown.

python tools/rubric_reference.py > docs/rubric_reference.md
"""

from __future__ import annotations

import inspect

import msgspec

from megarubric.rubrics.checks import KINDS
from megarubric.rubrics.lint import RULES


def lint_rules() -> str:
    """A section a rule: reason, example, whether --fix mends it."""
    parts = ["## Lint rules", ""]
    for rule in sorted(RULES.values()):
        fix = " `--fix` mends it." if rule.fixable else ""
        parts += [f"### `{rule.id}`", "", f"{rule.reason}{fix}", "", "```yaml", rule.example, "```", ""]
    return "\n".join(parts)


def arguments(kind: str) -> str:
    """The arguments of a check kind, defaults shown."""
    out = []
    for field in msgspec.structs.fields(KINDS[kind].args):
        plain = field.required or field.default is None
        out.append(f"`{field.name}`" if plain else f"`{field.name}` ({field.default!r})")
    return ", ".join(out) or "none"


def check_kinds() -> str:
    """One row a kind."""
    rows = ["## Check kinds", "", "| kind | arguments | value 1 when |", "| --- | --- | --- |"]
    for name in sorted(KINDS):
        says = " ".join((inspect.getdoc(KINDS[name].follows) or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {arguments(name)} | {says} |")
    return "\n".join([*rows, ""])


if __name__ == "__main__":
    print(f"# Rubric reference\n\nMade by `tools/rubric_reference.py`.\n\n{check_kinds()}\n{lint_rules()}")
