"""One RL step of megarubric against one of TRL's GRPOTrainer: same tiny model, same work, same machine, one run.

Work: 16 prompts x 8 completions x 64 new tokens (end-of-text ignored on both sides, so every answer has its 64), a
programmatic reward (letter counts), one optimizer step on all answers, float32. The ratio is of medians over the steps
after the first.

    python benchmarks/trl_step.py            # needs: pip install --no-deps -r requirements/bench.lock
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, SAMPLES, NEW_TOKENS = 16, 8, 64
LETTERS = {"e": 24, "a": 16, "o": 16, "n": 14, "t": 18, "s": 12, "r": 12, "h": 10}  # varies in every group of answers


def rubric_rows() -> list[dict]:
    lines = (ROOT / "rubrics/quickstart/train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ours(steps: int, directory: Path) -> list[float]:
    """Seconds of each step after the first, from metrics.jsonl."""
    rows = []
    for row in rubric_rows():
        row["criteria"] = [
            {
                "id": letter,
                "description": f"At least {n} times {letter}.",
                "check": {
                    "kind": "keywords:letter_frequency",
                    "letter": letter,
                    "let_frequency": n,
                    "let_relation": "at least",
                },
            }
            for letter, n in LETTERS.items()
        ]
        row.pop("pairs", None), row.pop("shaping", None)
        rows.append(row)
    data = directory / "prompts.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in rows))
    argv = [sys.executable, "-m", "megarubric", "train", str(ROOT / "configs/quickstart.yaml"), f"runs_dir={directory}",
            "name=ours", f"data.train={data}", "data.heldout=null", "judge.kind=none", f"train.steps={steps}",
            "train.warmup_steps=0", f"rollout.prompts_per_step={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}",
            f"rollout.max_new_tokens={NEW_TOKENS}", "rollout.ignore_eos=true", "checkpoint.every=0",
            "checkpoint.export_hf=false", "wandb.mode=disabled"]  # fmt: skip
    subprocess.run(argv, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = [json.loads(line) for line in (directory / "ours/metrics.jsonl").read_text().splitlines()]
    for m in metrics[1:]:
        print(f"  megarubric step {m['step']}: {m['perf/step_s']:.2f} s (write {m['perf/rollout_s']:.2f}, "
              f"train {m['perf/train_s']:.2f}, exchange {m['perf/exchange_s']:.2f})", flush=True)  # fmt: skip
    return [m["perf/step_s"] for m in metrics[1:]]


def theirs(steps: int, directory: Path) -> list[float]:
    """Seconds of each GRPOTrainer step after the first, timed by a callback around the whole step."""
    script = f"""
import json, time, torch
import uuid
import datasets.fingerprint
from datasets import Dataset
datasets.fingerprint.Hasher.hash = staticmethod(lambda value: uuid.uuid4().hex)  # cannot hash pyarrow 26 types
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
torch.set_num_threads({os.cpu_count()})
path = {str(ROOT / "models/tiny-qwen3-moe")!r}
rows = [json.loads(line) for line in open({str(ROOT / "rubrics/quickstart/train.jsonl")!r}, encoding="utf-8")]
data = Dataset.from_list([{{"prompt": [{{"role": "user", "content": r["prompt"]}}]}} for r in rows])
def reward(completions, **kwargs):
    letters = {LETTERS!r}
    texts = [c[0]["content"].lower() for c in completions]
    return [sum(t.count(x) >= n for x, n in letters.items()) / len(letters) for t in texts]
class Timer(TrainerCallback):
    seconds = []
    def on_step_begin(self, *a, **k): self.began = time.perf_counter()
    def on_step_end(self, *a, **k): self.seconds.append(time.perf_counter() - self.began)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
args = GRPOConfig(output_dir={str(directory / "trl")!r}, per_device_train_batch_size={PROMPTS * SAMPLES},
    num_generations={SAMPLES}, max_completion_length={NEW_TOKENS}, max_steps={steps}, learning_rate=5e-4, use_cpu=True,
    beta=0.0, report_to=[], save_strategy="no", logging_steps=1, bf16=False, gradient_checkpointing=False,
    generation_kwargs={{"min_new_tokens": {NEW_TOKENS}}})
trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(path), callbacks=[Timer()])
trainer.train()
print("SECONDS", json.dumps(Timer.seconds))
"""
    env = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=directory)
    line = next((x for x in out.stdout.splitlines() if x.startswith("SECONDS")), None)
    if line is None:
        sys.exit(f"trl_step: TRL failed:\n{out.stderr[-4000:]}")
    seconds = json.loads(line.removeprefix("SECONDS"))[1:]
    for i, s in enumerate(seconds, 2):
        print(f"  TRL step {i}: {s:.2f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--trl-steps", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mr-") as name:
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
        print(f"{PROMPTS} prompts x {SAMPLES} completions x {NEW_TOKENS} new tokens, float32")
        mine = statistics.median(ours(a.steps, Path(name)))
        trl = statistics.median(theirs(a.trl_steps, Path(name)))
    print(f"median step: megarubric {mine:.2f} s, TRL GRPOTrainer 1.16 {trl:.2f} s, ratio {trl / mine:.2f}x")


if __name__ == "__main__":
    main()
