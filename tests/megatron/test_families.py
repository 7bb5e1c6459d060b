"""Every other family is transformers' model too: logits, loss, each gradient and each exported byte, as test_layouts.py
checks Qwen3-MoE; and the configurations it cannot build are refused.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megarubric.errors import BadInput
from megarubric.megatron.families import family_of

# Attention, norms and vocabulary as small as layouts allow, each family's own fields on top.
COMMON: dict[str, Any] = {
    "vocab_size": 130,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 512,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": COMMON | {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3-untied": COMMON | {"head_dim": 16, "tie_word_embeddings": False},
    # A dense layer, gates that are not normalised, biases.
    "qwen2_moe": COMMON
    | MOE
    | {"shared_expert_intermediate_size": 80, "mlp_only_layers": [1], "norm_topk_prob": False},
    "qwen2_moe-plain": COMMON
    | MOE
    | {"shared_expert_intermediate_size": 32, "norm_topk_prob": True, "qkv_bias": False},
}


def layouts() -> ModuleType:
    """test_layouts.py, whose checks of one model serve here."""
    spec = importlib.util.spec_from_file_location("layouts", Path(__file__).with_name("test_layouts.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


def make_references(directory: str) -> dict[str, float]:
    """One process: save each model, its logits, and the gradients of the weighted loss. Returns the losses."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    checks = layouts()
    losses = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.partition("-")[0], **config)).float()
        losses[name] = checks.save_reference(model, Path(directory) / name)
    return losses


def check_models(directory: str, layout: dict[str, Any], names: list[str], out: str) -> dict[str, Any]:
    """All checks of one layout, for each model, on this rank."""
    from megarubric.megatron.parallel import ParallelLayout, initialize, shutdown

    checks, degrees = layouts(), ParallelLayout(**layout)
    initialize(degrees, timeout_s=200)
    answer = {
        name: checks.check_model(Path(directory) / name, degrees, {}, ["replicated"], Path(out) / name)
        for name in names
    }
    shutdown()
    return answer


@pytest.fixture(scope="module")
def references(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("references")
    (losses,) = ranks(1, make_references, directory=str(directory), timeout_s=240)
    return {"directory": directory, "losses": losses}


DENSE, SPARSE = ["qwen3", "qwen3-untied"], ["qwen2_moe", "qwen2_moe-plain"]
LAYOUTS = [
    pytest.param(1, {}, [*DENSE, *SPARSE], id="one-rank"),
    pytest.param(2, {"tp": 2}, DENSE, id="tp2-dense"),
    pytest.param(2, {"tp": 2, "ep": 2}, SPARSE, id="tp2-ep2"),
    pytest.param(2, {"tp": 2, "etp": 2}, SPARSE, id="tp2-etp2"),
    pytest.param(2, {"pp": 2}, [*DENSE, *SPARSE], id="pp2"),
]


@pytest.mark.engine
@pytest.mark.parametrize("world,layout,names", LAYOUTS)
def test_family_is_transformers_model(
    world: int, layout: dict[str, Any], names: list[str], references: dict[str, Any], ranks: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    directory = references["directory"]
    job = {"directory": str(directory), "layout": layout, "names": names, "out": str(tmp_path)}
    answers = ranks(world, check_models, **job)
    for name in names:
        runs = [answer[name]["replicated"] for answer in answers]
        source = load_file(directory / name / "model.safetensors")
        truth = load_file(directory / name / "reference.safetensors.ref")
        norm = sum(float((v.double() ** 2).sum()) for k, v in truth.items() if k.startswith("grad.")) ** 0.5
        off = [run["logits_off"] for run in runs if run["logits_off"] is not None]
        assert off and max(off) < 1e-4, name
        losses = [run["loss"] for run in runs if run["loss"] is not None]
        assert losses == pytest.approx([references["losses"][name]] * len(losses), rel=1e-5)
        assert [run["grad_norm"] for run in runs] == pytest.approx([norm] * world, rel=1e-5)
        assert max(run["worst_gradient"] for run in runs) < 1e-4
        assert answers[0][name]["owned_elements"] == sum(tensor.numel() for tensor in source.values())
        exported: dict[str, Any] = {}
        for path in (tmp_path / name).glob("*.safetensors"):
            exported |= load_file(path)
        assert exported.keys() == source.keys()
        for key, tensor in source.items():
            assert exported[key].dtype == tensor.dtype and exported[key].equal(tensor), key


# ------------------------------------------------------------------------------------------------------ configurations


def hf(family: str, **fields: Any) -> dict[str, Any]:
    return COMMON | MOE | {"model_type": family, "rms_norm_eps": 1e-6, "shared_expert_intermediate_size": 80} | fields


@pytest.mark.parametrize(
    "config,line",
    [
        (hf("llama"), "model_type: 'llama' is not supported; known: qwen3_moe, qwen3, qwen2_moe"),
        (hf("qwen3", intermediate_size=None), "intermediate_size: is missing"),
        (hf("qwen3", attention_bias=True), "attention_bias: True is not supported for qwen3, only False"),
        (hf("qwen3", use_sliding_window=True), "use_sliding_window: True is not supported for qwen3, only False"),
        (hf("qwen2_moe", shared_expert_intermediate_size=0), "shared_expert_intermediate_size: is missing"),
        (hf("qwen2_moe", num_experts=None), "num_experts: is missing"),
        (hf("qwen2_moe", num_experts_per_tok=5), "num_experts_per_tok: is more than the 4 experts there are"),
        (
            hf("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True),
            "norm_topk_prob: with one expert a token the router cannot learn",
        ),
        (
            hf("qwen2_moe", rope_parameters={"rope_type": "yarn"}),
            "rope_parameters: rope type 'yarn' is not supported for qwen2_moe, only 'default'",
        ),
        (
            hf("qwen2_moe", mlp_only_layers=[0], intermediate_size=None),
            "intermediate_size: is missing, and some layers are dense",
        ),
    ],
)
def test_configs_that_cannot_be_built(config: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput) as caught:
        family_of(config, "config.json")
    assert str(caught.value) == f"config.json: {line}"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "qwen2_moe"])
def test_parameters_are_made_of_all_tensors(family: str) -> None:
    """Every row of every tensor in the manifest goes into exactly one parameter of the whole model."""
    from megarubric.megatron.dist_files import dist_tensors

    config = hf(family, mlp_only_layers=[1])
    known = family_of(json.loads(json.dumps(config)), "config.json")
    rows: dict[str, list[tuple[int, int]]] = {}
    for tensor in dist_tensors(known, config).values():
        for run in tensor.runs:
            rows.setdefault(run.name, []).append((run.start, run.stop))
    manifest = known.manifest(config)
    assert rows.keys() == manifest.keys()
    for name, runs in rows.items():
        ends = [0, *(stop for _, stop in sorted(runs))]
        assert [start for start, _ in sorted(runs)] == ends[:-1] and ends[-1] == manifest[name][0], name


def test_the_plan_refuses_what_the_ranks_would() -> None:
    """One check for both: the plan names the key of the run's config, and allows tp above the key-value heads."""
    from megarubric.config.schema import Parallel
    from megarubric.launch.plan import check_layout

    model = hf("qwen3_moe", num_attention_heads=8, num_experts=8)
    check_layout(model, Parallel(ranks=8, tp=8, ep=8), "run.yaml")  # each of two key-value heads on four ranks
    check_layout(hf("qwen3"), Parallel(ranks=2, pp=2), "run.yaml")
    for config, parallel, line in (
        (model, Parallel(ranks=3, tp=3), "parallel.tp: 8 attention heads cannot be divided by tp 3"),
        (model, Parallel(ranks=2, pp=2, vpp=2), "parallel.vpp: interleaving needs pp of at least 3, not 2"),
        (hf("qwen3", num_experts=None), Parallel(ranks=2, ep=2), "parallel.ep: no experts cannot be divided by ep 2"),
    ):
        with pytest.raises(BadInput) as caught:
            check_layout(config, parallel, "run.yaml")
        assert str(caught.value) == f"run.yaml: {line}"
    with pytest.raises(BadInput, match="model_type: 'llama' is not supported"):
        check_layout(hf("llama"), Parallel(), "run.yaml")
