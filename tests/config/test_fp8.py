"""FP8 recipes: what a card, a model and a layout can have, and with which sentence the rest is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megarubric.config import fp8, load_train
from megarubric.config.layout import ParallelLayout
from megarubric.errors import BadInput

GPU = ["model.dtype=bfloat16", "parallel.card=h100"]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: t\nmodel: {path: m}\ndata: {train: d.jsonl}\n")
    return path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.fp8=current"], "train.fp8: current needs a GPU, and parallel.card names none"),
        ([*GPU, "parallel.card=a100", "train.fp8=current"], "needs an sm_89 card or newer, parallel.card is sm_80"),
        ([*GPU, "train.fp8=mxfp8"], "needs an sm_100 card or newer, parallel.card is sm_90"),
        ([*GPU, "parallel.card=b200", "train.fp8=blockwise"], "blockwise is for sm_90 cards"),
        (["parallel.card=h100", "train.fp8=blockwise"], "needs model.dtype bfloat16, is float32"),
        ([*GPU, "train.fp8=delayed"], "fp8_bf16_layers must be 0"),
        ([*GPU, "train.fp8_bf16_layers=-1"], "must not be negative"),
        ([*GPU, "train.fp8=int8"], "train.fp8"),
        ([*GPU, "train.fp8_parameters=true"], "train.fp8_parameters: needs a recipe to quantise the weights by"),
        (
            [*GPU, "train.fp8_parameters=true", "train.fp8=delayed", "train.fp8_bf16_layers=0"],
            "train.fp8_parameters: delayed scaling would quantise the same masters otherwise after a restart",
        ),
        (
            [*GPU, "train.fp8_parameters=true", "train.fp8=current", "train.optimizer_offload=true"],
            "train.fp8_parameters: the optimizer on the host writes bf16 weights only",
        ),
    ],
)
def test_refused_while_parsing(minimal: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_train(minimal, overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("card", "recipe", "layers"), [("h100", "blockwise", 1), ("h200", "delayed", 0), ("b200", "mxfp8", 2)]
)
def test_what_can_run_parses(minimal: Path, card: str, recipe: str, layers: int) -> None:
    overrides = [f"parallel.card={card}", f"train.fp8={recipe}", f"train.fp8_bf16_layers={layers}"]
    train = load_train(minimal, ["model.dtype=bfloat16", *overrides]).train
    assert (train.fp8, train.fp8_bf16_layers) == (recipe, layers)


@pytest.mark.parametrize(("card", "recipe"), [("h100", "current"), ("h100", "blockwise"), ("b200", "mxfp8")])
def test_fp8_parameters_parse(minimal: Path, card: str, recipe: str) -> None:
    overrides = ["model.dtype=bfloat16", f"parallel.card={card}", f"train.fp8={recipe}", "train.fp8_parameters=true"]
    assert load_train(minimal, overrides).train.fp8_parameters


def test_bytes_of_a_weight_in_fp8() -> None:
    rows, columns = 4096, 2048
    n = rows * columns
    assert fp8.bytes_per_weight("current", 90) * n == 2 * n  # and its transpose
    assert fp8.bytes_per_weight("current", 100) * n == n
    assert fp8.bytes_per_weight("blockwise", 90) * n == 2 * (n + 4 * (rows // 128) * (columns // 128))
    assert fp8.bytes_per_weight("mxfp8", 100) * n == 2 * n + rows * (columns // 32) + columns * (rows // 32)
    assert fp8.bytes_per_weight("none", 90) == 0


def test_model_sides_must_fit() -> None:
    hf = {"hidden_size": 2048, "num_attention_heads": 32, "head_dim": 128, "moe_intermediate_size": 768}
    for recipe in fp8.RECIPES:
        assert fp8.refuse_model(recipe, hf, ParallelLayout(tp=4, etp=2)) is None
    words = fp8.refuse_model("mxfp8", hf, ParallelLayout(etp=32))
    assert words == "mxfp8: moe_intermediate_size / etp is 24, needs a multiple of 32"
    assert "hidden_size is 1000" in (fp8.refuse_model("current", hf | {"hidden_size": 1000}, ParallelLayout()) or "")


@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_every_rank_gets_an_aligned_number_of_tokens(recipe: fp8.Recipe) -> None:
    for tp in (1, 2, 4, 6):
        for cp in (1, 2, 3):
            n = fp8.token_multiple(recipe, ParallelLayout(tp=tp, cp=cp))
            assert n % cp == 0
            assert (n // cp) % fp8.alignment(recipe) == 0 and (n // cp) % tp == 0
            assert n // cp == math.lcm(tp, fp8.alignment(recipe))
