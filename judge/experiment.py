"""One experiment from edit to ledger row: what ./ratchet.sh runs."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from judge import decide, ledger, pipeline, profile, report_lines
from judge.chips import Chip
from judge.contract import ContractError, Source, check_source
from judge.identity import judge_sha256
from judge.ledger_index import LedgerIndex
from judge.lock import Refused
from judge.measure.manager import chip_attached
from judge.repository import KERNEL, LEDGER, Repository
from judge.roofline import Figures
from judge.transaction import Candidate, Plan, Transaction

MAX_NOTE = 2000
# A program that failed for these may do better another time, so its hash says nothing.
_WORTH_RETRYING = ("FAIL_TIMEOUT", "FAIL_CRASH")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is printed and returned."""

    row: ledger.Row
    verdict: pipeline.Verdict
    lines: list[str]
    exit_code: int

    def as_json(self) -> dict[str, Any]:
        result = self.verdict.as_json() | {"status": self.row.status, "reason": self.row.reason}
        return result | {"commit": self.row.commit, "number": self.row.number, "lineage": self.row.lineage}


def resolve_mode(mode: str, device: str = "tpu") -> str:
    """auto → chip where a TPU is attached, else model. Raises CannotJudge for chip without one."""
    attached = chip_attached() or device == "cpu"
    if mode == "chip" and not attached:
        raise pipeline.CannotJudge("no TPU is attached to this machine; --mode model predicts without one")
    return mode if mode != "auto" else ("chip" if attached and device == "tpu" else "model")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What ./ratchet.sh was asked for."""

    note: str
    new_baseline: bool
    chip: Chip
    mode: str  # model or chip
    deep: bool = False
    limits: pipeline.Limits = field(default_factory=pipeline.Limits)
    keep: Path | None = None  # where artifacts, dumps and logs stay
    wait: bool = True  # for an experiment that runs in the repository already


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where an experiment stands: the number its row gets, the sealed problem, the champion."""

    number: int
    asked_for: bool  # by --new-baseline
    baseline: ledger.Row | None
    champion: ledger.Row | None


def find_lineage(index: LedgerIndex, chip: str, mode: str, *, new_baseline: bool) -> Lineage:
    """The newest lineage on this chip in this mode; a new one where there is none, or one is asked for."""
    newest = index.newest_lineage(chip, mode)
    if newest is None or new_baseline:
        number = index.last_lineage + 1
        return Lineage(number=number, asked_for=new_baseline, baseline=None, champion=None)
    return Lineage(number=newest, asked_for=False, baseline=index.baseline(newest), champion=index.champion(newest))


def run(folder: Path, experiment: Experiment) -> Outcome:
    """Judges the edit in kernel.py and records it. Raises Refused, LedgerError or CannotJudge, with nothing changed."""
    check_note(experiment.note)
    repository = Repository(folder)
    asked = _present_kernel(folder)
    with repository.exclusive(experiment.note, wait=experiment.wait):
        transaction = Transaction(repository)
        index = transaction.start()
        if asked != _present_kernel(folder):
            raise Refused(
                f"{KERNEL} is not what it was when this was asked for: another experiment ended meanwhile, or was "
                f"finished now; nothing was judged, look at {KERNEL} and run it again"
            )
        return judge_and_record(transaction, index, experiment, asked, index.count + 1)


def check_note(note: str) -> None:
    """Raises Refused for a hypothesis that says nothing, or too much."""
    if not note.strip():
        raise Refused('say what you expect and why: ./ratchet.sh "hypothesis"')
    if len(note) > MAX_NOTE:
        raise Refused(f"the note has {len(note)} characters; keep it under {MAX_NOTE}")


def judge_and_record(
    transaction: Transaction, index: LedgerIndex, experiment: Experiment, data: bytes, number: int
) -> Outcome:
    """The experiment on `data`, a kernel.py, where `transaction` has begun; `number` is that of its ref.

    It is compared with the champion of the moment in which it is recorded: a candidate that was judged at the same time
    may have become that meanwhile.
    """
    lineage = find_lineage(index, experiment.chip.name, experiment.mode, new_baseline=experiment.new_baseline)
    plan = Plan(
        number=number,
        lineage=lineage.number,
        chip=experiment.chip.name,
        mode=experiment.mode,
        note=experiment.note,
        judge_sha256=judge_sha256(transaction.repository.folder),
        keeps_edit=experiment.new_baseline,
    )
    if lineage.baseline and lineage.baseline.judge_sha256 != plan.judge_sha256:
        unchanged = data == transaction.repository.file_at("HEAD", KERNEL)
        _other_judge(lineage.baseline, unchanged=unchanged)
    with transaction.attempt(plan, data) as candidate:
        verdict = _judge(transaction, candidate, lineage, index, experiment)
        with transaction.recording() as present:
            index = present or index
            known, lineage = lineage.champion, _as_it_is_now(lineage, present)
            _compare(verdict, candidate, lineage, index, plan)
            row = _row(replace(plan, number=index.count + 1), candidate, verdict)
            row = transaction.record(row, lineage.champion.commit if lineage.champion else "")
    verdict.status, verdict.reason = row.status, row.reason
    confirmed = row.status == decide.DUPLICATE and lineage.champion and lineage.champion.commit == row.commit
    exit_code = 0 if row.status == decide.PASS or confirmed else 1
    lines = _lines(row, verdict, candidate, keep_edit=experiment.new_baseline)
    champion = lineage.champion
    if champion and champion != known and row.status == decide.PASS:
        told = f"row {champion.number}, kept while this was judged, is not in it"
        lines.append(f"note: {told}; git show {champion.commit[:12]} has its edit: try both together")
    return Outcome(row=row, verdict=verdict, lines=lines, exit_code=exit_code)


def _present_kernel(folder: Path) -> bytes:
    path = folder / KERNEL
    return path.read_bytes() if path.is_file() else b""


def _other_judge(baseline: ledger.Row, *, unchanged: bool) -> None:
    """Raises Refused for an edit: its figures and the champion's would be two judges'."""
    told = (
        f"this judge is not the one that lineage {baseline.lineage} was sealed with ({baseline.judge_sha256[:12]}), "
        'so figures may not compare; ./ratchet.sh --new-baseline "why" starts a lineage with it'
    )
    if not unchanged:
        raise Refused(told)
    pipeline.print_progress(f"note: {told}")


def _judge(
    transaction: Transaction, candidate: Candidate, lineage: Lineage, index: LedgerIndex, experiment: Experiment
) -> pipeline.Verdict:
    """The stages' verdict, before the comparison with the champion."""
    repository, chip, champion = transaction.repository, experiment.chip, lineage.champion
    try:
        source = check_source(candidate.data, KERNEL)
        sealed = _sealed(repository, lineage, index, source)
    except ContractError as error:
        return pipeline.Verdict(status="FAIL_CONTRACT", mode=experiment.mode, chip=chip.name, reason=str(error))
    task = pipeline.Task(
        candidate=source,
        sealed=sealed,
        chip=chip,
        mode=experiment.mode,
        limits=experiment.limits,
        champion=repository.source_at(champion.commit) if champion and experiment.mode == "chip" else None,
        deep=experiment.deep,
    )
    confirming = candidate.unchanged and champion is not None and champion.commit == candidate.commit
    with pipeline.private_folder(experiment.keep) as folder:
        if experiment.keep is None:
            transaction.judging_in(folder)
        judging = pipeline.Judging(task, folder, pipeline.print_progress)
        judge = judge_sha256(repository.folder)
        verdict = judging.run(
            lambda program: None if confirming else _known(program, index.with_program(lineage.number, program), judge)
        )
        verdict.champion_ms = judging.champion_ms
        if verdict.total and verdict.status == _decided(verdict.total, verdict, champion).status == decide.PASS:
            judging.confirm(verdict)
        profile.save(repository.folder, f"{index.count + 1:05d}-{chip.name}-{candidate.commit[:8]}", judging, verdict)
    return verdict


def _as_it_is_now(lineage: Lineage, index: LedgerIndex | None) -> Lineage:
    """The lineage with its present champion, where the ledger still has its baseline."""
    baseline = index.baseline(lineage.number) if index else None
    if index is None or baseline is None or lineage.baseline is None:
        return lineage
    if baseline.row_sha256 != lineage.baseline.row_sha256:
        return lineage
    return replace(lineage, champion=index.champion(lineage.number))


def _compare(verdict: pipeline.Verdict, candidate: Candidate, lineage: Lineage, index: LedgerIndex, plan: Plan) -> None:
    """What the comparison with the champion makes of a verdict that nothing failed."""
    champion = lineage.champion
    if verdict.status != decide.PASS or verdict.total is None:
        return
    if candidate.unchanged and champion is not None and champion.commit == candidate.commit:
        verdict.status, verdict.reason = decide.DUPLICATE, "kernel.py is the champion, unchanged: judged again"
        return
    program = verdict.program_sha256
    known = program and _known(program, index.with_program(lineage.number, program), plan.judge_sha256)
    if known:  # judged at the same time
        verdict.status, verdict.reason = decide.DUPLICATE, known
        return
    decision = _decided(verdict.total, verdict, champion)
    verdict.status, verdict.reason = decision.status, decision.reason


def _decided(total: Figures, verdict: pipeline.Verdict, champion: ledger.Row | None) -> decide.Decision:
    """Whether figures that nothing failed are better than the champion's."""
    times = {name: one.latency_ms for name, one in verdict.workloads.items()}
    champion_ms = verdict.champion_ms or (champion.workload_ms if champion else None)
    waiting = [one["dma_wait_cycles"] / one["cycles"] for one in verdict.facts.values() if one.get("cycles")]
    resolution = decide.model_resolution(waiting) if verdict.mode == "model" else 0.0
    return decide.decide(total, times, champion_ms, mode=verdict.mode, resolution=resolution)


def _known(program_sha256: str, rows: Iterable[ledger.Row], judge: str) -> str | None:
    """Which of the rows, newest first, has this very program and a verdict that would not change under this judge."""
    for row in rows:
        outdated = row.status in decide.FAILURES and row.judge_sha256 != judge
        if row.artifact_sha256 == program_sha256 and row.status not in _WORTH_RETRYING and not outdated:
            score = "" if row.score is None else f", score {row.score:.6g}"
            return f"the same compiled program as row {row.number} ({row.commit[:12]}, {row.status}{score})"
    return None


def _sealed(repository: Repository, lineage: Lineage, index: LedgerIndex, source: Source) -> Source:
    """The lineage's oracle: its baseline's kernel.py.

    The first experiment on a chip is its lineage's baseline, but may not change the problem on the quiet: it is held
    to the newest baseline of any chip. A new baseline that is asked for seals itself.
    """
    baseline = lineage.baseline
    if baseline is None and not lineage.asked_for:
        baseline = index.baseline(index.newest_based_lineage)
    return source if baseline is None else repository.source_at(baseline.commit)


def _row(plan: Plan, candidate: Candidate, verdict: pipeline.Verdict) -> ledger.Row:
    total = verdict.total
    workloads = ";".join(
        f"{name}:{one.latency_ms:.9g}:{one.util_pct:.6g}:{one.mfu_pct:.6g}:{one.mbu_pct:.6g}"
        for name, one in verdict.workloads.items()
    )
    return ledger.Row(
        commit=candidate.commit,
        score=total.score if total else None,
        status=verdict.status,
        median_ms=total.latency_ms if total else None,
        util_pct=total.util_pct if total else None,
        tflops=total.tflops if total else None,
        regime=total.regime if total else "",
        bw_util_pct=total.bw_util_pct if total else None,
        note=plan.note,
        number=plan.number,
        lineage=plan.lineage,
        chip=verdict.chip,
        mode=verdict.mode,
        mfu_pct=total.mfu_pct if total else None,
        mbu_pct=total.mbu_pct if total else None,
        workloads=workloads,
        vmem_mib=None if verdict.vmem_bytes is None else verdict.vmem_bytes / 2**20,
        spill_count=verdict.spill_count,
        copy_count=verdict.copy_count,
        seconds=round(verdict.seconds, 1),
        parent_commit=candidate.parent,
        artifact_sha256=verdict.program_sha256,
        judge_sha256=plan.judge_sha256,
        reason=verdict.reason,
    )


def _lines(row: ledger.Row, verdict: pipeline.Verdict, candidate: Candidate, *, keep_edit: bool) -> list[str]:
    """The summary, with what became of the edit."""
    lines = report_lines.summary(verdict)
    lines += [
        f"commit: {row.commit}",
        f"number: {row.number}",
        f"lineage: {row.lineage}",
        f"judge_sha256: {row.judge_sha256}",
    ]
    if candidate.unchanged:
        outcome = "kernel.py is as committed; edit it for the next experiment"
    elif row.status == decide.PASS:
        outcome = "kept"
    elif keep_edit:
        outcome = f"no baseline: {KERNEL} is as you left it"
    else:
        outcome = f"not kept: {KERNEL} is the champion's again; git show {row.commit[:12]} has the attempt"
    return [*lines, f"outcome: {outcome}", f"ledger: {LEDGER} row {row.number}"]
