"""A small run of tools/fuzz_rubrics.py: mutated files give rubrics or one line, never a traceback."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megarubric.errors import BadInput
from megarubric.rubrics import parse_rubric
from megarubric.rubrics.load import _json
from megarubric.rubrics.yaml_reader import YamlProblem, documents

TOOL = Path(__file__).parents[2] / "tools" / "fuzz_rubrics.py"
spec = importlib.util.spec_from_file_location("fuzz_rubrics", TOOL)
assert spec is not None and spec.loader is not None
fuzzer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzzer)


def test_mutated_files() -> None:
    outcomes, failures = fuzzer.fuzz(1500, seed=1)
    assert failures == []
    for suffix in (".json", ".jsonl", ".yaml"):  # both ends are reached: some mutations leave a valid rubric
        assert outcomes[f"{suffix} rubric"] > 10 and outcomes[f"{suffix} error"] > 100


def test_the_fuzzer_sees_failures(monkeypatch) -> None:
    def broken(path: Path) -> None:
        raise KeyError("x")

    monkeypatch.setattr(fuzzer, "load_rubrics", broken)
    _, failures = fuzzer.fuzz(3, seed=1)
    assert len(failures) == 3 and "KeyError" in failures[0]


@given(st.text(max_size=300))
def test_any_text_as_yaml(text: str) -> None:
    try:
        for data, lines in documents(text):
            assert isinstance(lines, dict)
            parse_rubric(data, "f", None, lines)
    except (YamlProblem, BadInput) as error:
        assert "\n" not in str(error)


@given(st.text(max_size=300))
def test_any_text_as_json(text: str) -> None:
    try:
        parse_rubric(_json(Path("f"), "line 1", text), "f", "line 1")
    except BadInput as error:
        assert "\n" not in str(error)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
KEYS = st.sampled_from(
    [
        "id",
        "criteria",
        "check",
        "kind",
        "tiers",
        "value",
        "text",
        "veto",
        "pairs",
        "prompt",
        "weight",
        "scope",
        "version",
    ]
)


@given(TREES | st.dictionaries(KEYS, TREES | st.dictionaries(KEYS, TREES), max_size=6))
def test_any_tree(tree: object) -> None:
    try:
        parse_rubric(tree, "f")
    except BadInput as error:
        assert "\n" not in str(error)
