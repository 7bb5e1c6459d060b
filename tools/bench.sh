#!/usr/bin/env bash
# Every benchmark in turn, each against its named baseline in the same run. `make bench` calls it; docs/benchmarks.md
# keeps the last results. Run it on a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
python=.venv/bin/python
"$python" benchmarks/reward_ops.py --rounds 15
"$python" benchmarks/judge_prefix.py --threads "$OMP_NUM_THREADS"
"$python" -c 'import trl' 2>/dev/null || "$python" -m pip install -q --disable-pip-version-check --no-deps -r requirements/bench.lock
"$python" benchmarks/trl_step.py
"$python" benchmarks/logprob.py
"$python" benchmarks/exchange_hosts.py
"$python" benchmarks/convert.py --gb 4   # 12 is the published size; it needs 50 GB of disk
