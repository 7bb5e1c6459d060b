"""Remakes the tiny model's inputs. From the repository root:

    python -m tools.tiny_model.make tokenizer --out models/tiny-qwen3-moe      # config, tokenizer, chat template
    python -m tools.tiny_model.make rubrics --out rubrics/quickstart           # the quickstart rubrics
    python -m tools.tiny_model.make data --out build/tiny                      # rows for `megarubric sft`, judge pairs
    python -m tools.tiny_model.make labelled --out build/judge                 # answers for `eval --suite judge`

All four are deterministic. The weights come from `megarubric sft configs/tiny_sft.yaml`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from megarubric.judging.prompt import load_template, plain_text, render_tier
from tools.tiny_model.judging import CRITERIA, MIX, Question, draw_drill, draw_question
from tools.tiny_model.rubrics import quickstart_rubrics
from tools.tiny_model.texts import load
from tools.tiny_model.tokenizer import CONTROL_TOKENS, build_tokenizer, save_tokenizer
from tools.tiny_model.writer import SENTENCE_FAULTS, draw_copy, draw_faults, draw_request, write

SEED = 20261103
VOCAB_SIZE = 2560
JUDGE_TEMPLATE = "tier_compact"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "bos_token_id": None,
    "pad_token_id": CONTROL_TOKENS.index("<|endoftext|>"),
    "eos_token_id": CONTROL_TOKENS.index("<|im_end|>"),
    "torch_dtype": "bfloat16",
}


def judge_row(question: Question) -> dict[str, Any]:
    """A judge question as a training row: the rendered prompt's parts and the one tier token that is right."""
    parts = render_tier(
        load_template(JUDGE_TEMPLATE), question.request.prompt, question.answer, question.description, question.tiers
    )
    return {"parts": [[part.text, part.trusted] for part in parts], "completion": str(question.label)}


def writing_row(rng: Random, held_out: bool = False) -> dict[str, Any]:
    """A request and an answer with the faults of the cold start."""
    request = draw_request(rng, held_out)
    answer = write(request, draw_faults(rng), rng)
    messages = [{"role": "user", "content": request.prompt}, {"role": "assistant", "content": answer.text}]
    return {"messages": messages}


def training_rows(n_writing: int, n_judge: int, n_drill: int, n_copy: int, seed: int = SEED) -> list[dict[str, Any]]:
    """The cold-start rows in random order: writing, judge questions, drills (`draw_drill`, `draw_copy`)."""
    rng = Random(f"rows:{seed}")
    rows = [writing_row(rng) for _ in range(n_writing)]
    rows += [judge_row(draw_question(rng, MIX[i % len(MIX)])) for i in range(n_judge)]
    rows += [judge_row(draw_drill(rng, MIX[i % len(MIX)])) for i in range(n_drill)]
    for _ in range(n_copy):
        prompt, answer = draw_copy(rng)
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
    rng.shuffle(rows)
    return rows


def judge_pairs(per_criterion: int, held_out_wording: bool, seed: int = SEED) -> Iterable[dict[str, Any]]:
    """Labelled questions with held-out slot values, for measuring the judge."""
    rng = Random(f"pairs:{seed}:{held_out_wording}")
    for criterion in CRITERIA:
        for _ in range(per_criterion):
            q = draw_question(rng, criterion, held_out=True, held_out_wording=held_out_wording)
            yield {
                "criterion": criterion,
                "prompt": q.request.prompt,
                "response": q.answer,
                "description": q.description,
                "tiers": list(q.tiers),
                "label": q.label,
            }


def labelled_answers(
    count: int, held_out_wording: bool, seed: int = SEED
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A rubric of all sentence faults, in the wording of the quickstart, and `count` answers in the responses format of
    `megarubric score` whose judgements are the generator's labels. Requests have held-out slot values."""
    rng = Random(f"labelled:{seed}:{held_out_wording}")
    texts = load("judge")
    criteria = [
        {
            "id": name,
            "description": texts[name]["description"][0],
            "tiers": [{"value": i, "text": texts[name][tier][0]} for i, tier in enumerate(("bad", "good"))],
        }
        for name in SENTENCE_FAULTS
    ]
    provenance = {"author": "hybrid", "model": "claude", "source": "megarubric", "licence": "Apache-2.0"}
    rows = []
    for i in range(count):
        request = draw_request(rng, held_out=True)
        faults = frozenset(name for name in SENTENCE_FAULTS if rng.random() < 0.5)
        rows.append(
            {
                "id": f"labelled-{i:04d}",
                "prompt": request.prompt,
                "rubric": "tiny.faults",
                "response": write(request, faults, rng, held_out_wording).text,
                "judgements": {name: int(name not in faults) for name in SENTENCE_FAULTS},
                "author": "generator",
            }
        )
    return {"id": "tiny.faults", "version": 1, "provenance": provenance, "criteria": criteria}, rows


def tokenizer_texts(n: int = 6000) -> Iterable[str]:
    """What the pieces are learnt from: the lines of writing and judge rows."""
    rng = Random(f"tokenizer:{SEED}")
    for i in range(n):
        yield from (message["content"] for message in writing_row(rng)["messages"])
        if i % 3 == 0:
            question = draw_question(rng, CRITERIA[i // 3 % len(CRITERIA)])
            parts = render_tier(load_template(JUDGE_TEMPLATE), "", "", question.description, question.tiers)
            text = plain_text(parts)
            for token in CONTROL_TOKENS:
                text = text.replace(token, "")
            yield from (line for line in text.splitlines() if line)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, in place only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokenizer", "rubrics", "data", "labelled"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--writing", type=int, default=14000, help="writing rows (data)")
    parser.add_argument("--judge", type=int, default=12000, help="judge rows (data)")
    parser.add_argument("--drill", type=int, default=10000, help="judge rows on one sentence (data)")
    parser.add_argument("--copy", type=int, default=12000, help="rows that only copy slot values (data)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the training rows (data)")
    options = parser.parse_args()
    out: Path = options.out
    if options.what == "tokenizer":
        save_tokenizer(build_tokenizer(tokenizer_texts(), VOCAB_SIZE), out, CONFIG["max_position_embeddings"])
        (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
        generation = {"eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"], "do_sample": True}
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    elif options.what == "rubrics":
        write_jsonl(out / "train.jsonl", quickstart_rubrics(200, SEED, held_out=False))
        write_jsonl(out / "heldout.jsonl", quickstart_rubrics(40, SEED, held_out=True))
    elif options.what == "labelled":
        for name, held_out_wording in (("labelled", False), ("labelled_wording", True)):
            rubric, rows = labelled_answers(200, held_out_wording)
            write_jsonl(out / "rubrics.jsonl", [rubric])
            write_jsonl(out / f"{name}.jsonl", rows)
    else:
        counts = {f"n_{name}": getattr(options, name) for name in ("writing", "judge", "drill", "copy")}
        write_jsonl(out / "sft.jsonl", training_rows(**counts, seed=options.seed))
        write_jsonl(out / "judge_heldout.jsonl", judge_pairs(200, held_out_wording=False))
        write_jsonl(out / "judge_heldout_wording.jsonl", judge_pairs(100, held_out_wording=True))


if __name__ == "__main__":
    main()
