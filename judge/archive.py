"""Attempts beyond one clone: experiments.bundle holds every one that the branch does not, thin against the branch."""

from judge import ledger
from judge.lock import Refused
from judge.repository import ARCHIVE, LEDGER, REFS, Repository
from judge.transaction import Transaction


def archive(transaction: Transaction) -> str:
    """Packs every attempt's commit into one bundle and commits it; returns what happened."""
    repository = transaction.repository
    transaction.start()
    unpack(transaction)  # in a clone, what the bundle has and the new one must keep
    refs = _refs(repository, "--no-merged=HEAD")
    if not refs:
        raise Refused("nothing to archive: the branch has every experiment's commit")
    if packed(repository) == refs:
        return f"{ARCHIVE} has all {len(refs)} attempts already"
    path = repository.scratch / ARCHIVE  # one that a kill leaves is written over
    repository.git("bundle", "create", "-q", str(path), f"--glob={REFS}/*", "^HEAD")
    data = path.read_bytes()
    path.unlink()
    transaction.commit_files("archive", {ARCHIVE: data}, f"archive of {len(refs)} attempts")
    return f"{len(refs)} attempts that the branch does not hold are in {ARCHIVE}, {len(data)} bytes"


def unpack(transaction: Transaction) -> None:
    """Brings back the attempts' refs, from the committed bundle, where they are missing.

    An attempt whose name another one has here, because two clones counted on, gets a name with a suffix.
    """
    repository = transaction.repository
    present = set(_refs(repository).values())
    missing = {ref: commit for ref, commit in packed(repository).items() if commit not in present}
    wanted = [f"{ref}:{transaction.free_ref(ref)}" for ref, commit in missing.items()]
    if wanted:
        with transaction.changing_refs("unpack"):
            specs = "".join(f"{spec}\n" for spec in wanted)
            repository.git("fetch", "-q", "--no-write-fetch-head", "--stdin", ARCHIVE, data=specs.encode())


def packed(repository: Repository) -> dict[str, str]:
    """Ref → commit of what the bundle holds."""
    if not (repository.folder / ARCHIVE).exists():
        return {}
    heads = (line.split() for line in repository.git("bundle", "list-heads", ARCHIVE).splitlines())
    return {ref: commit for commit, ref in heads}


def prune(transaction: Transaction, keep: int) -> str:
    """Archives, then removes the refs of all but the last `keep` rows of the ledger; returns what happened.

    What is removed stays in the bundle or on the branch, so that every row still leads to its commit.
    """
    repository = transaction.repository
    try:
        archive(transaction)
    except Refused:
        if _refs(repository, "--no-merged=HEAD"):
            raise
    rows = ledger.read(repository.folder / LEDGER)
    old = {row.commit for row in rows[: len(rows) - keep]} - {row.commit for row in rows[len(rows) - keep :]}
    doomed = {ref: commit for ref, commit in _refs(repository).items() if commit in old}
    if doomed:
        lines = "".join(f"delete {ref} {commit}\n" for ref, commit in doomed.items())
        with transaction.changing_refs("prune"):
            repository.git("pack-refs", "--all")
            repository.git("update-ref", "--stdin", data=lines.encode())
            repository.git("repack", "-d", "-l", "-q")
    return (
        f"{len(doomed)} attempts' refs removed, {len(_refs(repository))} left; {ARCHIVE} and the branch have them all"
    )


def _refs(repository: Repository, *conditions: str) -> dict[str, str]:
    lines = repository.git("for-each-ref", "--format=%(refname) %(objectname)", *conditions, REFS).splitlines()
    return dict(line.split() for line in lines)
