#!/usr/bin/env bash
# One experiment: judges the edit in kernel.py, writes one row to results.tsv, keeps the edit if the kernel got better
# and takes it back if not. Everything that decides is in prepare.py and judge/; this file only finds Python.
set -u
called_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2

usage() {
    cat <<'EOF'
usage: ./ratchet.sh [--chip v5e|v6e|v5p|tpu7x] [--mode auto|model|chip] [--deep] "hypothesis"
       ./ratchet.sh [--chip …] [--mode …] [--jobs N] --parallel FILE "hypothesis" [FILE "hypothesis"]…
       ./ratchet.sh [--chip …] [--mode …] --new-baseline "why"    start a lineage with kernel.py as it is
       ./ratchet.sh --archive                                     pack every attempt into experiments.bundle
       ./ratchet.sh --prune [N]                                   the same, then leave refs for the last N only (100)

One experiment runs at a time in a folder; a second one waits, or with --no-wait says whose turn it is and ends. Other
worktrees of the repository go on meanwhile, each on its branch with that branch's ledger and champion. An experiment
that was killed is finished or undone by the next command, whichever that is.

--parallel takes whole files in the place of kernel.py. They are judged at the same time, --jobs N of them (default: as
cores and memory allow), and recorded one after the other as they end, each compared with the champion of that moment.
Exit code 0: one was kept at least, and kernel.py is the best; 1: none; 2: one could not be judged, the rest is recorded.

Else edit kernel.py, and nothing else, first. Exit code 0: kept; 1: not kept; 2: could not judge, nothing changed.
EOF
}

action=--experiment
note=
options=()
candidates=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --chip | --mode | --trace-limit | --jobs)
        [ $# -ge 2 ] || { echo "ratchet: $1 needs a value" >&2 && exit 2; }
        options+=("$1" "$2") && shift ;;
    --chip=* | --mode=* | --jobs=* | --deep | --json | --no-wait) options+=("$1") ;;
    --parallel)
        action=--parallel
        while [ $# -ge 3 ] && [ "${2#--}" = "$2" ]; do
            file=$2
            [ "${file#/}" != "$file" ] || [ "$called_in" = "$PWD" ] || file=$called_in/$file
            candidates+=("--candidate=$file" "--note=$3") && shift 2
        done
        [ ${#candidates[@]} -gt 0 ] || { echo "ratchet: --parallel FILE \"hypothesis\" …" >&2 && usage >&2 && exit 2; } ;;
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
case $action in --archive | --prune=* | --parallel) takes_note=false ;; *) takes_note=true ;; esac
if [ $action = --parallel ] && [ -n "$note" ]; then
    echo "ratchet: each file needs its hypothesis: '$note' has none" >&2 && usage >&2 && exit 2
fi
if $takes_note && [ -z "$note" ]; then
    echo "ratchet: say what you expect and why" >&2 && usage >&2 && exit 2
fi

. ./setup.sh
ensure_environment || exit
[ $action != --parallel ] || exec .venv/bin/python -I prepare.py ${options[@]+"${options[@]}"} "${candidates[@]}"
$takes_note && action=$action=$note
exec .venv/bin/python -I prepare.py ${options[@]+"${options[@]}"} "$action"
