#!/usr/bin/env bash
# Makes .venv in the checkout: the locked packages, then megarubric itself with its native ops.
# Reused while the lock and the native sources stay the same. `make setup` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${MEGARUBRIC_LOCK:-}" ]; then lock=$MEGARUBRIC_LOCK
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then lock=requirements/gpu.lock
else lock=requirements/cpu.lock; fi

want_packages=$(cat "$lock" requirements/gpu-te.txt | sha256sum | cut -d' ' -f1)
want_native=$(cat setup.py pyproject.toml csrc/* 2>/dev/null | sha256sum | cut -d' ' -f1)
have_packages=$(cat .venv/.packages 2>/dev/null || true)
have_native=$(cat .venv/.native 2>/dev/null || true)

if [ "$want_packages" != "$have_packages" ]; then
  if [ ! -x .venv/bin/python ]; then
    python=$(bash tools/find_python.sh)
    echo "setup: making .venv with $("$python" --version) and $lock (about 6 GB; minutes on a slow line)"
    "$python" -m venv .venv
  fi
  .venv/bin/python -m pip install -q --disable-pip-version-check uv 2>/dev/null || true
  # The lock is complete, so nothing is resolved here: what was tried together is what gets installed.
  if ! VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install -q --no-deps --compile-bytecode -r "$lock"; then
    echo "setup: uv could not install the lock, trying pip"
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r "$lock"
  fi
  if [ "$lock" = requirements/gpu.lock ] && [ "${MEGARUBRIC_TE:-1}" != 0 ]; then
    echo "setup: building Transformer Engine (about 18 minutes; MEGARUBRIC_TE=0 skips it)"
    # Against the headers of the locked CUDA packages, which torch is built with: a CUDA toolkit of this machine may be
    # another version, and seldom has those of cuDNN and NCCL. Its nvcc is only asked for its version.
    nvidia=$(.venv/bin/python -c 'import nvidia; print(list(nvidia.__path__)[0])')
    export NVTE_BUILD_USE_NVIDIA_WHEELS=1
    CPATH=$(printf '%s:' "$nvidia"/*/include)${CPATH:-}
    export CPATH=${CPATH%:}
    nvcc=$(ls -d "$nvidia"/cu*/bin/nvcc 2>/dev/null | tail -1) || true
    [ -z "$nvcc" ] || export CUDA_HOME=${nvcc%/bin/nvcc}
    # What does not import goes again: Megatron takes one that is missing, not one that is broken.
    .venv/bin/python -m pip install -q --no-build-isolation -c "$lock" -r requirements/gpu-te.txt \
      && .venv/bin/python -c 'import transformer_engine.pytorch' >/dev/null \
      || { .venv/bin/python -m pip uninstall -q -y transformer-engine transformer-engine-torch \
             transformer-engine-cu12 transformer-engine-cu13 2>/dev/null || true
           echo "setup: Transformer Engine did not build; FP8 is off, and bf16 takes plain modules (megarubric doctor)"; }
  fi
  echo "$want_packages" >.venv/.packages
  rm -f .venv/.native
  have_native=
fi

if [ "$want_native" != "$have_native" ]; then
  echo "setup: installing megarubric and compiling its ops"
  .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
  echo "$want_native" >.venv/.native
fi
