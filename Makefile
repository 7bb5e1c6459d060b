# make quickstart   the main job on this machine: real Megatron-Core, real vLLM, a small Qwen3-MoE
# make test         style, types and tests
# make setup        only makes .venv (the other targets do it by themselves)
# make lint         style and types; make format puts the style right
# make bench        the benchmarks of docs/benchmarks.md that are run by hand

PY := .venv/bin/python
TESTS ?= tests

.PHONY: help quickstart test setup lint format bench lock clean

help: # what `make` alone does
	@sed -n '1,/^$$/s/^# //p' Makefile

quickstart: setup
	.venv/bin/megarubric train configs/quickstart.yaml --fresh

test: setup lint
	$(PY) -m pytest $(TESTS)

setup:
	@bash tools/setup.sh

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup
	@bash tools/bench.sh

lock:
	uv pip compile -q --python-version 3.12 --override requirements/overrides.txt requirements/cpu.in -o requirements/cpu.lock
	uv pip compile -q --python-version 3.12 --python-platform x86_64-manylinux_2_28 requirements/gpu.in -o requirements/gpu.lock

clean:
	rm -rf build *.egg-info megarubric/reward/*.so
