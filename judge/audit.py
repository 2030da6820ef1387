"""Does the ledger say what git has? The chain of hashes, every row's commit, kept ones on the branch."""

from pathlib import Path

from judge import ledger
from judge.archive import unpack
from judge.lock import Refused
from judge.repository import KERNEL, LEDGER, Repository
from judge.transaction import Transaction, check_ledger


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
        if row.status == "PASS":
            if row.score is None:
                findings.append(f"{where}: kept without a score")
            elif row.mode == "model" and row.lineage in champions and row.score <= champions[row.lineage]:
                findings.append(f"{where}: kept with a score not above its champion's")
            else:
                champions[row.lineage] = row.score
    return findings
