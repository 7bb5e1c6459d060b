"""Memory of the trainer's ranks by arithmetic, from a Hugging Face config and a layout: for `train --dry-run`.

What lives for the whole run: parameters, gradients (a float32 buffer), the optimizer's state (shared out over the data-
parallel ranks by the distributed optimizer), and what the micro-batches in flight keep for their backward pass.
Parameters are counted exactly, stage by stage (tests/megatron/test_memory.py compares with Megatron's own modules on
the meta device, at the shipped configurations' full size). Activations are counted in tensors a token: for the modules
used without Transformer Engine they are what autograd was seen to keep; for Transformer Engine's they follow from what
its fused modules save, and have not been measured. CUDA context, NCCL and fragmentation come on top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from megarubric.config import fp8
from megarubric.config.schema import Parallel, Train
from megarubric.megatron.families import Family, ParamSource, family_of

Kernels = Literal["local", "transformer_engine"]
_PRODUCT = re.compile(r"linear_(?:qkv|proj|fc1|fc2)\.weight$")
LOGPROB_CHUNKS = 3 * (4 << 22)  # bytes: the float32 chunks of megatron.logprob
WIDTH = {"float32": 4, "bfloat16": 2}
MASTER = {"float32": 8, "bfloat16": 12}  # Adam's two moments, and the float32 copy of 16-bit parameters


class Kept(msgspec.Struct, frozen=True):
    """Values (of the model's dtype unless said otherwise) that one layer keeps for backward, for each token, as
    multiples of: the hidden size, the query and key-value widths, an expert's input and intermediate size for each of
    the token's experts, the head size; and bytes for each expert of the layer, each choice, each head.

    A dense MLP counts as one expert that every token chooses.
    """

    hidden: float
    query: float
    key_value: float
    expert_input: float
    expert_width: float
    head_dim: float
    around: float  # of the hidden size, outside the layers: the embedding's output, the final norm
    expert_bytes: float = 8  # router logits and probabilities, float32
    choice_bytes: float = 24
    head_bytes: float = 8


# Local modules: fitted to what autograd keeps, exact in each term. In bf16 the norms keep float32 copies.
KEPT: dict[tuple[Kernels, str], Kept] = {
    ("local", "float32"): Kept(6, 8, 3, 1, 6, 4, 3),
    ("local", "bfloat16"): Kept(10, 9, 4, 1, 6, 4, 5),
    # Inputs and outputs of two norms, the residual stream being shared; q, k, v before and after norm and rotation,
    # attention's output; permuted input of the experts, gate and up, their product.
    ("transformer_engine", "bfloat16"): Kept(4, 3, 4, 1, 3, 0, 2),
    ("transformer_engine", "float32"): Kept(4, 3, 4, 1, 3, 0, 2),
}


class StageMemory(msgspec.Struct, frozen=True):
    """Bytes on a rank of one pipeline stage. `n_parameters` counts this rank's, `layers` the decoder layers.

    `host` is what lies in the host's memory with `train.optimizer_offload` (which is for bf16): Adam's state and the
    gradients it steps by. `fp8_copies` are those of bf16 weights that Transformer Engine keeps from a step's first
    micro-batch to its last.
    """

    stage: int
    layers: int
    n_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    host: int = 0
    fp8_copies: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.fp8_copies + self.gradients + self.optimizer + self.activations + self.logits


class ModelSize(msgspec.Struct, frozen=True):
    """Parameters of the whole model, and those used for one token."""

    total: int
    active: int


def model_size(hf: Mapping[str, Any]) -> ModelSize:
    """Counts from the checkpoint's own list of tensors."""
    config = dict(hf)
    family = family_of(config, "config.json")
    total = idle = 0
    for name, shape in family.manifest(config).items():
        numel = math.prod(shape)
        total += numel
        if ".mlp.experts." in name:
            idle += numel
    experts = family.num_experts(config)
    if experts:
        idle -= idle * config["num_experts_per_tok"] // experts
    return ModelSize(total, total - idle)


def stage_memory(hf: Mapping[str, Any], p: Parallel, t: Train, dtype: str, kernels: Kernels) -> list[StageMemory]:
    """Every pipeline stage's rank, first to last. The layout must be one the model can have."""
    config = dict(hf)
    family = family_of(config, "config.json")
    shapes = family.manifest(config)
    out = []
    for stage in range(p.pp):
        layers = layers_of(stage, config["num_hidden_layers"], p)
        dense = _outside(family, config, stage, p)
        experts = quantised = 0
        for layer in layers:
            dense += sum(_share(s, shapes, p) for s in family.layer_params(config, layer).values())
            experts += _experts(family, config, layer, shapes, p)
            quantised += _quantised(family, config, layer, shapes, p, t)
        n = dense + experts
        dp = p.ranks // (p.tp * p.pp)  # gradients and optimizer are shared over context parallelism too
        state = MASTER[dtype] * (dense / dp + experts * (p.pp * p.ep * p.etp) / p.ranks)
        in_fp8 = int(quantised * fp8.bytes_per_weight(t.fp8, p.sm or 0))
        parameters = n * WIDTH[dtype]
        if t.fp8_parameters:
            parameters += in_fp8 - quantised * WIDTH[dtype]
        tokens = t.micro_batch_tokens  # what a context-parallel rank holds: the packing budget is this times cp
        activations = _in_flight(stage, p) * _activations(family, config, p, t, dtype, kernels, tokens, layers)
        logits = 0
        if stage == p.pp - 1:
            # Logits, whose memory the gradient reuses, and the float32 chunks of the log-probability op.
            logits = tokens * _padded(config["vocab_size"], p.tp) // p.tp * WIDTH[dtype] + LOGPROB_CHUNKS
        out.append(
            StageMemory(
                stage,
                len(layers),
                n,
                parameters,
                n * 4,
                0 if t.optimizer_offload else int(state),
                int(activations),
                logits,
                int(state * 4 / 3) if t.optimizer_offload else 0,  # gradients too, 4 bytes beside those 12
                0 if t.fp8_parameters else in_fp8,
            )
        )
    return out


def layers_of(stage: int, layers: int, p: Parallel) -> list[int]:
    """Decoder layers of a stage: one run of them, or one for each of its `vpp` chunks."""
    chunks = p.vpp or 1
    size = layers // (p.pp * chunks)
    return [i for c in range(chunks) for i in range((c * p.pp + stage) * size, (c * p.pp + stage + 1) * size)]


def _outside(family: Family, hf: dict[str, Any], stage: int, p: Parallel) -> int:
    """Parameters outside the layers: the embedding on the first stage, final norm and head on the last."""
    params = family.model_params(hf)
    table = _padded(hf["vocab_size"], p.tp) // p.tp * hf["hidden_size"]
    n = table if stage == 0 else 0
    if stage == p.pp - 1:
        n += hf["hidden_size"]
        n += table if "output_layer.weight" in params or p.pp > 1 else 0  # tied on one stage: the embedding itself
    return n


def _share(source: ParamSource, shapes: Mapping[str, tuple[int, ...]], p: Parallel) -> int:
    """Values of one parameter on a rank."""
    ways = (p.etp if source.expert else p.tp) if source.split else 1
    return values_of(source, shapes) // ways


def _experts(family: Family, hf: dict[str, Any], layer: int, shapes: Mapping[str, tuple[int, ...]], p: Parallel) -> int:
    """Values of a layer's routed experts on a rank; 0 for a dense layer."""
    if not family.is_moe_layer(hf, layer):
        return 0
    one = sum(_share(s, shapes, p) for s in family.expert_params(hf, layer, 0).values())
    return family.num_experts(hf) // p.ep * one


def values_of(source: ParamSource, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Values of one whole parameter."""
    runs = [run for part in source.parts for run in part]
    return sum((run.stop - run.start) * math.prod(shapes[run.name][1:]) for run in runs)


def _quantised(
    family: Family, hf: dict[str, Any], layer: int, shapes: Mapping[str, tuple[int, ...]], p: Parallel, t: Train
) -> int:
    """Values of a layer's weights on a rank that FP8 products use: attention's and the MLP's matrices."""
    outermost = min(layer, hf["num_hidden_layers"] - 1 - layer)
    if t.fp8 == "none" or outermost < t.fp8_bf16_layers:
        return 0
    n = sum(_share(s, shapes, p) for k, s in family.layer_params(hf, layer).items() if _PRODUCT.search(k))
    return n + _experts(family, hf, layer, shapes, p)


def _activations(
    family: Family,
    hf: dict[str, Any],
    p: Parallel,
    t: Train,
    dtype: str,
    kernels: Kernels,
    tokens: int,
    layers: list[int],
) -> float:
    """Bytes that one micro-batch keeps in `layers` and around them, on a rank."""
    width, hidden = WIDTH[dtype], int(hf["hidden_size"])
    each = [_layer_bytes(family, hf, dtype, kernels, layer, p.cp) for layer in layers]
    around = KEPT[kernels, dtype].around * hidden * width
    if kernels == "local" and p.cp > 1:  # the mask of a sequence that fills the micro-batch, one for all layers
        around += tokens / 2 * p.cp * width * p.tp
    if t.recompute:  # every layer's input, and one layer in full while it is computed again
        return tokens / p.tp * (len(layers) * hidden * width + max(each) + around)
    return tokens / p.tp * (sum(each) + around)


def _layer_bytes(family: Family, hf: dict[str, Any], dtype: str, kernels: Kernels, layer: int, cp: int) -> float:
    k, width, hidden = KEPT[kernels, dtype], WIDTH[dtype], hf["hidden_size"]
    head = hf.get("head_dim") or hidden // hf["num_attention_heads"]
    heads, kv = hf["num_attention_heads"], hf["num_key_value_heads"]
    if family.is_moe_layer(hf, layer):
        experts, chosen, inner = family.num_experts(hf), hf["num_experts_per_tok"], hf["moe_intermediate_size"]
    else:
        experts, chosen, inner = 0, 1, hf["intermediate_size"]
    values: float = hidden * k.hidden + heads * head * k.query + kv * head * k.key_value + head * k.head_dim
    values += chosen * (hidden * k.expert_input + inner * k.expert_width)
    if kernels == "local":  # keys and values of the other context-parallel ranks; Transformer Engine keeps the own ones
        values += (cp - 1) * 2 * heads * head
    extra: float = experts * k.expert_bytes + heads * k.head_bytes + kv * k.head_bytes / 2
    return values * width + extra + (chosen * k.choice_bytes if experts else 0)


def _in_flight(stage: int, p: Parallel) -> float:
    """Micro-batches whose activations a stage holds at once (1F1B; interleaved: arXiv 2205.05198, section 4.2.3)."""
    if p.vpp:  # in chunks: those of the warm-up, and one
        return ((p.pp - stage - 1) * 2 + (p.vpp - 1) * p.pp + 1) / p.vpp
    return p.pp - stage


def _padded(vocabulary: int, tp: int) -> int:
    return -(-vocabulary // tp) * tp
