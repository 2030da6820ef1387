"""judge/transaction.py: which repositories are refused, and what a kill between two steps leaves."""

import os
import signal
import subprocess
import sys

import pytest

from judge import ledger
from judge.transaction import Refused, Repository, exclusive


def row(number, candidate, status="PASS", score: float | None = 1.0, lineage=1) -> ledger.Row:
    return ledger.Row(
        **dict.fromkeys(ledger.COLUMNS[:-1])
        | {"commit": candidate.commit, "parent_commit": candidate.parent, "status": status, "score": score}
        | {"note": "a note", "number": number, "lineage": lineage, "chip": "v5e", "mode": "model", "regime": ""}
        | {"workloads": "", "artifact_sha256": "", "judge_sha256": "", "reason": ""},
    )


def attempt(project, block, status="PASS", number=None):
    """An edit of kernel.py, recorded with `status`, without a judging."""
    project.edit("BLOCK = 32 ", f"BLOCK = {block} ")
    repository = Repository(project.folder)
    with exclusive(project.folder):
        candidate = repository.candidate(f"block {block}")
        repository.record(candidate, row(number or len(project.rows()) + 1, candidate, status))
    return candidate


# --- refused ---


def detached(project):
    project.git("checkout", "-q", "--detach")


def unborn(project):
    project.git("checkout", "-q", "--orphan", "fresh")
    project.git("rm", "-rq", "--cached", ".")


def merging(project):
    project.git("checkout", "-q", "-b", "side")
    project.git("commit", "-q", "--allow-empty", "-m", "side")
    project.git("checkout", "-q", "main")
    project.git("commit", "-q", "--allow-empty", "-m", "main")
    project.git("merge", "-q", "--no-commit", "--no-ff", "side")


def index_locked(project):
    (project.folder / ".git" / "index.lock").touch()


def linked(project):
    project.kernel.rename(project.folder / "elsewhere.py")
    project.kernel.symlink_to("elsewhere.py")


def strange_judge(project):
    (project.folder / "judge" / "extra.py").write_text("pass\n")


REFUSED = [
    (strange_judge, "files in judge/ that git does not know change the judge: judge/extra.py"),
    (detached, "HEAD is detached: check out a branch first"),
    (unborn, "the branch has no commit yet: commit the project first"),
    (merging, "a git operation is in progress (MERGE_HEAD): finish or abort it first"),
    (index_locked, "index.lock exists: another git is running, or one was killed; remove it then"),
    (linked, "kernel.py is a symbolic link"),
]


@pytest.mark.parametrize(("make", "told"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_refused_with_advice(project, make, told):
    make(project)
    before = project.state()
    done = project.ratchet("try")
    assert done.code == 2
    assert done.err.startswith("ratchet: ")
    assert told in done.err
    assert len(done.err.splitlines()) == 1
    assert project.state() == before


def test_no_repository(project):
    (project.folder / ".git").rename(project.folder / "not git")
    done = project.ratchet("try")
    assert done.code == 2
    assert "is not a git repository: run git init and commit first" in done.err


# --- recorded ---


def test_record_touches_nothing_else(project):
    (project.folder / "mine.txt").write_text("untracked\n")
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    project.git("add", "kernel.py")  # a staged edit is an edit
    repository = Repository(project.folder)
    with exclusive(project.folder):
        candidate = repository.candidate("staged")
        repository.record(candidate, row(1, candidate, "REGRESSION"))
    assert project.git("status", "--porcelain") == "?? mine.txt\n"
    assert "BLOCK = 32 " in project.kernel.read_text()
    assert project.git("log", "--format=%s") == "ledger 1: REGRESSION score=1\nstart\n"


def test_kernel_edited_meanwhile_is_left(project):
    repository = Repository(project.folder)
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    with exclusive(project.folder):
        candidate = repository.candidate("first")
        project.edit("BLOCK = 64 ", "BLOCK = 128 ")
        repository.record(candidate, row(1, candidate, "REGRESSION"))
    assert "BLOCK = 128 " in project.kernel.read_text()
    assert project.git("status", "--porcelain") == " M kernel.py\n"


def test_branch_that_moved_meanwhile_is_left(project):
    repository = Repository(project.folder)
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    with exclusive(project.folder):
        candidate = repository.candidate("first")
        project.git("commit", "-q", "--allow-empty", "-m", "theirs")
        before = project.state()
        with pytest.raises(Refused, match="the branch moved while the experiment ran: nothing was recorded"):
            repository.record(candidate, row(1, candidate))
    after = project.state()
    assert after.pop("refs").replace(f"{candidate.commit} commit\trefs/ratchet/1/1\n", "") == before.pop("refs")
    assert after == before


def test_attempts_of_two_branches_do_not_overwrite_each_other(project):
    first = attempt(project, 64, "REGRESSION")
    project.git("checkout", "-q", "-b", "other", "HEAD^")
    second = attempt(project, 128, "REGRESSION")
    assert project.git("rev-parse", "refs/ratchet/1/1").strip() == first.commit
    assert project.git("rev-parse", "refs/ratchet/1/1-2").strip() == second.commit


def test_identity_is_not_needed(project):
    for name in ("user.name", "user.email"):
        project.git("config", name, "")
    candidate = attempt(project, 64)
    assert project.git("log", "-1", "--format=%an <%ae>", candidate.commit) == "Ratchet <ratchet@localhost>\n"


def test_bad_row_is_never_written(project):
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    repository = Repository(project.folder)
    candidate = repository.candidate("first")
    before = project.state()
    for bad in (row(2, candidate), row(1, candidate, "WON"), row(1, candidate, score=float("inf"))):
        with exclusive(project.folder), pytest.raises(ledger.LedgerError):
            repository.record(candidate, bad)
    assert project.state() == before


# --- killed ---


class Killed(BaseException):
    """Stands for SIGKILL between two steps."""


class Mortal(Repository):
    def _settle(self, head: str, rejected: str) -> None:
        raise Killed


@pytest.mark.parametrize(("status", "block"), [("PASS", "64"), ("REGRESSION", "32")])
def test_killed_after_the_branch_moved(project, status, block):
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    repository = Mortal(project.folder)
    with exclusive(project.folder), pytest.raises(Killed):
        candidate = repository.candidate("first")
        repository.record(candidate, row(1, candidate, status))
    assert not project.ledger.exists()
    assert project.ratchet("--archive").code == 2  # refused, not made worse
    Repository(project.folder).finish_interrupted()
    assert [kept.status for kept in project.rows()] == [status]
    assert project.git("status", "--porcelain") == ""
    assert f"BLOCK = {block} " in project.kernel.read_text()
    Repository(project.folder).check_ready()


def test_hand_edit_after_a_kill_is_not_overwritten(project):
    attempt(project, 64)
    project.edit("BLOCK = 64 ", "BLOCK = 128 ")
    repository = Mortal(project.folder)
    with exclusive(project.folder), pytest.raises(Killed):
        candidate = repository.candidate("second")
        repository.record(candidate, row(2, candidate))
    project.ledger.write_text("mine\n")
    Repository(project.folder).finish_interrupted()
    assert project.ledger.read_text() == "mine\n"
    with pytest.raises(ledger.LedgerError, match=r"^results.tsv:1: "):
        Repository(project.folder).check_ready()


def test_last_row_removed_by_hand_is_not_taken_for_a_kill(project):
    attempt(project, 64)
    text = project.ledger.read_text()
    project.ledger.write_text(text.splitlines(keepends=True)[0])
    Repository(project.folder).finish_interrupted()
    with pytest.raises(Refused, match=r"^results.tsv:2: differs from the committed ledger"):
        Repository(project.folder).check_ready()


def test_signals_wait_until_the_row_is_durable(project):
    script = (
        "import os, signal, sys; from pathlib import Path; from judge.transaction import _signals_ignored\n"
        "with _signals_ignored():\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): os.kill(os.getpid(), number)\n"
        "    print('still here', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=project.folder, capture_output=True, text=True, check=False
    )
    assert done.stdout == "still here\n"
    assert done.returncode == -signal.SIGTERM


def test_lock_of_a_dead_experiment_is_free(project):
    with exclusive(project.folder):
        assert (project.folder / ".ratchet" / "lock").read_text() == str(os.getpid())
        with pytest.raises(Refused, match=f"process {os.getpid()}"), exclusive(project.folder):
            pass
    with exclusive(project.folder):
        pass
