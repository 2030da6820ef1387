"""Experiments with a judge that takes milliseconds, killed at will, and the checker of what they leave.

For tests/test_faults.py and benchmarks/faults.py. All of it but the stages is the project's own: experiment.run with
its lock, journal, git and ledger. The stages are replaced in a process that was forked for one experiment, so nothing
that a user can start ever judges like this.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from judge import decide, experiment, ledger, parallel, pipeline
from judge.audit import audit
from judge.chips import load_chip
from judge.journal import JOURNALS, Journal
from judge.lock import Refused
from judge.repository import Repository
from judge.roofline import Figures

CHIP = load_chip("v5e")
KERNEL = "BLOCK = 32  # the larger, the faster\n"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
}


def git(folder: Path, *arguments: str) -> str:
    settings = ("user.name=Somebody", "user.email=somebody@example.org", "commit.gpgSign=false")
    options = [part for setting in settings for part in ("-c", setting)]
    done = subprocess.run(
        ["git", *options, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def make_repository(folder: Path) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    (folder / "kernel.py").write_text(KERNEL)
    (folder / ".gitignore").write_text("/.ratchet/\n")
    (folder / "mine.txt").write_text("tracked\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "start")
    return folder


def edit(folder: Path, block: int, remark: str = "") -> None:
    (folder / "kernel.py").write_text(kernel(block, remark))


def kernel(block: int, remark: str = "") -> str:
    """A remark that says "takes 0.5 s" is how long the judging takes."""
    return f"BLOCK = {block}  # the larger, the faster{remark}\n"


def judged(transaction, candidate, lineage, index, asked) -> pipeline.Verdict:
    """_judge's stand-in: the latency is 1000 ÷ BLOCK; BLOCK = 0 fails. The comparison is the project's own."""
    block = int(re.search(rb"BLOCK = (\d+)", candidate.data)[1])
    if takes := re.search(rb"takes ([\d.]+) s", candidate.data):
        time.sleep(float(takes[1]))
    verdict = pipeline.Verdict(status=decide.PASS, mode="model", chip=asked.chip.name)
    if block == 0:
        verdict.status, verdict.reason = "FAIL_CORRECTNESS", "no block at all"
        return verdict
    ms = 1000.0 / block
    total = Figures(
        score=1e4 / ms,
        latency_ms=ms,
        util_pct=100.0,
        mfu_pct=1.0,
        mbu_pct=1.0,
        tflops=1.0,
        regime="MEMORY-BOUND",
        bw_util_pct=1.0,
    )
    verdict.total, verdict.workloads = total, {"default": total}
    return verdict


def start(
    folder: Path, note: str, *, before: Callable[[], None] | None = None, wait: bool = True, seconds: float = 0.0
) -> int:
    """Forks an experiment in a session of its own; `said` has what it says. Returns its pid."""
    asked = experiment.Experiment(note=note, new_baseline=False, chip=CHIP, mode="model", wait=wait)
    return _fork(folder, lambda: experiment.run(folder, asked).exit_code, before, seconds)


def start_several(
    folder: Path, texts: dict[str, str], *, jobs: int = 8, before: Callable[[], None] | None = None
) -> int:
    """The same for candidates, name → kernel.py; each is its own hypothesis. `reported` has those that ended."""
    asked = experiment.Experiment(note="", new_baseline=False, chip=CHIP, mode="model")
    candidates = [parallel.Candidate(name=name, note=name, data=text.encode()) for name, text in texts.items()]
    several = parallel.Several(folder=folder, asked=asked, candidates=candidates, jobs=jobs)

    def show(one: parallel.Ended) -> None:
        os.write(2, f"ended {one.exit_code}: {one.candidate.name}\n".encode())

    def run_all() -> int:
        several.run(lambda judge: _ended(lambda: judge().exit_code), show)
        return 0

    return _fork(folder, run_all, before, 0.0)


def reported(folder: Path) -> dict[str, int]:
    """Candidate → exit code, of those that were judged."""
    return {name: int(code) for code, name in re.findall(r"^ended ([01]): (.*)$", said(folder), re.MULTILINE)}


def _fork(folder: Path, work: Callable[[], int], before: Callable[[], None] | None, seconds: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            del os.environ[name]
        said = os.open(_said(folder), os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not what a test runner put in their place

        def judge(*arguments: object) -> pipeline.Verdict:
            time.sleep(seconds)
            return judged(*arguments)

        experiment._judge = judge
        if before is not None:
            before()
        code = _ended(work)
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(code)


def _ended(work: Callable[[], int]) -> int:
    try:
        return work()
    except (Refused, ledger.LedgerError, pipeline.CannotJudge, OSError) as error:
        os.write(2, f"ratchet: {error}\n".encode(errors="replace"))
        return 2


def end(pid: int) -> int:
    """Waits; the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(folder: Path, note: str, **options) -> int:
    code = end(start(folder, note, **options))
    assert code != 99, said(folder)
    return code


def said(folder: Path) -> str:
    return _said(folder).read_text(errors="replace") if _said(folder).exists() else ""


def _said(folder: Path) -> Path:
    """Not in the repository: its disk may be full."""
    return Path(_SAID.name) / hashlib.sha256(bytes(folder)).hexdigest()[:16]


_SAID = tempfile.TemporaryDirectory(prefix="fake-judge-")


def kill(pid: int, *, with_children: bool) -> int:
    """SIGKILL, for the judge alone or, as when the machine dies, for every git that it runs too."""
    (os.killpg if with_children else os.kill)(pid, signal.SIGKILL)
    return end(pid)


def kill_session(pid: int) -> int:
    """SIGKILL for all that `start` or `start_several` started, as when the machine dies."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(")", 1)[1].split()[3]) == pid:
                os.kill(int(path.parent.name), signal.SIGKILL)
    return end(pid)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def dies_at_git(number: int, *, afterwards: bool = False) -> Callable[[], None]:
    """For `before`: the process is gone right before, or after, the git command of that number (from 0)."""

    def install() -> None:
        original, count = Repository.run, 0

        def run(self, *arguments, **options):
            nonlocal count
            count += 1
            try:
                return original(self, *arguments, **options) if count <= number or afterwards else None
            finally:
                if count == number + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

        Repository.run = run

    return install


def dies_at_journal(number: int, *, afterwards: bool, name: str = "") -> Callable[[], None]:
    """The same for the journal's writes, its end included; with `name`, for that candidate's alone."""

    def install() -> None:
        count = 0

        def dying(original):
            def act(self, *arguments):
                nonlocal count
                begins = bool(arguments) and arguments[0].state == "prepared"  # others only recover it
                count += not name or (self.path.name == name and bool(count or begins))
                if count == number + 1 and not afterwards:
                    os.kill(os.getpid(), signal.SIGKILL)
                original(self, *arguments)
                if count == number + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            return act

        Journal.write, Journal.clear = dying(Journal.write), dying(Journal.clear)

    return install


def check(folder: Path, reported: dict[str, int], *, edited: bool = False) -> None:
    """Proves from git and ledger alone that nothing was lost, doubled or left dirty.

    `reported`: note → exit code of every experiment that came to its end; each has exactly one row, and that row says
    whether it was kept. `edited`: kernel.py may hold an edit.
    """
    rows = ledger.read(folder / "results.tsv")  # chain, numbers
    notes = [row.note for row in rows]
    assert len(set(notes)) == len(notes), "a row is doubled"
    by_note = {row.note: row for row in rows}
    for note, code in reported.items():
        assert note in by_note, f"the row of {note!r} is lost"
        assert (by_note[note].status in ("PASS", "DUPLICATE")) == (code == 0), (note, code, by_note[note].status)
    assert audit(folder) == []
    assert not list(Repository(folder).scratch.glob(JOURNALS))
    status = git(folder, "status", "--porcelain").splitlines()
    assert status in ([], [" M kernel.py"]) if edited else status == [], status
    reachable = set(git(folder, "for-each-ref", "--format=%(objectname)", "refs/ratchet").split())
    assert {row.commit for row in rows} <= reachable, "a row's commit has no ref"
    kept = [row for row in rows if row.status == "PASS"]
    if kept:
        assert git(folder, "show", "HEAD:kernel.py") == git(folder, "show", f"{kept[-1].commit}:kernel.py")
    assert (folder / "mine.txt").read_text() == "tracked\n"
    locks = [path for path in (folder / ".git").rglob("*.lock") if not path.name.startswith("ratchet")]
    assert locks == [], locks


def check_candidates(folder: Path, names: Iterable[str], told: str) -> None:
    """Every candidate has a row or was named in `told`; but where the command was killed before it began any."""
    judged = {row.note for row in ledger.read(folder / "results.tsv")} & set(names)
    named = {name for line in re.findall(r"to be tried again: (.*)", told) for name in line.split(", ")}
    assert not named & judged, (f"{named & judged} have a row and are said to have none", told)
    assert judged | named >= set(names) or not judged | named, (set(names) - judged - named, told)


def two_at_once(folder: Path, number: int, reported: dict[str, int]) -> int:
    """Two loops in one folder, each with an edit of its own. Checks what they leave, adds to `reported`, note → code.

    Returns how many were told that kernel.py had changed meanwhile, and recorded nothing.
    """
    pids = {}
    for name in ("a", "b"):
        edit(folder, 64 + 10 * number + (name == "b"), f" {name}")
        pids[f"{name} {number}"] = start(folder, f"{name} {number}")
    codes = {note: end(pid) for note, pid in pids.items()}
    assert set(codes.values()) <= {0, 1, 2}, codes
    reported |= {note: code for note, code in codes.items() if code < 2}
    check(folder, reported, edited=True)
    git(folder, "checkout", "-q", "kernel.py")
    return list(codes.values()).count(2)
