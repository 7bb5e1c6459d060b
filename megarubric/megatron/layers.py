"""The decoder's modules: Transformer Engine's where it runs, ours where it does not. `decoder_spec` is the one seam.

Megatron's own local modules stop short in three places, which this file fills: the norm refuses sequence parallelism,
core attention takes no packed sequences, and QK norm has no local module under sequence parallelism. Everything else
(column and row parallel linears, router, token dispatch, sequential experts) is Megatron's.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megarubric.megatron import context, cpu

cpu.ensure()  # before the megatron imports below

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)


class PackedRotary(torch.nn.Module):
    """Rotary angles of packed sequences as one table, [T, 1, 1, d], a row a token.

    Megatron's unfused rotation goes through a packed batch sequence by sequence, unless the table has a row for every
    token; on a CPU, with a hundred short answers a micro-batch, that was a fifth of a training step.

    Under context parallelism T still counts the tokens of all ranks: Megatron then takes the rows of this rank's two
    chunks of each sequence itself, from the sequence's place in the table.
    """

    def __init__(self, inner: torch.nn.Module) -> None:
        """`inner` is Megatron's RotaryEmbedding, whose table starts at position 0."""
        super().__init__()
        self.inner = inner
        self.cu_seqlens: Tensor | None = None

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Length of the table; GPTModel asks for it right before `forward`, with the packing."""
        packed = next((a for a in (*args, *kwargs.values()) if isinstance(a, PackedSeqParams)), None)
        self.cu_seqlens = None
        if packed is not None:
            padded = packed.cu_seqlens_q_padded
            self.cu_seqlens = packed.cu_seqlens_q if padded is None else padded
        return int(self.inner.get_rotary_seq_len(*args, **kwargs))  # type: ignore[operator]

    def forward(self, length: int, **kwargs: Any) -> Tensor:
        table: Tensor = self.inner(length, **kwargs)
        if self.cu_seqlens is None:
            return table
        cu, self.cu_seqlens = self.cu_seqlens.long(), None
        starts = torch.repeat_interleave(cu[:-1], cu.diff())
        return table[torch.arange(len(starts), device=table.device) - starts]


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension, in fp32, rounded once to the input's dtype.

    Rounding after the weight, not before it, is what Transformer Engine's and vLLM's kernels do. Under sequence
    parallelism a rank sees only its share of the tokens, so the weight is marked for a gradient sum over TP ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class PackedCoreAttention(MegatronModule):
    """Causal grouped-query attention by `scaled_dot_product_attention`, one sequence at a time when packed.

    No score matrix across sequences is ever formed: the cost is the sum of squares of the lengths, as with Transformer
    Engine's variable-length kernels, whose interface this has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.context_group: torch.distributed.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            groups = ProcessGroupCollection.use_mpu_process_groups(["cp"]) if pg_collection is None else pg_collection
            self.context_group = groups.cp
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Packed (`packed_seq_params` given, format "thd"): query [T, heads, d], key and value [T, groups, d], sequences
        as in `cu_seqlens_q_padded` or else `cu_seqlens_q`, which must reach T; returns [T, heads, d]. Otherwise query
        [s, b, heads, d], key and value [s, b, groups, d]; returns [s, b, heads * d]. `attention_mask` is not read: the
        only mask here is the causal one.

        Under context parallelism, which takes packed sequences only, T counts this rank's tokens and `cu_seqlens` those
        of all ranks; see context.py.
        """
        if (attn_mask_type or self.attn_mask_type) is not AttnMaskType.causal or attention_bias is not None:
            raise ValueError("this attention is causal, without a bias")
        if packed_seq_params is None:
            if self.context_group is not None:
                raise ValueError("context parallelism takes packed sequences")
            # [s, b, heads, d] -> [b, heads, s, d] and back
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in _repeated(query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        # Padding lies behind the tokens of its sequence, where causality keeps it from being seen.
        padded = packed_seq_params.cu_seqlens_q_padded
        ends = tuple((packed_seq_params.cu_seqlens_q if padded is None else padded).tolist())
        band, group = None, self.context_group
        if group is None:
            chunks = [(slice(a, b), slice(a, b)) for a, b in itertools.pairwise(ends)]
        else:
            key, value = context.gather_whole(torch.stack((key, value), dim=1), ends, group).unbind(1)
            chunks = context.query_chunks(ends, group.size(), group.rank())
            band = context.causal_band(ends, group.size(), query.dtype, query.device)
        # [T, heads, d] -> per chunk [1, heads, t, d]
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in _repeated(query, key, value))
        out = torch.cat([self._attend(q[:, :, own], k[:, :, seen], v[:, :, seen], band) for own, seen in chunks], dim=2)
        return out.squeeze(0).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, band: Tensor | None = None) -> Tensor:
        """query [b, heads, n, d] against key and value [b, heads, m, d], of whose positions it is the last n."""
        n, m = query.shape[2], key.shape[2]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if n == m or band is None else context.chunk_mask(band, n, m),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=n == m,
            scale=self.softmax_scale,
        )


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped keys and values [..., groups, d] repeated to the queries' heads."""
    share = query.shape[-2] // key.shape[-2]
    if share == 1:
        return query, key, value
    return query, key.repeat_interleave(share, dim=-2), value.repeat_interleave(share, dim=-2)


def decoder_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline rank's (chunk `vp_stage` of the) decoder, MoE or dense by `config.moe_layer_freq`.

    `config.transformer_impl` "transformer_engine" gives Megatron's TE modules (fused norm and linear, grouped experts,
    FP8), "local" the ones of this file. Both take the same `packed_seq_params`.
    """
    if config.transformer_impl == "transformer_engine":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        frequency = [0] * config.num_layers
    elif isinstance(frequency, int):
        frequency = [int(i % frequency == 0) for i in range(config.num_layers)]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[_local_layer(config, moe=bool(is_moe)) for is_moe in frequency[first : first + count]],
        layer_norm=RMSNorm,
    )


def _local_layer(config: TransformerConfig, *, moe: bool) -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if moe:
        parts = MoESubmodules(
            experts=partial(SequentialMLP, submodules=linears),
            shared_experts=partial(SharedExpertMLP, submodules=linears),
        )
        mlp = partial(MoELayer, submodules=parts)
    else:
        mlp = partial(MLP.as_mlp_submodule, submodules=linears)
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # The names under which Transformer Engine's fused modules keep their norms: checkpoints fit either spec.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                **({} if moe else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
            },
        ),
    )
