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
import json
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

from judge import containment, contract, experiment, explain, identity, parallel, pipeline, profile, report_lines
from judge.archive import archive, prune
from judge.audit import audit, rejudge
from judge.chips import CHIPS, DEFAULT_CHIP, load_chip
from judge.ledger import LedgerError
from judge.lock import Refused
from judge.repository import Repository
from judge.transaction import Transaction

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
        "--trace-limit", metavar="S", type=float, default=120.0, help="seconds to import and trace; default 120"
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


def dry_run(options: argparse.Namespace) -> int:
    """Judges the file against itself; prints the summary."""
    chip, kernel = load_chip(options.chip), options.kernel or ROOT / "kernel.py"
    mode = experiment.resolve_mode(options.mode, options.device)
    try:
        source = contract.read_source(kernel)
    except contract.ContractError as error:
        verdict = pipeline.Verdict(status="FAIL_CONTRACT", mode=mode, chip=chip.name, reason=str(error))
    else:
        task = pipeline.Task(
            candidate=source,
            sealed=source,
            chip=chip,
            mode=mode,
            workloads=tuple(options.workload),
            limits=pipeline.Limits(trace_seconds=options.trace_limit),
            device=options.device,
            deep=options.deep,
        )
        with pipeline.private_folder(options.keep) as folder:
            judging = pipeline.Judging(task, folder, pipeline.print_progress)
            verdict = judging.run()
            profile.save(ROOT, f"dry-{chip.name}-{kernel.stem}", judging, verdict)
    print("\n".join(report_lines.summary(verdict)))
    if options.json:
        print(json.dumps(verdict.as_json()))
    return 0 if verdict.status == "PASS" else 1


def check_machine(*, required: bool) -> None:
    """Says once what this machine lacks to contain a kernel file. Raises CannotJudge where that is not enough."""
    lacks = "; ".join(containment.missing())
    if lacks and required:
        raise pipeline.CannotJudge(f"--require-sandbox: this machine does not offer {lacks}")
    if lacks:
        pipeline.print_progress(f"note: this machine does not offer {lacks}")


def explain_run(options: argparse.Namespace) -> int:
    """Explains options.kernel, or the last experiment; prints the report."""
    chip = load_chip(options.chip)
    try:
        if options.kernel is None:
            subject = explain.last_experiment(ROOT, chip.name)
        else:
            subject = explain.kernel_file(ROOT, options.kernel, chip.name)
    except contract.ContractError as error:
        print(f"status: FAIL_CONTRACT\nreason: {error}")
        if options.json:
            print(json.dumps({"status": "FAIL_CONTRACT", "chip": chip.name, "reason": str(error)}))
        return 1
    limits = pipeline.Limits(trace_seconds=options.trace_limit)
    report = explain.run(subject, chip, tuple(options.workload), limits)
    print("\n".join(report.lines()))
    if options.json:
        print(report.as_json())
    return 0 if report.workloads else 1


def run(options: argparse.Namespace) -> int:
    identity.check(ROOT)
    load_chip(options.chip)
    identity.run_from_copy(ROOT, Path(__file__), sys.argv[1:])
    if not options.archive and (not options.audit or options.rejudge):
        check_machine(required=options.require_sandbox)
    if options.audit:
        findings = audit(ROOT)
        if options.rejudge and not findings:
            findings = rejudge(ROOT, options.rejudge, pipeline.print_progress)
        print("\n".join(findings) or "audit: ledger and git agree")
        return 1 if findings else 0
    if options.explain:
        return explain_run(options)
    if options.archive or options.prune is not None:
        repository = Repository(ROOT)
        with repository.exclusive("archive" if options.archive else "prune", wait=not options.no_wait):
            transaction = Transaction(repository)
            print(
                f"archive: {archive(transaction)}" if options.archive else f"prune: {prune(transaction, options.prune)}"
            )
        return 0
    if options.candidate:
        return run_candidates(options)
    if options.experiment is None and options.new_baseline is None:
        return dry_run(options)
    note = options.experiment if options.new_baseline is None else options.new_baseline
    return report(experiment.run(ROOT, asked_for(options, note)), options)


def asked_for(options: argparse.Namespace, note: str) -> experiment.Experiment:
    return experiment.Experiment(
        note=note,
        new_baseline=options.new_baseline is not None,
        chip=load_chip(options.chip),
        mode=experiment.resolve_mode(options.mode, options.device),
        deep=options.deep,
        limits=pipeline.Limits(trace_seconds=options.trace_limit),
        keep=options.keep,
        wait=not options.no_wait,
    )


def report(outcome: experiment.Outcome, options: argparse.Namespace) -> int:
    print("\n".join(outcome.lines))
    if options.json:
        print(json.dumps(outcome.as_json()))
    return outcome.exit_code


def run_candidates(options: argparse.Namespace) -> int:
    """Exit code 2 where one could not be judged, else 0 where one was kept, else 1."""
    asked = asked_for(options, "")
    jobs = options.jobs or parallel.default_jobs(asked.mode)
    if asked.mode == "chip" and jobs > 1:
        raise Refused("a chip measures one candidate at a time: --jobs 1")
    candidates = parallel.read_candidates(list(zip(options.candidate, options.note, strict=True)))
    results: dict[str, parallel.Ended] = {}

    def work(judge: Callable[[], experiment.Outcome]) -> int:
        return ended(lambda: report(judge(), options), options)

    def show(one: parallel.Ended) -> None:
        results[one.candidate.name] = one
        text = one.text or f"not judged: exit code {one.exit_code}\n"
        print(f"candidate: {one.candidate.name}: {one.candidate.note}\n{text}", flush=True)

    parallel.Several(folder=ROOT, asked=asked, candidates=candidates, jobs=jobs).run(work, show)
    codes = [one.exit_code for one in results.values()]
    for told, wanted in (("kept", {0}), ("not kept", {1}), ("not judged", set(codes) - {0, 1})):
        print(f"{told}: {', '.join(name for name, one in results.items() if one.exit_code in wanted) or 'none'}")
    if options.json:
        print(json.dumps({"candidates": [one.as_json() for one in results.values()]}))
    return 2 if set(codes) - {0, 1} else min(codes)


class Interrupted(BaseException):
    """A signal asked this process to end; its argument is the exit code."""


def interrupt(number: int, frame: object) -> None:
    raise Interrupted(128 + number)


def ended(act: Callable[[], int], options: argparse.Namespace) -> int:
    """The exit code of `act`, or of what it raises, which is said."""
    try:
        return act()
    except (Refused, LedgerError, identity.Tampered, pipeline.CannotJudge, ValueError, OSError) as error:
        message = str(error)
    except Interrupted as signalled:
        told = "nothing was recorded, kernel.py is as you left it"
        if options.candidate:
            told = "what had no verdict is undone"
        print(f"ratchet: interrupted; {told}", file=sys.stderr)
        return int(signalled.args[0])
    except Exception as error:  # exit code 1 would say that the candidate is worse
        traceback.print_exc()
        message = f"the judge itself failed: {type(error).__name__}: {error}"
    print(f"ratchet: {message}", file=sys.stderr)
    if options.json:
        print(json.dumps({"status": None, "error": message}))
    return 2


def main() -> int:
    options = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    return ended(lambda: run(options), options)


if __name__ == "__main__":
    sys.exit(main())
