"""The policy: a Megatron GPTModel built from a Hugging Face config.json, split over ranks by a `ParallelLayout`.

Forward of packed sequences, the same call on CPU and GPU (T tokens of S sequences, concatenated):

    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=m, max_seqlen_kv=m)
    logits = model(input_ids, position_ids, attention_mask=None, packed_seq_params=params)

input_ids and position_ids int64[1, T]; cu int32[S + 1], from 0 to T without a gap, so padding at the end is a sequence
of its own; m the longest length, a Python int. T must be a multiple of `layout.tp` (sequence parallelism divides it).
Under context parallelism cu and m speak of all ranks' tokens, every (padded) length is a multiple of 2 cp, and
input_ids are this rank's share, see `packing.context_share`. position_ids are not read (rotary positions follow cu),
but must be given. logits are [1, T, V_padded / tp] in the model's dtype: vocabulary-parallel over the TP group; columns
that pad the vocabulary hold PADDING_LOGIT.

With pipeline stages every chunk is called by Megatron's schedule, on all ranks alike:

    schedule = get_forward_backward_func()
    schedule(forward_step_func=step, data_iterator=[iter(batches) for _ in models] or one iterator, model=models,
             num_microbatches=n, seq_length=T, micro_batch_size=1, forward_only=False)

where ``step(iterator, model)`` returns ``(model(...), loss_function)``; the schedule gives a chunk its input by
`set_input_tensor`, and only the last stage's output, the logits, reaches loss_function. Micro-batches may differ in T
(shapes travel along). Every data parallel rank must run the same number of micro-batches: expert layers exchange
tokens across them. `loss_function(output)` returns ``(loss, num_tokens, metrics)``, an int tensor in the middle, whose
value is not used: gradients are plain sums over micro-batches and data parallel ranks (see `wrap_for_training`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.init import zeros_

from megarubric.config.fp8 import Recipe
from megarubric.megatron import cpu

cpu.ensure()  # before the megatron imports below

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.extensions.transformer_engine import HAVE_TE  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megarubric.config.layout import ParallelLayout  # noqa: E402
from megarubric.megatron.families import family_of, read_config  # noqa: E402
from megarubric.megatron.fp8_params import is_quantised  # noqa: E402
from megarubric.megatron.layers import PackedRotary, decoder_spec  # noqa: E402

# It tells every rank at every start that GPTModel only gets fixes from now on; the pin in pyproject.toml knows.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)

Recompute = Literal["none", "selective", "full"]
Implementation = Literal["local", "transformer_engine"]

# Low enough that its probability is exactly 0 in fp32 and bf16, and finite, so that p * log p is 0 and not nan.
PADDING_LOGIT = -1e30


def padded_vocab_size(hf_config: dict[str, Any], layout: ParallelLayout) -> int:
    """The vocabulary rounded up to a multiple of tp (Qwen3's 151,936 is one already up to tp 128)."""
    return int(-(-hf_config["vocab_size"] // layout.tp) * layout.tp)


def kernels(dtype: torch.dtype) -> Implementation:
    """Transformer Engine's modules for bf16 on a GPU that has them, those of layers.py otherwise.

    Transformer Engine has no packed attention for float32 but one that forms all scores, padded to the longest
    sequence, and multiplies float32 matrices in TF32: not what float32 is asked for.
    """
    fitting = torch.cuda.is_available() and HAVE_TE and dtype is torch.bfloat16
    return "transformer_engine" if fitting else "local"


def transformer_config(
    hf_config: dict[str, Any] | str | Path,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    implementation: Implementation | None = None,
    **overrides: Any,
) -> TransformerConfig:
    """Megatron's TransformerConfig of a Hugging Face config; `overrides` are fields of it, and win.

    Chosen for training/inference parity: no dropout, router in fp32, no load-balancing loss (its gradient would be part
    of every policy update), no fusion without Transformer Engine. Raises BadInput for configs that cannot run.
    """
    hf, where = read_config(hf_config)
    family = family_of(hf, where)
    implementation = implementation or kernels(dtype)
    engine = implementation == "transformer_engine"
    fields: dict[str, Any] = {
        **family.transformer_fields(hf),
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "transformer_impl": implementation,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": False,  # weights come from pieces: loaded, or drawn by init_weights
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        # The dispatcher that takes a different number of tokens from each rank.
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": engine,
        "moe_permute_fusion": engine,
        "bias_activation_fusion": engine,
        "bias_dropout_fusion": engine,
        "gradient_accumulation_fusion": False,
        "variable_seq_lengths": True,  # packed micro-batches differ in length
        "deallocate_pipeline_outputs": layout.pp > 1,
        # Interleaved stages need forward and backward messages apart: sent together, one end waits for the shape of a
        # gradient that the other computes from the activation not yet sent.
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
        "calculate_per_token_loss": True,  # gradients are sums; see wrap_for_training
    }
    if recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        modules = ["core_attn", "moe_act"] if engine else ["core_attn"]  # moe_act needs grouped experts
        fields |= {"recompute_granularity": "selective", "recompute_modules": modules}
    return TransformerConfig(**(fields | overrides))


# Megatron's names of the recipes.
_FP8 = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}


def fp8_fields(recipe: Recipe, bf16_layers: int, parameters: bool = False) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for an FP8 recipe (config/fp8.py says what it does).

    `parameters`: the weights of its products are kept in FP8 (fp8_params.py).
    """
    if recipe == "none":
        return {}
    return {
        "fp8": "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid",  # fine scales need no wider gradients
        "fp8_recipe": _FP8[recipe],
        "fp8_param": parameters,
        "first_last_layers_bf16": bf16_layers > 0,
        "num_layers_at_start_in_bf16": bf16_layers,
        "num_layers_at_end_in_bf16": bf16_layers,
        "moe_router_padding_for_quantization": True,
        **({"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if recipe == "delayed" else {}),
        # They are quantised as they are made, which memory as it was found may not survive (nan).
        **(dict.fromkeys(("init_method", "output_layer_init_method"), zeros_) if parameters else {}),
        **({"perform_initialization": True} if parameters else {}),
    }


def build_model(
    hf_config: dict[str, Any] | str | Path,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    implementation: Implementation | None = None,
    **overrides: Any,
) -> list[GPTModel]:
    """The model chunks this rank holds (one, or `layout.vpp`), with weights not yet set.

    Needs `parallel.initialize(layout)`. Fill the weights with `weights.load_hf` or `weights.init_weights`; only the
    rows that pad the vocabulary are set (to zero) here. `implementation` None leaves it to `kernels`. Raises BadInput
    for a config or a layout that cannot run.
    """
    hf, where = read_config(hf_config)
    family = family_of(hf, where)
    layout.check(torch.distributed.get_world_size(), hf)
    config = transformer_config(
        hf, layout, dtype=dtype, recompute=recompute, implementation=implementation, **overrides
    )
    chunks = [None] if layout.vpp is None else list(range(layout.vpp))
    models = []
    for chunk in chunks:
        model = GPTModel(
            config=config,
            transformer_layer_spec=decoder_spec(config, vp_stage=chunk),
            vocab_size=padded_vocab_size(hf, layout),
            max_sequence_length=hf.get("max_position_embeddings", 32768),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            parallel_output=True,
            share_embeddings_and_output_weights=bool(hf.get("tie_word_embeddings", False)),
            position_embedding_type="rope",
            rotary_base=family.rope_theta(hf),
            vp_stage=chunk,
        )
        if torch.cuda.is_available():
            model = model.cuda()
        if config.transformer_impl == "local":
            model.rotary_pos_emb = PackedRotary(model.rotary_pos_emb)
        _pad_vocabulary(model, hf["vocab_size"], layout)
        models.append(model)
    return models


def _pad_vocabulary(model: GPTModel, vocab_size: int, layout: ParallelLayout) -> None:
    """Zero the embedding rows beyond the vocabulary and keep their logits from having any probability."""
    share = -(-vocab_size // layout.tp)
    valid = vocab_size - parallel_state.get_tensor_model_parallel_rank() * share
    if valid >= share:
        return
    valid = max(valid, 0)
    if model.pre_process:
        model.embedding.word_embeddings.weight.data[valid:].zero_()
    if model.post_process:
        if model.output_layer.weight is not None:
            model.output_layer.weight.data[valid:].zero_()

        def mask(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
            logits, bias = output
            columns = torch.arange(valid, logits.shape[-1], device=logits.device)
            return logits.index_fill(-1, columns, PADDING_LOGIT), bias

        model.output_layer.register_forward_hook(mask)


def wrap_for_training(
    models: Sequence[GPTModel], *, distributed_optimizer: bool = True
) -> list[DistributedDataParallel]:
    """Megatron's gradient buffers and reductions around the chunks.

    Gradients are **sums**: over the micro-batches of a step and over data parallel ranks, without any division, for
    dense and expert parameters alike. Whatever normalises the loss is in the loss. They accumulate in fp32 in
    `param.main_grad` and are complete after the schedule of `get_forward_backward_func` returns, which calls Megatron's
    `finalize_model_grads`: DP and expert-DP reduction, the TP sum of norms under sequence parallelism, the sum over
    first and last stage of tied embeddings. Call ``zero_grad_buffer()`` on each chunk before a step.
    """
    config = models[0].config
    quantised = any(is_quantised(p) for model in models for p in model.parameters())
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=distributed_optimizer,
        average_in_collective=False,
        fp8_param_gather=quantised,
        reuse_grad_buf_for_mxfp8_param_ag=quantised and config.fp8_recipe == "mxfp8",
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    config.finalize_model_grads_func = _finalize
    return wrapped


def _finalize(models: Sequence[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    # The schedule counts tokens to divide by; the loss here carries its own normalisation.
    finalize_model_grads(list(models), None, **kwargs)
