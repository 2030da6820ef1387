"""What prepare.py does, once the judge runs from its copy: judge, record, audit, explain.

Exit code 0: kept, PASS in a dry run, or explained; 1: a candidate that is not kept, or gives nothing to explain; 2: the
tool could not judge.
"""

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable

from judge import containment, contract, experiment, explain, identity, parallel, pipeline, profile, report_lines
from judge.archive import archive, prune
from judge.audit import audit, rejudge
from judge.chips import load_chip
from judge.ledger import LedgerError
from judge.lock import Refused
from judge.pipeline import ROOT
from judge.repository import Repository
from judge.transaction import Transaction


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
    report = explain.run(subject, chip, tuple(options.workload), limits, options.keep)
    print("\n".join(report.lines()))
    if options.json:
        print(report.as_json())
    return 0 if report.workloads else 1


def run(options: argparse.Namespace) -> int:
    """Does what was asked for, in the judge's copy of itself. Returns the exit code."""
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


def main(options: argparse.Namespace) -> int:
    """Exit code of the whole command."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    return ended(lambda: run(options), options)
