"""Kills, odd repositories, two loops at once: nothing is lost, doubled or left dirty. benchmarks/faults.py has more.

The judge is tests/fake_judge.py's; everything around it is the project's own.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fake_judge as fake
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from judge import experiment, journal, ledger, transaction
from judge.archive import archive, prune
from judge.audit import audit
from judge.lock import Refused
from judge.repository import Repository
from judge.transaction import Transaction

IN_MEMORY = Path("/dev/shm")  # where waiting for the disk costs nothing; what a kill leaves is the same
PLACE = str(IN_MEMORY) if os.access(IN_MEMORY, os.W_OK) else None


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A repository with a baseline and a rejected attempt."""
    with tempfile.TemporaryDirectory(prefix="ratchet-test-", dir=PLACE) as place:
        made = fake.make_repository(Path(place) / "my kernels")
        assert fake.run(made, "baseline") == 0
        fake.edit(made, 8)
        assert fake.run(made, "slower") == 1
        yield made


@pytest.fixture
def folder(template: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ratchet-test-", dir=PLACE) as place:
        yield shutil.copytree(template, Path(place) / "my kernels", symlinks=True)


REPORTED = {"baseline": 0, "slower": 1}


def recovered(folder: Path, note: str = "and on") -> str:
    """Runs the next experiment and returns what it said; the checker is content afterwards."""
    code = fake.run(folder, note)
    told = fake.said(folder)
    # Where the verdict had been recorded meanwhile and kernel.py taken back, the next command says so once.
    assert code in (0, 1) or "kernel.py is not what it was when this was asked for" in told, told
    fake.check(folder, REPORTED | ({note: code} if code < 2 else {}))
    return told


# --- killed at every step ---


@pytest.mark.parametrize("block", [64, 8], ids=["win", "loss"])
@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("afterwards", [False, True])
def test_killed_at_every_step_of_the_journal(folder, block, step, afterwards):
    """The journal is written seven times: prepared, committed, judged, its commit, recorded, and its end."""
    fake.edit(folder, block)
    code = fake.run(folder, "killed", before=fake.dies_at_journal(step, afterwards=afterwards))
    if step == 6:
        assert code == (0 if block == 64 else 1)  # there is no seventh: the six above are all
        return
    assert code == -signal.SIGKILL
    told = recovered(folder)
    rows = {row.note: row.status for row in ledger.read(folder / "results.tsv")}
    verdict = "PASS" if block == 64 else "REGRESSION"
    seen = step + afterwards  # writes that are on the disk
    expected = {0: None, 1: None, 2: "FAIL_CRASH"}.get(seen, verdict)
    assert rows.get("killed") == expected
    assert ("recovered: " in told) == (0 < seen < 6)


@pytest.mark.parametrize("block", [64, 8], ids=["win", "loss"])
def test_killed_at_every_git_command(folder, block):
    number = int(block == 8)  # every other one: the two cases share them
    while True:
        fake.edit(folder, block + number, " again")
        code = fake.run(folder, f"killed {number}", before=fake.dies_at_git(number, afterwards=number % 4 > 1))
        if code != -signal.SIGKILL:
            break
        recovered(folder, f"next {number}")
        fake.git(folder, "checkout", "-q", "kernel.py")
        if block == 64:  # so that the next one is a win again
            block += 100
        number += 2
    assert number > 20


@pytest.mark.parametrize("with_children", [False, True], ids=["judge", "all"])
def test_killed_at_random(folder, with_children):
    draw = random.Random(11)
    for number in range(8):
        fake.edit(folder, draw.choice([0, 8, 64 + 10 * number]), f" {number}")
        pid = fake.start(folder, f"killed {number}")
        time.sleep(draw.uniform(0, 0.12))
        fake.kill(pid, with_children=with_children)
        recovered(folder, f"next {number}")
        fake.git(folder, "checkout", "-q", "kernel.py")


def test_killed_while_it_recovers(folder):
    fake.edit(folder, 64)
    assert fake.run(folder, "killed", before=fake.dies_at_journal(3, afterwards=True)) == -signal.SIGKILL
    for number in range(12):
        fake.run(folder, f"also killed {number}", before=fake.dies_at_git(number, afterwards=number % 2 == 0))
    recovered(folder)
    assert [row.status for row in ledger.read(folder / "results.tsv")][2] == "PASS"


def test_killed_archive_and_prune(folder):
    for act in (archive, lambda work: prune(work, 1)):
        for number in range(40):
            pid = os.fork()
            if not pid:
                try:
                    fake.dies_at_git(number, afterwards=number % 2 == 1)()
                    repository = Repository(folder)
                    with repository.exclusive("act"):
                        act(Transaction(repository))
                finally:
                    os._exit(0)
            if fake.end(pid) == 0:
                break
            assert audit_after_recovery(folder) == []
        assert number > 5
    assert len(fake.git(folder, "for-each-ref", "refs/ratchet").splitlines()) == 1
    assert fake.git(folder, "status", "--porcelain") == ""


def audit_after_recovery(folder: Path) -> list[str]:
    repository = Repository(folder)
    with repository.exclusive("recover"):
        Transaction(repository).start()
    return audit(folder)


def test_a_git_that_outlives_its_judge_holds_the_lock(folder):
    """Else the next experiment would begin while it still moves the branch."""

    def slow_update() -> None:
        original = Repository.run

        def run(self, *arguments, **options):
            if arguments[0] == "update-ref" and "-m" in arguments:
                subprocess.Popen(["sleep", "1.5"], pass_fds=self._inherited)  # stands for a slow git
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments, **options)

        Repository.run = run

    fake.edit(folder, 64)
    assert fake.run(folder, "killed", before=slow_update) == -signal.SIGKILL
    assert fake.run(folder, "at once", wait=False) == 2
    assert "which is gone; a git that it started still works" in fake.said(folder)
    started = time.monotonic()
    assert "was judged PASS when it was killed" in recovered(folder)
    assert 0.5 < time.monotonic() - started < 10


def test_lock_files_of_a_killed_git_are_removed_after_a_crash_only(folder):
    fake.edit(folder, 64)
    assert fake.run(folder, "killed", before=fake.dies_at_journal(3, afterwards=True)) == -signal.SIGKILL
    locks = [folder / ".git" / name for name in ("index.lock", "refs/heads/main.lock", "packed-refs.lock")]
    for lock in locks:
        lock.touch()
    told = recovered(folder)
    assert "removed index.lock, main.lock, packed-refs.lock" in told or "left by a git that was killed" in told
    locks[0].touch()
    assert fake.run(folder, "somebody's git") == 2
    assert locks[0].exists()
    locks[0].unlink()


# --- a user's commands between a crash and the next run ---


def commits_all(folder):
    fake.git(folder, "commit", "-q", "-a", "--allow-empty", "-m", "all that there is")


def commits_something_else(folder):
    (folder / "notes.txt").write_text(f"noted at {time.monotonic_ns()}\n")
    fake.git(folder, "add", "notes.txt")
    fake.git(folder, "commit", "-q", "-m", "notes", "--", "notes.txt")


def stashes(folder):
    if fake.git(folder, "status", "--porcelain"):
        fake.git(folder, "stash", "-q")


def resets_hard(folder):
    fake.git(folder, "reset", "-q", "--hard")


def collects_garbage(folder):
    fake.git(folder, "gc", "-q", "--prune=now")


def removes_the_cache(folder):
    for path in (folder / ".ratchet").glob("ledger.sqlite*"):
        path.unlink()


def tears_the_line(folder):
    path = folder / "results.tsv"
    if not fake.git(folder, "ls-tree", "HEAD", "results.tsv"):
        return
    committed = len(fake.git(folder, "show", "HEAD:results.tsv").encode())
    if path.stat().st_size > committed + 40:
        os.truncate(path, committed + 40)


USER = [commits_all, commits_something_else, stashes, resets_hard, collects_garbage, removes_the_cache, tears_the_line]


@pytest.mark.parametrize("block", [64, 8], ids=["win", "loss"])
@pytest.mark.parametrize("act", USER, ids=[act.__name__ for act in USER])
def test_user_commands_after_a_kill(folder, act, block):
    for number, step in enumerate((1, 2, 3, 4)):
        fake.edit(folder, block + 100 * number if block == 64 else 8, f" {number}")
        code = fake.run(folder, f"killed {number}", before=fake.dies_at_journal(step, afterwards=True))
        assert code == -signal.SIGKILL
        act(folder)
        fake.run(folder, f"next {number}")
        rows = {row.note: row.status for row in ledger.read(folder / "results.tsv")}
        assert f"killed {number}" in rows
        if act is commits_all:  # what they committed by hand is theirs, and may be no champion's
            assert audit(folder) == []
            assert fake.git(folder, "status", "--porcelain") == ""
        else:
            fake.check(folder, REPORTED)
        fake.git(folder, "checkout", "-q", "kernel.py")


def test_other_branch_after_a_kill_is_refused_until_it_is_finished(folder):
    fake.edit(folder, 64)
    fake.run(folder, "killed", before=fake.dies_at_journal(1, afterwards=True))
    fake.git(folder, "switch", "-q", "-c", "side")
    assert fake.run(folder, "on the side") == 2
    assert "on branch main was interrupted: git switch main" in fake.said(folder)
    fake.git(folder, "switch", "-q", "main")
    assert "row FAIL_CRASH" in recovered(folder)


def test_branch_that_is_gone_after_a_kill(folder):
    fake.git(folder, "switch", "-q", "-c", "side")
    fake.edit(folder, 64)
    fake.run(folder, "killed", before=fake.dies_at_journal(1, afterwards=True))
    fake.git(folder, "switch", "-q", "main")
    fake.git(folder, "branch", "-q", "-D", "side")
    assert "branch refs/heads/side is gone" in recovered(folder)


def test_journal_that_cannot_be_read(folder):
    (folder / ".ratchet" / "journal.json").write_bytes(b"{\xff")
    assert "the journal cannot be read: it is now .ratchet/journal.unreadable-1" in recovered(folder)


@pytest.mark.parametrize("cut", [1, 40, 100])
def test_torn_last_line_is_set_aside(folder, cut):
    path = folder / "results.tsv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    told = recovered(folder)
    assert "results.tsv ended within a line: what was there is in .ratchet/torn-line-1" in told
    assert whole.endswith((folder / ".ratchet" / "torn-line-1").read_bytes() + whole[len(whole) - cut :])
    path.write_bytes(path.read_bytes() + b"half a li")
    recovered(folder, "once more")
    assert (folder / ".ratchet" / "torn-line-2").read_bytes() == b"half a li"


# --- two at once ---


def test_two_loops_at_once(folder):
    """Five times here; benchmarks/faults.py does it a hundred times."""
    reported = dict(REPORTED)
    for number in range(5):
        fake.two_at_once(folder, number, reported)
    assert len(reported) >= len(REPORTED) + 5


def test_one_experiment_at_a_time_in_a_folder(folder):
    pid = fake.start(folder, "first", seconds=0.5)
    lock = folder / ".git" / "ratchet.lock"
    while "first" not in lock.read_text():
        time.sleep(0.01)
    assert fake.run(folder, "second", wait=False) == 2
    told = fake.said(folder)
    assert f"another experiment runs in this folder (process {pid} on " in told
    assert "'first'" in told
    assert fake.end(pid) == 0
    assert fake.run(folder, "second", wait=False) == 0
    fake.check(folder, REPORTED | {"second": 0})


def worktree(folder: Path) -> Path:
    other = folder.parent / "another worktree"
    fake.git(folder, "worktree", "add", "-q", "-b", "other", str(other))
    return other


def journals(*folders: Path) -> list[str]:
    return [path.read_text() for place in folders for path in (place / ".ratchet").glob(journal.JOURNALS)]


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_worktrees_judge_at_the_same_time(folder):
    """Each on its own branch, which has its own champion and ledger; the attempts' refs are shared."""
    other = worktree(folder)
    fake.edit(folder, 64)
    fake.edit(other, 128)
    pids = [fake.start(folder, "here", seconds=3600), fake.start(other, "there", seconds=3600)]
    wait_for(lambda: sum('"committed"' in text for text in journals(folder, other)) == 2)
    fake.kill(pids[0], with_children=True)
    fake.git(folder, "checkout", "-q", "kernel.py")
    assert fake.run(folder, "next") == 0  # while the other one is judged
    fake.kill(pids[1], with_children=True)
    assert fake.run(other, "next there") == 0
    for place, notes in ((folder, ["here", "next"]), (other, ["there", "next there"])):
        assert [row.note for row in ledger.read(place / "results.tsv")][2:] == notes
        assert audit(place) == []
        assert fake.git(place, "status", "--porcelain") == ""
        refs = fake.git(folder, "for-each-ref", "--format=%(objectname)", "refs/ratchet").split()
        assert {row.commit for row in ledger.read(place / "results.tsv")} <= set(refs)


def test_ref_that_a_worktree_took_after_a_kill_stays(folder):
    other = worktree(folder)
    fake.edit(other, 8, " there")
    assert fake.run(other, "killed", before=fake.dies_at_journal(0, afterwards=True)) == -signal.SIGKILL
    fake.edit(folder, 8, " here")
    assert fake.run(folder, "here") == 1
    fake.git(other, "checkout", "-q", "kernel.py")
    assert fake.run(other, "there") == 0
    assert "had hardly begun" in fake.said(other)
    fake.check(folder, REPORTED | {"here": 1})


def test_many_loops_in_worktrees(folder):
    """Three loops, each in its worktree, killed at random: none disturbs another."""
    draw = random.Random(5)
    others = [folder.parent / f"worktree {number}" for number in range(2)]
    for number, other in enumerate(others):
        fake.git(folder, "worktree", "add", "-q", "-b", f"branch-{number}", str(other))
    places = [folder, *others]
    for number in range(5):
        pids = []
        for place in places:
            fake.edit(place, draw.choice([8, 64 + number]), f" {number}")
            pids.append(fake.start(place, f"killed {number}"))
        time.sleep(draw.uniform(0, 0.3))
        for pid in pids:
            fake.kill(pid, with_children=draw.random() < 0.5)
        pids = [fake.start(place, f"next {number}") for place in places]
        for place, pid in zip(places, pids, strict=True):
            code = fake.end(pid)
            assert code in (0, 1) or "is not what it was" in fake.said(place), fake.said(place)
            fake.git(place, "checkout", "-q", "kernel.py")
            assert audit(place) == []
            assert fake.git(place, "status", "--porcelain") == ""
            if code < 2:
                assert ledger.read(place / "results.tsv")[-1].note == f"next {number}"
    refs = set(fake.git(folder, "for-each-ref", "--format=%(objectname)", "refs/ratchet").split())
    assert {row.commit for place in places for row in ledger.read(place / "results.tsv")} <= refs


def test_kernel_that_changed_while_waiting_is_not_judged(folder):
    fake.edit(folder, 8, " another")
    first = fake.start(folder, "first", seconds=0.5)
    while "first" not in (folder / ".git" / "ratchet.lock").read_text():
        time.sleep(0.01)
    assert fake.run(folder, "the same edit, by mistake") == 2
    assert "nothing was judged, look at kernel.py" in fake.said(folder)
    assert fake.end(first) == 1
    fake.check(folder, REPORTED | {"first": 1})


# --- disk, clock ---


def fails_with(code: int, what: str, call: int):
    """For `before`: from its `call`-th call on, writing to the disk fails."""

    def install() -> None:
        count = 0

        def failing(*arguments, **options):
            nonlocal count
            count += 1
            if count > call:
                raise OSError(code, os.strerror(code), str(arguments[0]))
            return original(*arguments, **options)

        place, name = (ledger, "append") if what == "ledger" else (journal, "write_durably")
        original = getattr(place, name)
        setattr(place, name, failing)

    return install


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(("what", "call"), [("ledger", 0), *(("journal", call) for call in range(6))])
def test_disk_that_fails(folder, what, call, code):
    fake.edit(folder, 64)
    ended = fake.run(folder, "failing", before=fails_with(code, what, call))
    if (what, call) == ("journal", 5):
        assert ended == 0  # five writes are all
        return
    assert ended == 2
    told = fake.said(folder)
    assert os.strerror(code) in told
    undone = what == "journal" and call < 3
    assert ("nothing was recorded" in told) == undone
    assert ("is judged, the next run finishes recording it" in told) != undone
    recovered(folder)


def test_full_disk(tmp_path):
    """A real one, where the machine allows to mount it: filled at once, and while an experiment runs."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        folder = fake.make_repository(place / "project")
        assert fake.run(folder, "baseline") == 0
        fake.edit(folder, 8)
        assert fake.run(folder, "slower") == 1
        for number, left in enumerate((0, 8, 16, 24, 32, 48, 64)):
            fake.edit(folder, 64 + 10 * number)
            free = os.statvfs(place)
            filler = place / "filler"
            filler.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - left * 1024)))
            code = fake.run(folder, f"full {number}")
            assert code in (0, 2), fake.said(folder)
            filler.unlink()
            recovered(folder, f"next {number}")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_read_only_repository(folder):
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{script} && touch "$1/x"', "sh", folder], capture_output=True, check=False
    )
    if b"Read-only" not in done.stderr:
        pytest.skip("mounting needs root")
    probe = (
        "import sys; sys.path[:0] = sys.argv[2:]\nimport fake_judge as fake; from pathlib import Path\n"
        "from judge import experiment; from judge.lock import Refused\nexperiment._judge = fake.judged\n"
        "asked = experiment.Experiment(note='n', new_baseline=False, chip=fake.CHIP, mode='model')\n"
        "try: experiment.run(Path(sys.argv[1]), asked)\nexcept Refused as error: print(error)\n"
    )
    tests = Path(__file__).parent
    command, arguments = ("unshare", "-m", "sh", "-c"), ("sh", folder, sys.executable, probe, tests.parent, tests)
    done = subprocess.run(
        [*command, f'{script} && exec "$2" -c "$3" "$1" "$4" "$5"', *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ratchet.lock: Read-only file system; make it writable, or work in a clone" in done.stdout, done.stderr
    recovered(folder)


def test_clock_that_goes_backwards(folder):
    """Commits, the index and the ledger of the future; what comes next is older than what was before."""
    (folder / "mine.txt").write_text("tracked\n")
    future = "2099-01-01T00:00:00Z"
    fake.ENVIRONMENT |= {"GIT_COMMITTER_DATE": future, "GIT_AUTHOR_DATE": future}
    try:
        fake.git(folder, "commit", "-q", "--allow-empty", "-m", "from the future")
    finally:
        del fake.ENVIRONMENT["GIT_COMMITTER_DATE"], fake.ENVIRONMENT["GIT_AUTHOR_DATE"]
    for path in (folder / "results.tsv", folder / "kernel.py", folder / ".git" / "index", folder / "mine.txt"):
        os.utime(path, (4_000_000_000, 4_000_000_000))
    for step in range(6):
        fake.edit(folder, 64 + step)
        fake.run(folder, f"killed {step}", before=fake.dies_at_journal(step, afterwards=False))
        recovered(folder, f"next {step}")
        fake.git(folder, "checkout", "-q", "kernel.py")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_random(folder, number):
    """Before the verdict the attempt is undone, from it on it is finished; a git that is hit is no harm."""
    draw = random.Random(number)

    def install() -> None:
        class Interrupted(BaseException):
            pass

        def interrupt(signum, frame):
            raise Interrupted

        signal.signal(number, interrupt)

    for attempt in range(4):
        fake.edit(folder, 64 + attempt, f" {number}")
        pid = fake.start(folder, f"interrupted {attempt}", before=install)
        time.sleep(draw.uniform(0.01, 0.12))
        os.killpg(pid, number)
        fake.end(pid)
        recovered(folder, f"next {attempt}")
        fake.git(folder, "checkout", "-q", "kernel.py")


# --- odd repositories ---


def works(make):
    make.told = None
    return make


def refused(told):
    def mark(make):
        make.told = told
        return make

    return mark


def in_git(folder, *arguments):
    fake.git(folder, *arguments)


@works
def packed_refs(folder):
    in_git(folder, "pack-refs", "--all")


@works
def everything_packed(folder):
    in_git(folder, "gc", "-q", "--aggressive")


@works
def split_index(folder):
    in_git(folder, "update-index", "--split-index")


@works
def untracked_cache(folder):
    in_git(folder, "update-index", "--force-untracked-cache")


@works
def index_version_4(folder):
    in_git(folder, "update-index", "--index-version", "4")


@works
def kernel_assumed_unchanged(folder):
    in_git(folder, "update-index", "--assume-unchanged", "kernel.py")


@works
def kernel_skips_the_worktree(folder):
    in_git(folder, "update-index", "--skip-worktree", "kernel.py")


@works
def edit_is_staged(folder):
    in_git(folder, "add", "kernel.py")


@works
def edit_is_executable(folder):
    (folder / "kernel.py").chmod(0o755)


@works
def intent_to_add(folder):
    (folder / "new.txt").write_text("new\n")
    in_git(folder, "add", "-N", "new.txt")
    in_git(folder, "rm", "-q", "--cached", "new.txt")


@works
def untracked_files(folder):
    (folder / 'a file\twith "quotes"').write_text("x")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "file").write_text("x")


@works
def scratch_is_not_ignored(folder):
    in_git(folder, "rm", "-q", "-f", ".gitignore")
    in_git(folder, "commit", "-q", "-m", "no .gitignore", "--", ".gitignore")


@works
def branch_with_slashes(folder):
    in_git(folder, "switch", "-q", "-c", "deep/er/brânch")


@works
def tag_with_the_branch_s_name(folder):
    in_git(folder, "tag", "main")


@works
def branch_named_head(folder):
    in_git(folder, "update-ref", "refs/heads/HEAD", "HEAD")


@works
def file_named_like_the_branch(folder):
    (folder / "main").write_text("x")


@works
def stash_present(folder):
    in_git(folder, "stash", "-q")
    fake.edit(folder, 64)


@works
def failing_hooks(folder):
    for name in ("pre-commit", "post-commit", "reference-transaction", "post-index-change", "commit-msg"):
        path = folder / ".git" / "hooks" / name
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)


@works
def hooks_elsewhere(folder):
    (folder / ".git" / "mine").mkdir()
    failing_hooks(folder)
    (folder / ".git" / "hooks").rename(folder / ".git" / "mine" / "hooks")
    in_git(folder, "config", "core.hooksPath", ".git/mine/hooks")


@works
def signing_without_a_key(folder):
    for name in ("commit.gpgSign", "tag.gpgSign"):
        in_git(folder, "config", name, "true")


@works
def file_monitor(folder):
    in_git(folder, "config", "core.fsmonitor", "/bin/false")


@works
def strange_output_settings(folder):
    for name, value in (("color.ui", "always"), ("status.short", "true"), ("status.branch", "true")):
        in_git(folder, "config", name, value)
    for name, value in (("log.showSignature", "true"), ("status.relativePaths", "true"), ("core.abbrev", "4")):
        in_git(folder, "config", name, value)


@works
def line_ends_converted(folder):
    (folder / ".git" / "info" / "attributes").write_text("*.py eol=lf\n*.tsv -text\n")
    in_git(folder, "config", "core.autocrlf", "input")


@works
def reflogs_off(folder):
    in_git(folder, "config", "core.logAllRefUpdates", "false")


@works
def replaced_commits(folder):
    head = fake.git(folder, "rev-parse", "HEAD").strip()
    in_git(folder, "replace", head, fake.git(folder, "commit-tree", "HEAD^{tree}", "-p", "HEAD^", "-m", "x").strip())
    in_git(folder, "replace", "-d", head)


@works
def commit_graph(folder):
    in_git(folder, "commit-graph", "write", "--reachable")


@works
def scratch_removed(folder):
    subprocess.run(["rm", "-r", folder / ".ratchet"], check=True)


@works
def stale_lock_of_another_host(folder):
    text = '{"pid": 1, "host": "elsewhere", "start_ticks": 1, "boot": "x", "since": "then", "label": "old"}'
    (folder / ".git" / "ratchet.lock").write_text(text)


@works
def submodule(folder):
    inner = fake.make_repository(folder.parent / "inner")
    in_git(folder, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "sub")
    in_git(folder, "commit", "-q", "-m", "a submodule", "--", ".gitmodules", "sub")
    (folder / "sub" / "scratch.txt").write_text("untracked inside\n")


@works
def attempt_ref_taken(folder):
    in_git(folder, "update-ref", "refs/ratchet/1/3", "HEAD^")


@refused("also changed: sub")
def changed_submodule(folder):
    submodule(folder)
    (folder / "sub" / "mine.txt").write_text("changed\n")


@refused("also changed: mine.txt")
def other_file_staged(folder):
    (folder / "mine.txt").write_text("changed\n")
    in_git(folder, "add", "mine.txt")


@refused("also changed: mine.txt")
def other_file_deleted(folder):
    (folder / "mine.txt").unlink()


@refused("HEAD is detached: check out a branch first")
def detached(folder):
    in_git(folder, "checkout", "-q", "--detach")


@refused("the branch has no commit yet")
def unborn(folder):
    in_git(folder, "symbolic-ref", "HEAD", "refs/heads/fresh")


@refused("a git operation is in progress (rebase-merge)")
def rebasing(folder):
    (folder / ".git" / "rebase-merge").mkdir()


@refused("a git operation is in progress (BISECT_LOG)")
def bisecting(folder):
    fake.git(folder, "checkout", "-q", "kernel.py")
    in_git(folder, "bisect", "start")


@refused("index.lock exists")
def index_locked(folder):
    (folder / ".git" / "index.lock").touch()


@refused("no kernel.py here")
def kernel_deleted(folder):
    (folder / "kernel.py").unlink()


@refused("no kernel.py here")
def kernel_is_a_folder(folder):
    (folder / "kernel.py").unlink()
    (folder / "kernel.py").mkdir()


@refused("kernel.py is a symbolic link")
def kernel_is_a_link(folder):
    (folder / "kernel.py").rename(folder / "elsewhere.py")
    (folder / "kernel.py").symlink_to("elsewhere.py")


@refused("results.tsv:3: differs from the committed ledger")
def last_row_removed(folder):
    path = folder / "results.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@refused("a bare repository has no kernel.py to edit")
def bare(folder):
    in_git(folder, "config", "core.bare", "true")


@refused("the ledger holds SHA-1 commits")
def sha256_objects(folder):
    in_git(folder, "config", "core.repositoryFormatVersion", "1")
    in_git(folder, "config", "extensions.objectFormat", "sha256")


ODD = [make for make in list(globals().values()) if callable(make) and hasattr(make, "told")]


def untouched(folder: Path) -> tuple[object, ...]:
    """What an experiment of a win may not change."""
    ours = ("kernel.py", "results.tsv", ".git", ".ratchet")
    files = {
        path: (path.read_bytes() if path.is_file() else None, path.lstat().st_mode)
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in ours
    }
    refs = {line for line in fake.git(folder, "for-each-ref").splitlines() if "refs/ratchet" not in line}
    config = (folder / ".git" / "config").read_text()
    return files, {line for line in refs if not line.endswith(fake_branch(folder))}, config


def fake_branch(folder: Path) -> str:
    return (folder / ".git" / "HEAD").read_text().removeprefix("ref: ").strip()


@pytest.mark.parametrize("make", ODD, ids=[make.__name__ for make in ODD])
def test_odd_repository(folder, make):
    fake.edit(folder, 64)
    make(folder)
    is_repository = make not in (bare, sha256_objects)
    before = untouched(folder) if is_repository else None
    if not is_repository:
        with pytest.raises(Refused, match=make.told):
            Repository(folder)
        return
    text = (folder / "results.tsv").read_bytes()
    code = fake.run(folder, "in an odd place")
    assert code == (2 if make.told else 0), fake.said(folder)
    assert untouched(folder) == before
    if make.told:
        assert make.told in fake.said(folder)
        assert (folder / "results.tsv").read_bytes() == text
    else:
        assert ledger.read(folder / "results.tsv")[-1].status == "PASS"
        assert fake.git(folder, "show", "HEAD:kernel.py") == (folder / "kernel.py").read_text()
        assert fake.git(folder, "status", "--porcelain", "-uno", "--ignore-submodules=untracked") == ""
        assert audit(folder) == []


def test_there_are_enough_odd_ones():
    assert len(ODD) >= 40


def test_shallow_clone(folder, tmp_path):
    fake.git(folder, "commit", "-q", "--allow-empty", "-m", "more")
    shallow = tmp_path / "shallow"
    fake.git(tmp_path, "clone", "-q", "--depth", "1", f"file://{folder}", str(shallow))
    fake.edit(shallow, 64)
    assert fake.run(shallow, "in a shallow clone") == 0
    assert fake.git(shallow, "status", "--porcelain") == ""
    lost = ledger.read(shallow / "results.tsv")[0].commit
    assert any(f"{lost} does not exist here, git fetch --unshallow" in line for line in audit(shallow))
    with pytest.raises(Refused, match="is not in this shallow clone: git fetch --unshallow"):
        Repository(shallow).source_at(lost)
    fake.git(shallow, "fetch", "-q", "--unshallow")
    fake.git(shallow, "fetch", "-q", "origin", "refs/ratchet/*:refs/ratchet/*")
    assert audit(shallow) == []


# --- archive and prune ---


def test_prune_leaves_every_row_reachable(folder, tmp_path):
    for number in range(6):
        fake.edit(folder, 8, f" {number}")
        assert fake.run(folder, f"attempt {number}") == 1
    repository = Repository(folder)
    with repository.exclusive("prune"):
        told = prune(Transaction(repository), 2)
    assert told.startswith("6 attempts' refs removed, 2 left")
    assert audit(folder) == []
    fake.git(folder, "gc", "-q", "--prune=now")
    fake.git(folder, "reflog", "expire", "--expire=now", "--all")
    assert audit(folder) == []  # from the bundle
    fake.edit(folder, 8, " one more")
    assert fake.run(folder, "goes on") == 1
    with repository.exclusive("prune"):
        told = prune(Transaction(repository), 0)
        assert told.endswith("0 left; experiments.bundle and the branch have them all")
    clone = tmp_path / "clone"
    fake.git(tmp_path, "clone", "-q", str(folder), str(clone))
    assert audit(clone) == []
    for row in ledger.read(clone / "results.tsv"):
        assert "BLOCK" in fake.git(clone, "show", f"{row.commit}:kernel.py")


def test_bundle_of_two_clones_that_both_went_on(folder, tmp_path):
    clone = tmp_path / "clone"
    fake.git(tmp_path, "clone", "-q", str(folder), str(clone))
    for place, remark in ((folder, " here"), (clone, " there")):
        fake.edit(place, 8, remark)
        assert fake.run(place, "third") == 1
        repository = Repository(place)
        with repository.exclusive("archive"):
            archive(Transaction(repository))
    fake.git(clone, "fetch", "-q", str(folder), "main")
    fake.git(clone, "merge", "-q", "-s", "ours", "-m", "merged", "FETCH_HEAD")
    (clone / "experiments.bundle").write_bytes((folder / "experiments.bundle").read_bytes())
    fake.git(clone, "commit", "-q", "-a", "-m", "their bundle")
    repository = Repository(clone)
    with repository.exclusive("archive"):
        archive(Transaction(repository))
    refs = fake.git(clone, "for-each-ref", "--format=%(refname)", "refs/ratchet").split()
    assert {"refs/ratchet/1/3", "refs/ratchet/1/3-2"} <= set(refs)


# --- against a model ---


class Loop(RuleBasedStateMachine):
    """Random edits, experiments, crashes and user commands. The model: what was reported, and the best so far."""

    @initialize()
    def make(self) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="ratchet-test-", dir=PLACE)
        self.folder = fake.make_repository(Path(self.place.name) / "project")
        self.reported: dict[str, int] = {}
        self.best = 0
        self.count = 0
        self.is_settled = True
        self.by_hand = False

    def teardown(self) -> None:
        if hasattr(self, "place"):
            self.place.cleanup()

    def note(self, text: str) -> str:
        self.count += 1
        return f"{self.count} {text}"

    @rule(block=st.integers(0, 400), remark=st.sampled_from(["", " x", " y"]))
    def edit(self, block: int, remark: str) -> None:
        fake.edit(self.folder, block, remark)

    @rule(text=st.text(st.characters(exclude_characters="\0"), max_size=20))
    def experiment(self, text: str) -> None:
        note = self.note(text)
        code = fake.run(self.folder, note)
        assert code in (0, 1) or "is not what it was when this was asked for" in fake.said(self.folder)
        if code < 2:
            self.reported[note] = code
        self.is_settled = True

    @rule(step=st.integers(0, 40), afterwards=st.booleans(), at=st.sampled_from(["git", "journal"]))
    def crash(self, step: int, afterwards: bool, at: str) -> None:
        note = self.note("crash")
        dies = fake.dies_at_git(step, afterwards=afterwards)
        if at == "journal":
            dies = fake.dies_at_journal(step % 6, afterwards=afterwards)
        code = fake.run(self.folder, note, before=dies)
        if code in (0, 1):
            self.reported[note] = code
        self.is_settled = code in (0, 1)

    @rule(act=st.sampled_from([act for act in USER if act is not commits_all]))
    def user(self, act) -> None:
        if act is stashes or act is resets_hard or not self.is_settled or act is not commits_something_else:
            act(self.folder)

    @precondition(lambda self: self.is_settled)
    @rule()
    def discard(self) -> None:
        fake.git(self.folder, "checkout", "-q", "kernel.py")

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "folder") or not self.is_settled or not self.reported:
            return
        fake.check(self.folder, self.reported, edited=True)
        kept = [row for row in ledger.read(self.folder / "results.tsv") if row.status == "PASS"]
        scores = [row.score for row in kept]
        assert scores == sorted(set(scores)), "the best so far can only rise"


TestLoop = Loop.TestCase
TestLoop.settings = settings(
    max_examples=int(os.environ.get("RATCHET_FAULT_EXAMPLES", "4")),
    stateful_step_count=12,
    deadline=None,
    derandomize="RATCHET_FAULT_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


def test_the_fake_judge_cannot_be_reached_by_a_user():
    """No file of the project but the tests and this benchmark names it, and experiment.py takes no judge."""
    root = Path(__file__).resolve().parent.parent
    sources = [*root.glob("*.py"), *root.glob("*.sh"), *root.glob("judge/**/*.py"), *root.glob("agents/*.py")]
    assert not [path for path in sources if "fake_judge" in path.read_text()]
    assert experiment._judge.__module__ == "judge.experiment"
    assert transaction.__name__ == "judge.transaction"
