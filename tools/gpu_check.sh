#!/usr/bin/env bash
# Builds, tests and benchmarks what needs the NVIDIA GPU of this machine. The reward ops need torch (a CUDA build, 2.10
# or newer) and nvcc with its host compiler; nothing else of megarubric has to be installed. With the GPU environment
# (requirements/gpu.lock, gpu-te.txt) FP8 parameters and whole runs follow: trainer and engines on one device, offload,
# FP8; with two GPUs what NCCL gives back while it is idle, too. pytest is fetched into a temporary directory when it is
# missing.
#
#     tools/gpu_check.sh [--json FILE]        default FILE: gpu_check.json
#
# PYTHON names the interpreter (default: .venv/bin/python if there, else python3). Prints a table; exit status 1 when a
# test failed. docs/gpu_first_run.md: what to do before and after it, and what is in doubt.
set -uo pipefail
cd "$(dirname "$0")/.."

json=gpu_check.json
if [ "${1:-}" = "--json" ] && [ -n "${2:-}" ]; then json=$2; elif [ $# -gt 0 ]; then sed -n '2,11p' "$0"; exit 2; fi
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null \
  || { echo "gpu_check: $python has no torch that sees a GPU"; exit 2; }
command -v "${NVCC:-nvcc}" >/dev/null || { echo "gpu_check: nvcc is not on PATH (NVCC names another)"; exit 2; }

"$python" -c 'import pytest' 2>/dev/null || {
  "$python" -m pip install -q --target "$work/packages" pytest || { echo "gpu_check: pytest is missing"; exit 2; }
  export PYTHONPATH=$work/packages:$PYTHONPATH
}

echo "== build"
begin=$(date +%s)
"$python" setup.py -q build_ext --inplace >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
build_s=$(($(date +%s) - begin))
"$python" -c 'from megarubric.reward import ops; print(ops.describe())'

echo "== tests"
"$python" -m pytest tests/gpu/test_reward_ops.py -q -rs -p no:cacheprovider 2>&1 | tee "$work/tests.log"
tests=${PIPESTATUS[0]}

sanitizer="not found"
if command -v compute-sanitizer >/dev/null; then
  echo "== compute-sanitizer"
  sanitizer=passed
  for tool in memcheck racecheck initcheck; do
    compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest tests/gpu/test_reward_ops.py -q \
      -p no:cacheprovider -k "(cpu_bits and not 100000) or sweep or bad or tier_expectation" >"$work/$tool.log" 2>&1 \
      && echo "$tool: no errors" || { sanitizer=failed; echo "$tool: ERRORS"; tail -30 "$work/$tool.log"; }
  done
fi

echo "== weights through device memory (its runs are skipped without the GPU environment)"
"$python" -m pytest tests/gpu/test_device_exchange.py -q -rsP -p no:cacheprovider 2>&1 | tee "$work/exchange.log"
exchange=${PIPESTATUS[0]}

echo "== NCCL, FP8 parameters, whole runs (skipped without the GPU environment, NCCL with one GPU)"
"$python" -m pytest tests/gpu/test_nccl.py tests/gpu/test_fp8_parameters.py tests/gpu/test_whole_run.py -q -rsP \
  -p no:cacheprovider 2>&1 | tee "$work/runs.log"
runs=${PIPESTATUS[0]}

echo "== benchmarks"
"$python" benchmarks/reward_ops.py --device cuda --samples 8000000 --json "$work/16.json"
"$python" benchmarks/reward_ops.py --device cuda --samples 2000000 --criteria 48 --pairs 16 --json "$work/48.json"
"$python" benchmarks/reward_ops.py --device cuda --samples 8000000 --plain --json "$work/plain.json"

"$python" - "$work" "$json" "$build_s" "$tests" "$sanitizer" "$runs" "$exchange" <<'PY'
import json, pathlib, re, sys
work, target, build_s, tests, sanitizer, whole, exchange = sys.argv[1:]
runs = [json.loads(p.read_text()) for p in sorted(pathlib.Path(work).glob("*.json"))]
last = pathlib.Path(work, "tests.log").read_text().strip().splitlines()[-1]
report = {"build_seconds": int(build_s), "tests": last, "tests_passed": tests == "0", "whole_runs": pathlib.Path(work, "runs.log").read_text().strip().splitlines()[-1],
          "whole_runs_passed": whole == "0", "exchange": pathlib.Path(work, "exchange.log").read_text().strip().splitlines()[-1], "exchange_passed": exchange == "0", "sanitizer": sanitizer, "benchmarks": runs}
pathlib.Path(target).write_text(json.dumps(report, indent=1) + "\n")
print(f"\nbuild {build_s} s | tests: {last} | sanitizer: {sanitizer}")
print(f"{'samples':>10} {'K':>4} {'pairs':>5} {'saturated':>9} {'op ms':>8} {'GB/s':>7} {'of copy':>8} {'eager/op':>9}")
for r in runs:
    print(f"{r['samples']:>10} {r['criteria']:>4} {r['pairs']:>5} {str(r['saturated']):>9} {r['seconds']['op'] * 1e3:>8.3f}"
          f" {r['gigabytes_per_second']['op']:>7.0f} {1 / r['op_over_stream']:>8.0%} {r['eager_over_op']:>9.1f}")
print(f"written: {target}")
PY
[ "$tests" = 0 ] && [ "$exchange" = 0 ] && [ "$runs" = 0 ] && [ "$sanitizer" != failed ]
