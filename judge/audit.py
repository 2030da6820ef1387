"""Does the ledger say what git has? The chain of hashes, every row's commit, kept ones on the branch, none gone."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from judge import ledger, pipeline
from judge.archive import unpack
from judge.chips import load_chip
from judge.decide import PASS
from judge.identity import judge_sha256
from judge.lock import Refused
from judge.repository import KERNEL, LEDGER, Repository
from judge.transaction import Transaction, check_ledger

CHIP_NOISE = 0.1  # of a measured time, between one day and another


def audit(folder: Path) -> list[str]:
    """Everything that does not hold, a line each, the row named; empty when all holds."""
    try:
        rows = ledger.read(folder / LEDGER)
    except ledger.LedgerError as error:
        return [str(error)]
    try:
        repository = Repository(folder)
        if not all(kind == "commit" for kind in repository.kinds(row.commit for row in rows)):
            with repository.exclusive("audit"):
                unpack(Transaction(repository))
        check_ledger(repository)
    except (Refused, ledger.LedgerError) as error:
        return [str(error)]
    findings = []
    champions: dict[int, float] = {}
    commits = repository.kinds(row.commit for row in rows)
    kernels = repository.kinds(f"{row.commit}:{KERNEL}" for row in rows)
    present = [row.commit for row, kind in zip(rows, kernels, strict=True) if kind == "blob"]
    damaged = repository.damaged(dict.fromkeys(present), KERNEL)
    branch = set(repository.git("rev-list", "HEAD").splitlines())
    where_else = "git fetch --unshallow may bring it" if repository.is_shallow else "nor in the archive"
    for line, (row, commit, kernel) in enumerate(zip(rows, commits, kernels, strict=True), 2):
        where = f"{LEDGER}:{line}: row {row.number} ({row.status})"
        if commit != "commit":
            findings.append(f"{where}: commit {row.commit} does not exist here, {where_else}")
        elif row.status == "PASS" and row.commit not in branch:
            findings.append(f"{where}: kept, but commit {row.commit} is not on the branch")
        elif kernel != "blob":
            findings.append(f"{where}: commit {row.commit} has no {KERNEL}")
        elif row.commit in damaged:
            findings.append(f"{where}: {damaged[row.commit]}")
        if row.status == "PASS":
            if row.score is None:
                findings.append(f"{where}: kept without a score")
            elif row.mode == "model" and row.lineage in champions and row.score <= champions[row.lineage]:
                findings.append(f"{where}: kept with a score not above its champion's")
            else:
                champions[row.lineage] = row.score
    return findings + _rows_gone(repository, rows)


def _rows_gone(repository: Repository, rows: list[ledger.Row]) -> list[str]:
    """Rows that a commit of the branch has and the ledger has no more, unless that was another ledger altogether.

    Only where a commit made the file shorter: the judge's own only ever add to it.
    """
    commits = repository.git("log", "--format=%H", "HEAD", "--", LEDGER).split()
    sizes = repository.sizes_bytes(f"{commit}:{LEDGER}" for commit in commits)
    present, findings = {row.row_sha256 for row in rows}, []
    for (newer, size), (older, size_before) in pairwise(zip(commits, sizes, strict=True)):
        if size >= size_before:
            continue
        try:
            before = ledger.parse((repository.file_at(older, LEDGER) or b"").decode(errors="replace"))
        except ledger.LedgerError:  # which somebody has put right since
            continue
        gone = [str(row.number) for row in before if row.row_sha256 not in present]
        if gone and rows and rows[0].row_sha256 == before[0].row_sha256:
            told = f"row {', '.join(gone)}, which commit {older[:12]} has, gone since commit {newer[:12]}"
            findings.append(f"{LEDGER}: {told}; git checkout {older[:12]} {LEDGER} brings back what it had")
    return findings


def rejudge(folder: Path, count: int, progress: Callable[[str], None]) -> list[str]:
    """Judges the last `count` kept commits again; a line for each whose figures are not the row's.

    To the digit in model mode, within CHIP_NOISE in chip mode. A row of another version of the judge is named: what
    this one finds of it would say nothing about it.
    """
    rows = ledger.read(folder / LEDGER)
    repository = Repository(folder)
    findings, own = [], judge_sha256(folder)
    for row in [row for row in rows if row.status == PASS][-count:]:
        where = f"row {row.number} ({row.commit[:12]}, {row.chip})"
        if row.judge_sha256 != own:
            findings.append(f"{where}: judged by another judge ({row.judge_sha256[:12]}), cannot be judged again")
            continue
        progress(f"rejudging {where}")
        baseline = next(kept for kept in ledger.kept(rows, row.lineage))
        task = pipeline.Task(
            candidate=repository.source_at(row.commit),
            sealed=repository.source_at(baseline.commit),
            chip=load_chip(row.chip),
            mode=row.mode,
            anew=True,
        )
        with pipeline.private_folder() as private:
            verdict = pipeline.Judging(task, private, progress).run()
        findings += [f"{where}: {told}" for told in _deviations(row, verdict)]
    return findings


def _deviations(row: ledger.Row, verdict: pipeline.Verdict) -> list[str]:
    """What a new verdict says otherwise than its row."""
    if verdict.status != PASS:
        return [f"is {verdict.status} now: {verdict.reason}"]
    times = {name: figures.latency_ms for name, figures in verdict.workloads.items()}
    if list(times) != list(row.workload_ms):
        return [f"has the workloads {', '.join(times)} now"]
    exact = row.mode == "model"
    found = []
    for name, then in row.workload_ms.items():
        now = times[name]
        same = f"{now:.9g}" == f"{then:.9g}" if exact else abs(now / then - 1) <= CHIP_NOISE
        if not same:
            found.append(f"workload {name} takes {now:.9g} ms now, {then:.9g} ms in the row")
    return found
