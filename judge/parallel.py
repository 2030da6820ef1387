"""Several candidates at once: judged at the same time, recorded one after the other in the one ledger of the branch.

Each candidate is an ordinary experiment whose kernel.py comes from a file: a process of its own commits, judges and
records it, with its own journal and in turns with the others. So whatever kills one, or all, leaves what a killed
experiment leaves. One that is recorded is compared with the champion of that moment: if another candidate has become
that meanwhile, only a better one is kept, and the other stays on the branch as a commit below it.

Not a worktree with a branch for each: a lineage has one champion and one ledger, and rows that were made on other
branches would have to be compared, numbered and chained anew. The judge takes a candidate from its commit into a
private folder and needs no checkout. In worktrees that a user makes, experiments run at the same time too, each on its
branch with that branch's ledger; the kernel.py of such a worktree is a candidate here.
"""

import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import IO, Any, TextIO

from judge.containment import end_with_parent
from judge.experiment import Experiment, Outcome, check_note, find_lineage, judge_and_record
from judge.lock import Refused, say
from judge.repository import Repository
from judge.sandbox import ENDING
from judge.transaction import Transaction

JUDGING_BYTES = 12 << 30  # of memory: benchmarks/experiment_time.py, the kernel of this repository on v5e
POLL_SECONDS = 0.2
CLEANUP_SECONDS = 60.0  # what a candidate that is told to end gets to undo its attempt


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A kernel.py to be judged, and the hypothesis."""

    name: str  # its file, as the user gave it
    note: str
    data: bytes


def read_candidates(pairs: Sequence[tuple[Path, str]]) -> list[Candidate]:
    """(file, hypothesis) pairs. Raises Refused where one cannot be a candidate."""
    candidates = []
    for path, note in pairs:
        check_note(note)
        if not path.is_file():
            raise Refused(f"{path}: no such file; each candidate is a whole kernel.py, followed by its hypothesis")
        candidates.append(Candidate(name=str(path), note=note, data=path.read_bytes()))
    names = [candidate.name for candidate in candidates]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Refused(f"{', '.join(sorted(twice))}: given twice")
    return candidates


def default_jobs(mode: str) -> int:
    """How many are judged at the same time: as many as there are cores, and memory; on a chip one."""
    if mode == "chip":
        return 1
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free_bytes = int(fields["MemAvailable"].split()[0]) << 10
    return max(1, min(len(os.sched_getaffinity(0)), free_bytes // JUDGING_BYTES))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A candidate's process: what it printed, and its exit code, below 0 where a signal killed it."""

    candidate: Candidate
    exit_code: int
    text: str

    def as_json(self) -> dict[str, Any]:
        """With what it printed as JSON, where that was asked for."""
        result = {"file": self.candidate.name, "note": self.candidate.note, "exit_code": self.exit_code}
        try:
            said = json.loads(self.text.rstrip().rpartition("\n")[2])
        except ValueError:
            said = {"status": None, "error": "it was killed"}
        return result | said


@dataclass(frozen=True, kw_only=True)
class Several:
    """What ./ratchet.sh --parallel was asked for. `asked` is the experiment but for its note."""

    folder: Path
    asked: Experiment
    candidates: Sequence[Candidate]
    jobs: int

    def run(self, work: Callable[[Callable[[], Outcome]], int], ended: Callable[[Ended], None]) -> None:
        """Judges and records all; `ended` gets each as it is recorded.

        `work` runs in a candidate's process: it calls the function that it is given, reports, and returns the exit
        code. A signal that asks to end ends the candidates first. Raises Refused or LedgerError where none may begin.
        """
        repository = Repository(self.folder)
        with repository.exclusive(f"{len(self.candidates)} candidates", wait=self.asked.wait):
            transaction = Transaction(repository)
            index = transaction.start()
            chip = self.asked.chip.name
            if find_lineage(index, chip, self.asked.mode, new_baseline=False).baseline is None:
                raise Refused(f'no baseline on {chip} in {self.asked.mode} mode yet: ./ratchet.sh "baseline" first')
            say(f"{len(self.candidates)} candidates, {min(self.jobs, len(self.candidates))} at the same time")
            files, count = {candidate.name: candidate.data for candidate in self.candidates}, index.count
            index.close()  # no process may have another's
            with _Stop().installed() as stop, transaction.several(files, count):
                _Pool(self, repository, count, work, stop).run(ended)
            for number in stop.noted:
                signal.raise_signal(number)


class _Stop:
    """Signals that ask to end are only noted while processes run that must be told, and waited for."""

    def __init__(self) -> None:
        self.noted: list[int] = []
        self.before = {number: signal.getsignal(number) for number in ENDING}

    @contextmanager
    def installed(self) -> "Iterator[_Stop]":
        for number in ENDING:
            signal.signal(number, lambda number, frame: self.noted.append(number))
        try:
            yield self
        finally:
            self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Pool:
    """The candidates' processes. Forked, so that each holds the lock of the folder as long as it lives."""

    def __init__(
        self,
        several: Several,
        repository: Repository,
        count: int,
        work: Callable[[Callable[[], Outcome]], int],
        stop: _Stop,
    ) -> None:
        self.several = several
        self.repository = repository
        self.branch = repository.branch
        self.count = count
        self.work = work
        self.stop = stop
        self.running: dict[Any, tuple[ForkProcess, Candidate, IO[bytes]]] = {}

    def run(self, ended: Callable[[Ended], None]) -> None:
        waiting = deque(enumerate(self.several.candidates, 1))
        try:
            while not self.stop.noted and (waiting or self.running):
                while waiting and len(self.running) < self.several.jobs:
                    self._start(*waiting.popleft())
                for sentinel in wait(list(self.running), POLL_SECONDS):
                    ended(self._ended(sentinel))
        finally:
            self._end_all()
        for sentinel in list(self.running):
            ended(self._ended(sentinel))

    def _start(self, number: int, candidate: Candidate) -> None:
        out = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        process = multiprocessing.get_context("fork").Process(
            target=self._judge, args=(number, candidate, out.fileno(), os.getpid()), daemon=True
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until the new process has its own handlers
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.running[process.sentinel] = process, candidate, out

    def _judge(self, number: int, candidate: Candidate, out: int, parent: int) -> None:
        """All that a candidate's process does."""
        end_with_parent(parent)
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches it once, through the parent
        self.stop.restore()
        os.dup2(out, 1)
        sys.stderr = _Labelled(sys.stderr, candidate.name)
        sys.exit(self.work(lambda: self._experiment(number, candidate)))

    def _experiment(self, number: int, candidate: Candidate) -> Outcome:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        transaction = Transaction(self.repository, f"journal-{number}.json")
        index = transaction.begin()
        if self.repository.branch != self.branch:
            raise Refused(f"branch {self.branch} is not checked out any more: nothing was judged")
        asked = replace(self.several.asked, note=candidate.note)
        return judge_and_record(transaction, index, asked, candidate.data, self.count + number)

    def _ended(self, sentinel: Any) -> Ended:
        process, candidate, out = self.running.pop(sentinel)
        process.join()
        code = process.exitcode
        with out:
            out.seek(0)
            text = out.read().decode(errors="replace")
        return Ended(candidate=candidate, exit_code=2 if code is None else code, text=text)

    def _end_all(self) -> None:
        """Nothing is recovered beside a process that lives."""
        for process, _, _ in self.running.values():
            process.terminate()
        for process, _, _ in self.running.values():
            process.join(CLEANUP_SECONDS)
            process.kill()
            process.join()


class _Labelled(io.TextIOBase):
    """Whole lines, each behind a name: whose progress it is."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self._stream, self._label, self._line = stream, label, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._stream.write("".join(f"[{self._label}] {line}\n" for line in lines))
            self._stream.flush()
        return len(text)
