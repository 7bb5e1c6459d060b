#!/usr/bin/env bash
# Prints a Python 3.12+ interpreter of this machine, or says in one line that there is none.
# Looked for, in order: $PYTHON, python3.12, 3.13, 3.14 and python3 on PATH, pyenv's versions, uv's.
good() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

candidates=("${PYTHON:-}" python3.12 python3.13 python3)
for root in "${PYENV_ROOT:-$HOME/.pyenv}"; do
  for version in 3.12 3.13; do
    for path in "$root"/versions/"$version"*/bin/python; do candidates+=("$path"); done
  done
done
candidates+=(python3.14)
for candidate in "${candidates[@]}"; do
  [ -n "$candidate" ] || continue
  path=$(command -v "$candidate" 2>/dev/null) || continue
  if good "$path"; then
    "$path" -c 'import sys; print(sys.executable)'
    exit 0
  fi
done
if command -v uv >/dev/null 2>&1 && path=$(uv python find '>=3.12' 2>/dev/null) && good "$path"; then
  echo "$path"
  exit 0
fi
echo "megarubric needs Python 3.12 or newer and found none: install one (pyenv install 3.12, uv python install 3.12, or your system's packages) or set PYTHON=/path/to/python3.12" >&2
exit 2
