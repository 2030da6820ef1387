#!/usr/bin/env bash
# Everything that must hold before a change lands: ruff, mypy, pytest.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./test.sh              lint, check types, run all tests on every core; stop at the first step that fails
       ./test.sh ARGUMENT...  only pytest, with these arguments: no lint, no type check
       ./test.sh --help       this text

The first run makes .venv from requirements.lock. Paths are relative to the repository, whatever the current folder.

    ./test.sh tests/test_decide.py    one file
    ./test.sh -k seal -x              tests with "seal" in their names, up to the first failure
    ./test.sh -m 'not slow'           without the slow ones

Exit codes: 0 all passed; 2 the environment cannot be made (one line says why); otherwise that of the step that failed.
HELP
}

case ${1-} in
  -h | --help)
    usage
    exit 0
    ;;
esac

cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source ./setup.sh
ensure_environment || exit
python=$PWD/.venv/bin/python

# Names the step, and shows what it said only when it fails.
check() {
  local name=$1 said
  shift
  printf '%-12s' "$name" >&2
  if said=$("$python" -m "$@" 2>&1); then
    echo ok >&2
  else
    local code=$?
    printf 'failed\n%s\n' "$said" >&2
    exit "$code"
  fi
}

if (($# == 0)); then
  check ruff ruff check
  check 'ruff format' ruff format --check
  check mypy mypy
  set -- -n auto --maxprocesses 4 --dist worksteal # a process a core, while memory allows it
fi
exec "$python" -m pytest "$@"
