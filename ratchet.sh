#!/usr/bin/env bash
# One experiment: judges the edit in kernel.py, writes one row to results.tsv, keeps the edit if the kernel got better
# and takes it back if not. Everything that decides is in prepare.py and judge/; this file only finds Python.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2

usage() {
    cat <<'EOF'
usage: ./ratchet.sh [--chip v5e|v6e|v5p|tpu7x] [--mode auto|model|chip] [--deep] "hypothesis"
       ./ratchet.sh [--chip …] [--mode …] --new-baseline "why"    start a lineage with kernel.py as it is
       ./ratchet.sh --archive                                     pack every attempt into experiments.bundle
       ./ratchet.sh --prune [N]                                   the same, then leave refs for the last N only (100)

One experiment runs at a time in a folder; a second one waits, or with --no-wait says whose turn it is and ends. Other
worktrees of the repository go on meanwhile, each on its branch, with that branch's ledger and champion. An experiment that was killed is finished or undone by the next command, whichever that is.

Edit kernel.py, and nothing else, first. Exit code 0: kept; 1: not kept; 2: could not judge, nothing changed.
EOF
}

action=--experiment
note=
options=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --chip | --mode | --trace-limit)
        [ $# -ge 2 ] || { echo "ratchet: $1 needs a value" >&2 && exit 2; }
        options+=("$1" "$2") && shift ;;
    --chip=* | --mode=* | --deep | --json | --no-wait) options+=("$1") ;;
    --new-baseline) action=--new-baseline ;;
    --archive) action=--archive ;;
    --prune)
        action=--prune=100
        case ${2-} in [0-9]*) action=--prune=$2 && shift ;; esac ;;
    --prune=*) action=$1 ;;
    --) shift && break ;;
    -*) echo "ratchet: unknown option $1" >&2 && usage >&2 && exit 2 ;;
    *)
        [ -z "$note" ] || { echo "ratchet: one note, in quotes: got '$note' and '$1'" >&2 && exit 2; }
        note=$1 ;;
    esac
    shift
done
[ $# -eq 0 ] || note=$*
case $action in --archive | --prune=*) takes_note=false ;; *) takes_note=true ;; esac
if $takes_note && [ -z "$note" ]; then
    echo "ratchet: say what you expect and why" >&2 && usage >&2 && exit 2
fi

. ./setup.sh
ensure_environment || exit
$takes_note && action=$action=$note
exec .venv/bin/python prepare.py ${options[@]+"${options[@]}"} "$action"
