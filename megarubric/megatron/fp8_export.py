"""A Hugging Face checkpoint with block-scaled FP8 weights, as vLLM and transformers read it (quant_method "fp8").

The weight of every attention and MLP linear becomes float8_e4m3fn with one float32 scale for each block of 128 x 128:
``weight = weight_fp8 * weight_scale_inv``, under the names ``X.weight`` and ``X.weight_scale_inv``. Embedding, head,
norms and routers stay as they are; a router in FP8 would send tokens elsewhere. (The layout of DeepSeek-V3's and
Qwen3's own FP8 checkpoints.)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megarubric.errors import BadInput
from megarubric.megatron import hf_files, weights
from megarubric.megatron.families import read_config

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_QUANTISED = re.compile(
    r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:experts\.\d+\.|shared_expert\.)?(?:gate|up|down)_proj)\.weight"
)
_KEPT = re.compile(r"(?:lm_head|model\.layers\.\d+\.mlp\.(?:gate|shared_expert_gate))\.weight")


def is_quantised(name: str) -> bool:
    """Whether the tensor of that name gets FP8 blocks."""
    return _QUANTISED.fullmatch(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a matrix; the last ones may be smaller."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [n, k], float32 scales [ceil(n / 128), ceil(k / 128)]) of a matrix [n, k].

    A block's scale maps its largest magnitude to 448; a block of zeros has scale 1.
    """
    n, k = weight.shape
    rows, columns = scale_shape((n, k))
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32)
    padded[:n, :k] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    small = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return small.view(rows * BLOCK, columns * BLOCK)[:n, :k].contiguous(), scale


def dequantise(small: Tensor, scale: Tensor) -> Tensor:
    """The float32 matrix that `quantise` stands for."""
    n, k = small.shape
    return small.float() * scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def export_fp8(
    source: Path,
    target: Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write `target` from the Hugging Face directory `source`, one tensor in memory at a time; bytes of its weights.

    `progress` hears of tensors done and in all. Written aside and renamed. Raises BadInput when `target` exists,
    `source` is not a whole checkpoint of a known family or is quantised already, a weight is not finite or has a side
    that blocks do not divide.
    """
    if target.exists():
        raise BadInput(target, None, "exists already")
    if "quantization_config" in read_config(source)[0]:
        raise BadInput(source, "config.json", "has a quantization_config: it is quantised already")
    config, tensors = hf_files.open_checkpoint(source)
    manifest: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for name, info in tensors.items():
        manifest[name], dtypes[name] = info.shape, info.dtype
        if is_quantised(name):
            if any(side % BLOCK for side in info.shape):
                raise BadInput(
                    info.path, name, f"is {info.shape}: engines read FP8 matrices with sides of whole {BLOCK}s"
                )
            dtypes[name] = "F8_E4M3"
            manifest[f"{name}_scale_inv"], dtypes[f"{name}_scale_inv"] = scale_shape(info.shape), "F32"
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        raise BadInput(partial, None, "is left of an export that ended early, or still runs: remove it")
    partial.mkdir(parents=True)
    plan = hf_files.plan_shards(manifest, dtypes, partial, max_shard_bytes)
    hf_files.write_headers(plan)
    with weights.Files() as sources, weights.Files(sync=True) as targets:

        def write(name: str, tensor: Tensor) -> None:
            place = plan[name]
            weights.write_rectangle(targets.open(place.path, os.O_WRONLY), place, _whole(place), tensor)

        for done, (name, info) in enumerate(tensors.items(), 1):
            tensor = torch.empty(info.shape, dtype=weights.DTYPES[info.dtype])
            weights.read_rectangle(sources.open(info.path, os.O_RDONLY), info, _whole(info), tensor)
            if not torch.isfinite(tensor).all():
                raise BadInput(info.path, name, "has a value that is not finite")
            if is_quantised(name):
                tensor, scale = quantise(tensor)
                write(f"{name}_scale_inv", scale)
            write(name, tensor)
            progress(done, len(tensors))
    kept = sorted(name.removesuffix(".weight") for name in tensors if _KEPT.fullmatch(name))
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = hf_files.index_text(plan)
    if index is not None:
        (partial / hf_files.INDEX).write_text(index, encoding="utf-8")
    for file in hf_files.carried_files(source):
        (partial / file.name).write_bytes(file.read_bytes())
    partial.rename(target)
    return sum(info.nbytes for info in plan.values())


def _whole(info: hf_files.TensorInfo) -> tuple[slice, ...]:
    return tuple(slice(0, side) for side in info.shape)
