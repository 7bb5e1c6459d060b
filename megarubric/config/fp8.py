"""FP8 training with Transformer Engine: recipes, what stays in bf16, and what has to be aligned.

Matrix products of attention and MLP linears run in FP8; parameters stay bf16 with float32 masters. Router (float32),
norms, embedding, head and attention's own products are not quantised, nor are the linears of the first and last layers
(`bf16_layers` each). Tokens are padded so that every product has a multiple of `alignment` rows: packing pads a
micro-batch as a whole, and the router pads each expert's tokens.

These are the rules a configuration is checked by; `megarubric.megatron.model` turns a recipe into Megatron's settings.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from megarubric.config.layout import ParallelLayout

Recipe = Literal["none", "delayed", "current", "blockwise", "mxfp8"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)

# The rows a recipe's products need (megatron.core.fp8_utils), and the first architecture that has it.
_ALIGNMENT = {"none": 1, "delayed": 16, "current": 16, "blockwise": 16, "mxfp8": 32}
_SM = {"delayed": 89, "current": 89, "blockwise": 90, "mxfp8": 100}
_ONLY_SM = {"blockwise": 90}  # Blackwell emulates block scaling by MXFP8, whose scales differ: ask for mxfp8 there


def refuse(recipe: Recipe, sm: int | None, dtype: str, bf16_layers: int, card: str = "parallel.card") -> str | None:
    """Why a card of architecture `sm` (90: Hopper; None: a CPU) cannot train so, or None. `card` names it."""
    if recipe == "none":
        return None
    if sm is None:
        return f"{recipe} needs a GPU, and parallel.card names none"
    if sm < _SM[recipe]:
        return f"{recipe} needs an sm_{_SM[recipe]} card or newer, {card} is sm_{sm}"
    if recipe in _ONLY_SM and sm != _ONLY_SM[recipe]:
        return f"{recipe} is for sm_{_ONLY_SM[recipe]} cards, {card} is sm_{sm}: use mxfp8"
    if dtype != "bfloat16":
        return f"{recipe} needs model.dtype bfloat16, is {dtype}"
    if recipe == "delayed" and bf16_layers:
        return "delayed scaling keeps one state for all layers: fp8_bf16_layers must be 0"
    return None


def refuse_parameters(recipe: Recipe, optimizer_offload: bool) -> str | None:
    """Why weights cannot be kept in FP8, or None.

    The first and the last are Megatron's rules (it takes FP8 weights with an optimizer on the host only by delayed
    scaling); it would take the second.
    """
    if recipe == "none":
        return "needs a recipe to quantise the weights by (train.fp8)"
    if recipe == "delayed":
        return "delayed scaling would quantise the same masters otherwise after a restart: use current scaling"
    if optimizer_offload:
        return "the optimizer on the host writes bf16 weights only: train.optimizer_offload must be false"
    return None


def bytes_per_weight(recipe: Recipe, sm: int) -> float:
    """Device bytes of a weight in FP8: its value, the transpose or the second set of scales that the backward product
    needs, and scales. Tensor cores before sm_100 multiply FP8 matrices in one orientation only."""
    if recipe == "current" or recipe == "delayed":
        return 1 if sm >= 100 else 2  # one scale a matrix
    if recipe == "blockwise":
        return 2 * (1 + 4 / 128**2)  # float32 a block of 128 x 128
    if recipe == "mxfp8":
        return 2 * (1 + 1 / 32)  # a byte for 32 values in a row, and in a column
    return 0


def alignment(recipe: Recipe) -> int:
    """Rows a matrix product must have a multiple of."""
    return _ALIGNMENT[recipe]


def token_multiple(recipe: Recipe, layout: ParallelLayout) -> int:
    """What a packed micro-batch is padded to: each context-parallel rank's tokens are a multiple of the alignment, and
    divide among the tensor-parallel ranks."""
    return layout.cp * math.lcm(layout.tp, _ALIGNMENT[recipe])


def refuse_model(recipe: Recipe, hf: dict[str, Any], layout: ParallelLayout) -> str | None:
    """The first matrix of the model, cut by `layout`, whose sides do not fit the recipe, or None."""
    n = _ALIGNMENT[recipe]
    head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    sides = {
        "hidden_size": hf["hidden_size"],
        "num_attention_heads * head_dim / tp": hf["num_attention_heads"] * head // layout.tp,
        "moe_intermediate_size / etp": hf.get("moe_intermediate_size", 0) // layout.etp,
    }
    for name, size in sides.items():
        if size % n:
            return f"{recipe}: {name} is {size}, needs a multiple of {n}"
    return None
