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
    --chip=* | --mode=* | --deep | --json) options+=("$1") ;;
    --new-baseline) action=--new-baseline ;;
    --archive) action=--archive ;;
    --) shift && break ;;
    -*) echo "ratchet: unknown option $1" >&2 && usage >&2 && exit 2 ;;
    *)
        [ -z "$note" ] || { echo "ratchet: one note, in quotes: got '$note' and '$1'" >&2 && exit 2; }
        note=$1 ;;
    esac
    shift
done
[ $# -eq 0 ] || note=$*
if [ "$action" != --archive ] && [ -z "$note" ]; then
    echo "ratchet: say what you expect and why" >&2 && usage >&2 && exit 2
fi

. ./setup.sh
ensure_environment || exit
if [ "$action" = --archive ]; then
    exec .venv/bin/python prepare.py --archive
fi
exec .venv/bin/python prepare.py ${options[@]+"${options[@]}"} "$action=$note"
