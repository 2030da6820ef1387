"""judge/transaction.py: which repositories are refused, and what a kill between two steps leaves."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from contextlib import contextmanager
from dataclasses import replace

import pytest

from judge import ledger
from judge.audit import audit
from judge.lock import Refused
from judge.repository import Repository
from judge.transaction import Plan, Transaction


def row(number, candidate, status="PASS", score: float | None = 1.0, lineage=1) -> ledger.Row:
    return ledger.Row(
        **dict.fromkeys(ledger.COLUMNS[:-1])
        | {"commit": candidate.commit, "parent_commit": candidate.parent, "status": status, "score": score}
        | {"note": "a note", "number": number, "lineage": lineage, "chip": "v5e", "mode": "model", "regime": ""}
        | {"workloads": "", "artifact_sha256": "", "judge_sha256": "", "reason": ""},
    )


@contextmanager
def attempting(project, note="a note", lineage=1):
    """(transaction, candidate) of what is in kernel.py, as experiment.run has them."""
    repository = Repository(project.folder)
    with repository.exclusive(note):
        transaction = Transaction(repository)
        number = transaction.start().count + 1
        plan = Plan(number=number, lineage=lineage, chip="v5e", mode="model", note=note, judge_sha256="")
        with transaction.attempt(plan, project.kernel.read_bytes()) as candidate:
            yield transaction, candidate


def attempt(project, block, status="PASS"):
    """An edit of kernel.py, recorded with `status`, without a judging."""
    project.edit("BLOCK = 32 ", f"BLOCK = {block} ")
    with attempting(project, f"block {block}") as (transaction, candidate):
        transaction.record(row(len(project.rows()) + 1, candidate, status))
    return candidate


def test_git_gives_another_object_in_place_of_the_sealed_file(project):
    candidate = attempt(project, 64)
    names = [project.git("rev-parse", name).strip() for name in (f"{candidate.commit}:kernel.py", "HEAD:README.md")]
    project.git("replace", *names)
    assert Repository(project.folder).source_at(candidate.commit).text == project.kernel.read_text()
    assert audit(project.folder) == []


def test_the_object_of_the_sealed_file_has_other_content(project):
    committed = project.kernel.read_text()
    candidate = attempt(project, 64)
    repository = Repository(project.folder)
    blob = project.git("rev-parse", f"{candidate.commit}:kernel.py").strip()
    path = project.folder / ".git" / "objects" / blob[:2] / blob[2:]
    path.chmod(0o644)
    path.write_bytes(zlib.compress(b"blob 5\0lies\n"))
    with pytest.raises(Refused, match="is not what its name says: git fsck"):
        repository.source_at(candidate.commit)
    assert repository.source_at(candidate.parent).text == committed
    assert [line for line in audit(project.folder) if "row 1" in line and "is not what its name says" in line]


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
    with attempting(project) as (transaction, candidate):
        (project.folder / "README.md").write_text("written and staged meanwhile\n")
        project.git("add", "README.md")
        transaction.record(row(1, candidate, "REGRESSION"))
    assert project.git("status", "--porcelain") == "M  README.md\n?? mine.txt\n"
    assert "BLOCK = 32 " in project.kernel.read_text()
    assert project.git("log", "--format=%s") == "ledger 1: REGRESSION score=1\nstart\n"


def test_kernel_edited_meanwhile_is_left(project):
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    with attempting(project) as (transaction, candidate):
        project.edit("BLOCK = 64 ", "BLOCK = 128 ")
        transaction.record(row(1, candidate, "REGRESSION"))
    assert "BLOCK = 128 " in project.kernel.read_text()
    assert project.git("status", "--porcelain") == " M kernel.py\n"


@pytest.mark.parametrize("status", ["PASS", "REGRESSION"])
def test_branch_that_moved_meanwhile_gets_the_row(project, status):
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    with attempting(project) as (transaction, candidate):
        project.git("commit", "-q", "--allow-empty", "-m", "theirs")
        transaction.record(row(1, candidate, status))
    assert [kept.status for kept in project.rows()] == [status]
    assert project.git("log", "--first-parent", "-2", "--format=%s") == f"ledger 1: {status} score=1\ntheirs\n"
    assert ("BLOCK = 64 " in project.git("show", "HEAD:kernel.py")) == (status == "PASS")
    assert project.git("status", "--porcelain") == ""
    assert audit(project.folder) == []


def test_win_over_a_kernel_that_changed_meanwhile_is_not_kept(project):
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    with attempting(project) as (transaction, candidate):
        project.edit("BLOCK = 64 ", "BLOCK = 16 ")
        project.git("commit", "-q", "-a", "-m", "theirs")
        transaction.record(row(1, candidate))
    assert [(kept.status, kept.commit) for kept in project.rows()] == [("FAIL_CRASH", candidate.commit)]
    assert "not kept, judge it again" in project.rows()[0].reason
    assert "BLOCK = 16 " in project.kernel.read_text()
    assert project.git("status", "--porcelain") == ""


@pytest.mark.parametrize("status", ["PASS", "REGRESSION"])
def test_ledger_that_was_reset_meanwhile(project, status):
    """Somebody takes the branch back behind the last row while the next one is judged."""
    attempt(project, 64)
    project.edit("BLOCK = 64 ", "BLOCK = 16 ")
    with attempting(project, "second") as (transaction, candidate):
        project.git("reset", "-q", "--hard", "HEAD~2")
        transaction.record(replace(row(2, candidate, status), note="second"))
    assert [(kept.number, kept.note) for kept in project.rows()] == [(1, "second")]
    assert project.rows()[0].status == ("FAIL_CRASH" if status == "PASS" else status)
    assert project.git("status", "--porcelain") == ""
    assert audit(project.folder) == []


def test_branch_that_was_left_meanwhile_gets_its_row_later(project):
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    told = "not checked out any more: experiment 1 is judged, the next run finishes"
    with pytest.raises(Refused, match=told), attempting(project) as (transaction, candidate):
        project.git("switch", "-q", "-c", "side")
        transaction.record(row(1, candidate))
    assert project.git("status", "--porcelain") == " M kernel.py\n"
    with pytest.raises(Refused, match="git switch main"), attempting(project):
        pass
    project.git("switch", "-q", "main")
    with pytest.raises(ZeroDivisionError), attempting(project):
        raise ZeroDivisionError
    assert [kept.status for kept in project.rows()] == ["PASS"]
    assert project.git("status", "--porcelain") == ""


def test_ledger_changed_by_hand_meanwhile_gets_its_row_later(project):
    attempt(project, 64)
    text = project.ledger.read_text()
    project.edit("BLOCK = 64 ", "BLOCK = 16 ")
    told = r"results.tsv:3: .*: experiment 2 is judged"
    with pytest.raises(ledger.LedgerError, match=told), attempting(project) as (transaction, candidate):
        project.ledger.write_text(text + "my remark\n")
        transaction.record(row(2, candidate, "REGRESSION"))
    assert project.ledger.read_text() == text + "my remark\n"
    project.git("checkout", "-q", "results.tsv")
    with pytest.raises(ZeroDivisionError), attempting(project):
        raise ZeroDivisionError
    assert [kept.status for kept in project.rows()] == ["PASS", "REGRESSION"]
    assert project.git("status", "--porcelain") == ""


def test_failure_of_the_judge_undoes_the_attempt(project):
    project.edit("BLOCK = 32 ", "BLOCK = 64 ")
    before = project.state()
    with pytest.raises(ZeroDivisionError), attempting(project):
        assert "refs/ratchet/1/1" in project.git("for-each-ref")
        raise ZeroDivisionError
    assert project.state() == before
    assert not (project.folder / ".ratchet" / "journal.json").exists()


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
    before = project.state()
    for changes in ({"number": 2}, {"status": "WON"}, {"score": float("inf")}):
        with pytest.raises(ledger.LedgerError), attempting(project) as (transaction, candidate):
            transaction.record(replace(row(1, candidate), **changes))
    assert project.state() == before


def test_last_row_removed_by_hand_is_not_taken_for_a_kill(project):
    attempt(project, 64)
    text = project.ledger.read_text()
    project.ledger.write_text(text.splitlines(keepends=True)[0])
    with pytest.raises(Refused, match=r"^results.tsv:2: differs from the committed ledger"), attempting(project):
        pass


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


def test_a_git_that_was_killed_is_no_answer(project):
    repository = Repository(project.folder)
    for question in (repository.ask, repository.git):
        with pytest.raises(Refused, match="was killed by signal 9: run it again"):
            question("-c", "alias.die=!kill -9 $PPID", "die")
    assert repository.ask("rev-parse", "-q", "--verify", "nothing") == ""


def test_turns_are_taken_between_worktrees_and_not_within_one(project, tmp_path):
    project.git("worktree", "add", "-q", "-b", "other", str(tmp_path / "other"))
    here, there = Repository(project.folder), Repository(tmp_path / "other")
    lock = project.folder / ".git" / "ratchet-turn.lock"
    with here.exclusive("here"), there.exclusive("there", wait=False), here.turn(), here.turn():
        assert json.loads(lock.read_text())["label"] == "here"
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with there.turn():
        assert lock.read_text()


def test_lock_knows_its_owner(project):
    repository = Repository(project.folder)
    lock = project.folder / ".git" / "ratchet.lock"
    with repository.exclusive("first\nof two"):
        owner = json.loads(lock.read_text())
        assert (owner["pid"], owner["host"], owner["label"]) == (os.getpid(), socket.gethostname(), "first of two")
        told = f"process {os.getpid()} on .*, since .*: 'first of two'"
        with pytest.raises(Refused, match=told), repository.exclusive("second", wait=False):
            pass
    assert lock.read_text() == ""
    with repository.exclusive("second", wait=False):
        pass
