#!/usr/bin/env python3
"""The judge's command: judges a kernel file and prints what it found.

./ratchet.sh runs it for an experiment; `--dry-run` judges any file that follows the contract, outside git and ledger;
`--audit` verifies ledger and git; `--explain` says where a kernel's cycles go. Exit code 0: kept, PASS in a dry run, or
explained; 1: a candidate that is not kept, or gives nothing to explain; 2: the tool could not judge.
"""

import sys

if __name__ == "__main__":
    # A file here must not stand in for an installed module; in an isolated interpreter the folder is not there yet.
    sys.path.append(__file__.rpartition("/")[0] or ".")
    if not sys.flags.isolated:
        sys.path.pop(0)

import argparse
import dataclasses  # noqa: F401 - this and others: Python's own, whose compiled files may be read
import hashlib  # noqa: F401
import json
import signal
import tempfile  # noqa: F401
import tomllib  # noqa: F401
import traceback
from pathlib import Path

sys.pycache_prefix = "/dev/null"  # those of judge/ may be anybody's
from judge import identity  # noqa: E402
from judge.chips import CHIPS, DEFAULT_CHIP, load_chip  # noqa: E402

sys.pycache_prefix = None

ROOT = identity.root_of(Path(__file__))  # the project, also where this is the judge's copy of itself


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_argument_group("what to do (default: --dry-run)")
    what.add_argument("--dry-run", action="store_true", help="judge a file, outside git and ledger")
    what.add_argument(
        "--experiment", metavar="NOTE", help="judge the edit in kernel.py, record it, keep it or take it back"
    )
    what.add_argument(
        "--candidate",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="judge FILE as the next kernel.py, at the same time as other candidates, and record each as it ends;\n"
        "repeatable, each with its --note NOTE",
    )
    what.add_argument("--new-baseline", metavar="WHY", help="start a lineage with kernel.py as it is")
    what.add_argument("--audit", action="store_true", help="verify ledger and git; exit 1 with the rows named if not")
    what.add_argument("--archive", action="store_true", help="pack every attempt into experiments.bundle and commit it")
    what.add_argument(
        "--prune",
        metavar="N",
        type=int,
        help="archive, then drop the refs of all attempts but the last N: branch and bundle still have them",
    )
    what.add_argument(
        "--explain",
        action="store_true",
        help="where the cycles of the last experiment go, or those of --kernel FILE, and what\n"
        "changed against the champion; predicted, without the check of correctness",
    )
    parser.add_argument(
        "--kernel", metavar="FILE", type=Path, help="the file of a dry run (default kernel.py) or to explain"
    )
    parser.add_argument("--chip", default=DEFAULT_CHIP, help=f"one of {', '.join(CHIPS)}; default {DEFAULT_CHIP}")
    parser.add_argument(
        "--mode",
        choices=("auto", "model", "chip"),
        default="auto",
        help="model: predicted, needs no TPU; chip: measured on the attached one;\n"
        "auto: chip where one is attached, else model",
    )
    parser.add_argument(
        "--workload",
        metavar="NAME",
        action="append",
        default=[],
        help="only this one (dry run or --explain; repeatable)",
    )
    parser.add_argument("--note", metavar="NOTE", action="append", default=[], help="a candidate's hypothesis")
    parser.add_argument(
        "--jobs", metavar="N", type=int, help="candidates judged at the same time; default: as cores and memory allow"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument(
        "--deep", action="store_true", help="on a chip, trace synchronisation too; nothing more in model mode"
    )
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="keep artifacts, dumps and logs in DIR (it is emptied first)"
    )
    parser.add_argument(
        "--trace-limit", metavar="S", type=float, default=120.0, help="seconds to trace each workload; default 120"
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="where another experiment runs in this folder, say so and end"
    )
    parser.add_argument(
        "--require-sandbox",
        action="store_true",
        help="exit 2 where this machine lacks what contains a kernel file,\ninstead of saying so and going on",
    )
    parser.add_argument(
        "--rejudge", metavar="N", type=int, default=0, help="with --audit: judge the last N kept commits again, too"
    )
    parser.add_argument("--device", choices=("tpu", "cpu"), default="tpu", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = [options.experiment is not None, options.new_baseline is not None, options.audit, options.archive]
    chosen += [options.prune is not None, bool(options.candidate)]
    if sum([options.dry_run, options.explain, *chosen]) > 1:
        parser.error(
            "choose one of --dry-run, --experiment, --new-baseline, --audit, --archive, --prune, --explain, --candidate"
        )
    if options.explain and (options.mode == "chip" or options.device != "tpu"):
        parser.error("--explain reads the predicted run: --mode chip and --device have nothing for it")
    if any(chosen) and (options.workload or options.device != "tpu"):
        parser.error("--workload and --device are for dry runs: an experiment is judged on everything")
    check_candidates(parser, options)
    if options.prune is not None and options.prune < 0:
        parser.error("--prune N: how many attempts' refs to leave, 0 or more")
    if options.rejudge < 0 or (options.rejudge and not options.audit):
        parser.error("--rejudge N goes with --audit, N at least 1")
    if not options.trace_limit > 0:
        parser.error("--trace-limit must be positive")
    return options


def check_candidates(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if len(options.candidate) != len(options.note):
        parser.error("each --candidate FILE needs its --note NOTE, and each note its file")
    if options.candidate and options.keep:
        parser.error("--keep has room for one: judge a candidate by itself")
    if options.jobs is not None and (options.jobs < 1 or not options.candidate):
        parser.error("--jobs N: how many of the candidates are judged at the same time, 1 or more")


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun
    options = parse_arguments()
    try:
        identity.check(ROOT)
        load_chip(options.chip)
        identity.run_from_copy(ROOT, Path(__file__), sys.argv[1:])
    except Exception as error:  # exit code 1 would say that the candidate is worse
        if not isinstance(error, (identity.Tampered, ValueError, OSError)):
            traceback.print_exc()
        print(f"ratchet: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"status": None, "error": str(error)}))
        return 2
    from judge import command  # in the copy, so that what goes before starts fast

    return command.main(options)


if __name__ == "__main__":
    sys.exit(main())
