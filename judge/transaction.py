"""One experiment as a git transaction: prepared → committed → judged → recorded → kept or reset.

The experiment's commit is made beside the branch (`refs/ratchet/<lineage>/<number>`), with the hypothesis as its
message and kernel.py as its only change; the branch moves to it when it is kept. The ledger's new row is committed on
top in either case, so that a clone has every row and the tree is clean after each experiment. Only kernel.py and
results.tsv are ever written; other files, the index entries of other files and the user's hooks are not touched.

Each step is in the journal before it is taken, and may be taken twice. So whatever kills an experiment, the next
command looks at the journal: an edit that was not yet a commit is left as it is, an attempt that was being judged gets
a row that says FAIL_CRASH, and a verdict that was known is recorded.

Candidates that are judged at the same time have a journal each and go through the same steps. What writes refs or the
ledger is done in turns, and a turn that begins finishes first what a killed one has left half recorded; so one verdict
at most is ever on its way, and each is compared with the champion of the moment in which it is recorded.
"""

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from judge import git_locks, ledger
from judge.decide import PASS
from judge.journal import JOURNALS, STATES, Entry, Journal
from judge.ledger_index import LedgerIndex
from judge.lock import Refused, say
from judge.repository import KERNEL, LEDGER, REFS, Repository, blob_id

INDEX_WAIT_SECONDS = 5.0
SEVERAL = "candidates"  # what a journal is about that only names what others are about
_MANY_BYTES = 10 << 20  # of a ledger that takes seconds to read


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is judged: a commit that exists, with its kernel.py."""

    commit: str
    parent: str
    data: bytes
    unchanged: bool  # kernel.py is the branch's own: nothing to keep or take back


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an attempt is before it has a verdict: the row's cells that are known, and what becomes of a failure."""

    number: int
    lineage: int
    chip: str
    mode: str
    note: str
    judge_sha256: str
    keeps_edit: bool = False


class Transaction:
    """The steps in one working copy, by whoever holds its lock. `journal`: a name that JOURNALS matches."""

    def __init__(self, repository: Repository, journal: str = "journal.json") -> None:
        self.repository = repository
        self.journal = Journal(repository.scratch / journal)
        self._index: LedgerIndex | None = None

    # --- before the experiment ---

    def start(self) -> LedgerIndex:
        """Finishes or undoes what was interrupted, and returns the ledger where an experiment may begin.

        Raises Refused or LedgerError where it may not, with advice.
        """
        self.repository.check_branch()
        with self._step():
            self.recover()
        return self.begin()

    def begin(self) -> LedgerIndex:
        """The second half of `start`, for a candidate while others of the same command are judged."""
        with self.repository.turn():
            with _signals_ignored():
                self._finish_others()
            index = self.open_ledger()
            self.repository.check_files()
        return index

    @contextmanager
    def _step(self) -> Iterator[None]:
        """What no other worktree or candidate writes beside, and no signal ends half way."""
        with self.repository.turn(), _signals_ignored():
            yield

    def open_ledger(self) -> LedgerIndex:
        """The ledger, checked to be what HEAD has: nobody writes it but an experiment."""
        repository = self.repository
        path, blob = repository.folder / LEDGER, repository.blob_at("HEAD", LEDGER)
        index = LedgerIndex(path, repository.scratch / "ledger.sqlite", blob)
        if not index.is_current:
            self._set_torn_line_aside(blob)
            if path.exists() and path.stat().st_size > _MANY_BYTES:
                say(f"reading the whole of {LEDGER}, {path.stat().st_size >> 20} MiB, because it or git's copy changed")
            if blob_id(path) != blob:
                check_ledger(repository)
            index.rebuild()
        self._index = index
        return index

    def _set_torn_line_aside(self, blob: str) -> None:
        """Completes a ledger that ends within a line and is git's otherwise; anything else is left to check_ledger."""
        path = self.repository.folder / LEDGER
        tail = ledger.torn_tail(path) if path.is_file() else b""
        if not tail:
            return
        whole = path.stat().st_size - len(tail)
        committed = self.repository.run("cat-file", "blob", blob) if blob else b""
        present = path.read_bytes()
        if present[:whole] != committed[:whole] or not (whole == len(committed) or committed.startswith(present)):
            return
        aside = _unused(self.repository.scratch / "torn-line")
        ledger.write_durably(aside, tail)
        ledger.write_durably(path, committed) if committed else path.unlink()
        say(f"{LEDGER} ended within a line: what was there is in {aside.relative_to(self.repository.folder)}")

    # --- the experiment ---

    @contextmanager
    def attempt(self, plan: Plan, data: bytes) -> Iterator[Candidate]:
        """A kernel.py as a commit, to be judged and recorded inside; undone if that ends before `record`.

        Raises Refused where the disk does not take it.
        """
        try:
            with self._step():
                candidate = self._commit_attempt(plan, data)
            yield candidate
        except BaseException as error:
            with self._step():
                told = self._undo()
            if isinstance(error, OSError):
                where = f" ({error.filename})" if error.filename else ""
                raise Refused(f"{error.strerror or error}{where}: {told}; mend that and run it again") from None
            if isinstance(error, Refused | ledger.LedgerError):
                raise type(error)(f"{error}: {told}") from None
            raise

    def _commit_attempt(self, plan: Plan, data: bytes) -> Candidate:
        repository, head = self.repository, self.repository.head
        unchanged = data == repository.file_at(head, KERNEL)
        if unchanged:
            commit = repository.git("rev-list", "-1", "HEAD", "--", KERNEL)
        else:
            commit = repository.commit(head, {KERNEL: repository.write_blob(data)}, plan.note, [head])
        entry = Entry(
            state="prepared",
            what="experiment",
            branch=repository.branch,
            parent=head,
            commit=commit,
            unchanged=unchanged,
            ref=self.free_ref(f"{REFS}/{plan.lineage}/{plan.number}"),
            **{name: getattr(plan, name) for name in Plan.__dataclass_fields__},
        )
        self.journal.write(entry)
        repository.git("update-ref", entry.ref, commit, "")  # only where there is none
        self.journal.advance(state="committed")
        return Candidate(commit=commit, parent=head, data=data, unchanged=unchanged)

    def free_ref(self, ref: str) -> str:
        """`ref`, or with a suffix where another branch's attempt has it."""
        free, suffix = ref, 1
        while self.repository.ask("rev-parse", "-q", "--verify", free):
            suffix += 1
            free = f"{ref}-{suffix}"
        return free

    def judging_in(self, folder: Path) -> None:
        """Notes the judging's private folder, so that it goes even if this process is killed."""
        self.journal.advance(folder=str(folder))

    @contextmanager
    def recording(self) -> Iterator[LedgerIndex | None]:
        """The ledger of this moment, None where it or the branch is not what an experiment may add to.

        Until `record` inside has ended, no other candidate is recorded.
        """
        with self._step():
            self._finish_others()
            yield self._ledger_now()

    def _ledger_now(self) -> LedgerIndex | None:
        index, repository = self._index, self.repository
        if repository.branch != self._entry.branch:
            return None
        if index is not None and index.is_at(repository.blob_at("HEAD", LEDGER)):
            return index
        try:
            return self.open_ledger()
        except (Refused, ledger.LedgerError):
            return None

    def record(self, row: ledger.Row, champion: str = "") -> ledger.Row:
        """Makes the verdict durable, then keeps the edit or takes it back. Signals wait until it is done.

        Returns the row as it is in the ledger: a win is not one any more where the branch changed meanwhile.

        `champion`: the commit that the row was compared with, in the same turn. Raises LedgerError for a row that could
        not be read back; nothing is recorded then.
        """
        assert self._index is not None
        with self._step():
            line = ledger.next_line(row, self._index.last_sha256)
            if row.number != self._index.count + 1:
                raise ledger.LedgerError(f"row {row.number} where {self._index.count + 1} was expected")
            self.journal.advance(state="judged", row=line, number=row.number, parent=self._base(champion))
            return _row_of(self._finish())

    def _base(self, champion: str) -> str:
        """The branch's commit that the verdict is good for.

        The present one, where rows were added meanwhile and kernel.py is that of the champion compared with; else the
        one that the attempt began with, and a win is kept if the branch is as it was.
        """
        repository, entry, tip = self.repository, self._entry, self.repository.head
        if tip == entry.parent or not champion or repository.branch != entry.branch:
            return entry.parent
        if repository.blob_at(tip, LEDGER) == repository.blob_at(entry.parent, LEDGER):
            return entry.parent
        return tip if repository.blob_at(tip, KERNEL) == repository.blob_at(champion, KERNEL) else entry.parent

    def commit_files(self, what: str, files: dict[str, bytes], message: str) -> None:
        """Commits other files of the loop's own on top of the branch: the archive."""
        repository = self.repository
        blobs = tuple((name, repository.write_blob(data)) for name, data in files.items())
        with self._step():
            self.journal.write(
                Entry(
                    state="judged",
                    what=what,
                    branch=repository.branch,
                    parent=repository.head,
                    files=blobs,
                    message=message,
                )
            )
            self._finish()

    @contextmanager
    def changing_refs(self, what: str) -> Iterator[None]:
        """For a change of refs that may simply be made again; a kill leaves git's lock files to the next command."""
        if any(self.repository.scratch.glob(JOURNALS)):
            raise Refused("an experiment was interrupted: run the next one first, which finishes it")
        with self.repository.turn():
            self.journal.write(
                Entry(state="prepared", what=what, branch=self.repository.branch, parent=self.repository.head)
            )
            yield
            self.journal.clear()

    @contextmanager
    def several(self, candidates: Mapping[str, bytes], count: int) -> Iterator[None]:
        """Candidates, name → kernel.py, are judged at the same time inside, each by a Transaction with its own journal.

        `count`: the ledger's rows before. Afterwards what a killed one has left is finished or undone, and those
        without a row are named, by the next command where this one is killed.
        """
        repository = self.repository
        blobs = tuple((name, repository.write_blob(data)) for name, data in candidates.items())
        head = repository.head
        self.journal.write(
            Entry(state="prepared", what=SEVERAL, branch=repository.branch, parent=head, number=count, files=blobs)
        )
        try:
            yield
        finally:
            with self._step():
                self.recover()

    # --- the steps from a known verdict on; each may be taken again ---

    def _finish(self) -> Entry:
        self._move()
        self._settle()
        entry = self._entry
        self._forget()
        return entry

    def _move(self) -> None:
        """judged → recorded: the ledger's line, its commit, the branch."""
        entry, repository = self._entry, self.repository
        if repository.branch != entry.branch:
            raise Refused(f"branch {entry.branch} is not checked out any more")
        tip = repository.head
        if not (entry.head and repository.is_ancestor(entry.head, tip)):
            head = self._committed_row(tip) if entry.row else self._committed_files(tip)
            entry = self.journal.advance(head=head)
            repository.move_branch(entry.branch, head, tip, entry.message or _subject(_row_of(entry)))
        self.journal.advance(state="recorded")

    def _committed_files(self, tip: str) -> str:
        return self.repository.commit(tip, dict(self._entry.files), self._entry.message, [tip])

    def _committed_row(self, tip: str) -> str:
        """The commit with the ledger's new row: on top of the attempt where that is kept, of the branch where not."""
        repository, index = self.repository, self._index
        if index is None or not index.is_at(repository.blob_at(tip, LEDGER)):
            index = self.open_ledger()
        if tip != self._entry.parent:
            self._fit_to(tip)
        entry, row = self._entry, _row_of(self._entry)
        is_kept = row.status == PASS and not entry.unchanged
        if row.row_sha256 == index.last_sha256:
            blob = repository.blob_at(tip, LEDGER)  # somebody has committed the line with their own work
        else:
            offset = ledger.append(index.path, entry.row)
            blob = repository.write_blob(index.path)
            index.add(row, offset, blob)
        blobs = {LEDGER: blob}
        if is_kept:
            blobs[KERNEL] = repository.blob_at(entry.commit, KERNEL)
        parents = [tip]
        if is_kept and not repository.is_ancestor(entry.commit, tip):
            parents = [entry.commit] if repository.is_ancestor(tip, entry.commit) else [tip, entry.commit]
        return repository.commit(tip, blobs, f"{_subject(row)}\n\n{row.note}", parents)

    def _fit_to(self, tip: str) -> None:
        """Makes the row the next one of a branch that somebody moved meanwhile.

        A win is still kept where kernel.py and the ledger are what they were when it was judged.
        """
        repository, index, entry = self.repository, self._index, self._entry
        assert index is not None
        row = _row_of(entry)
        if row.row_sha256 == index.last_sha256:
            return
        known = {repository.blob_at(commit, KERNEL) for commit in (entry.parent, entry.commit)}
        same_ledger = repository.blob_at(tip, LEDGER) == repository.blob_at(entry.parent, LEDGER)
        if row.status == PASS and not (same_ledger and repository.blob_at(tip, KERNEL) in known):
            told = "passed, but the branch's kernel.py or ledger changed meanwhile: not kept, judge it again"
            row = replace(row, status="FAIL_CRASH", reason=told)
        row = replace(row, number=index.count + 1)
        line = ledger.next_line(row, index.last_sha256)
        self.journal.advance(row=line, number=row.number)

    def _settle(self) -> None:
        """recorded → kept or reset: the files and the index follow the branch, where nobody has changed them since."""
        entry, repository = self._entry, self.repository
        names = [name for name, _ in entry.files] or [KERNEL, LEDGER]
        for name in names:
            self._settle_file(name)
        end = time.monotonic() + INDEX_WAIT_SECONDS
        while True:
            try:
                repository.git("reset", "-q", "--", *names)
                return
            except Refused as error:
                if "index.lock" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def _settle_file(self, name: str) -> None:
        entry, repository = self._entry, self.repository
        path, wanted = repository.folder / name, repository.blob_at("HEAD", name)
        if name == LEDGER and self._index is not None and self._index.is_at(wanted):
            return
        ours = {repository.blob_at(entry.parent, name)}
        if name == KERNEL and entry.commit and not entry.keeps_edit:
            ours.add(repository.blob_at(entry.commit, name))
        present = blob_id(path)
        if present != wanted and present in ours and wanted:
            ledger.write_durably(path, repository.run("cat-file", "blob", wanted))
            present = wanted
        if present == wanted and name == KERNEL:
            is_executable = repository.git("ls-tree", "HEAD", "--", name).startswith("100755")
            path.chmod(path.stat().st_mode | 0o111 if is_executable else path.stat().st_mode & ~0o111)

    def _forget(self) -> None:
        folder = self._entry.folder
        self.journal.clear()
        # Only what a judging made: --keep's own folder stays.
        if folder and Path(folder).parent == Path(tempfile.gettempdir()) and Path(folder).name.startswith("ratchet-"):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _entry(self) -> Entry:
        assert self.journal.entry is not None
        return self.journal.entry

    def _undo(self) -> str:
        """Takes back an attempt that has no verdict yet; returns what became of it."""
        entry = self.journal.entry
        if entry is None:
            return "nothing was recorded"
        if entry.state in ("judged", "recorded"):
            return f"experiment {entry.number} is judged, the next run finishes recording it"
        try:
            self._drop_ref(entry)
            self._forget()
        except (Refused, OSError):
            return "the next run finishes undoing it"
        return "nothing was recorded"

    def _drop_ref(self, entry: Entry) -> None:
        """Only where it is this attempt's: a worktree may have taken the name since this one was killed."""
        if entry.ref and self.repository.ask("rev-parse", "-q", "--verify", entry.ref) == entry.commit:
            self.repository.git("update-ref", "-d", entry.ref, entry.commit)

    # --- after a crash ---

    def recover(self) -> None:
        """Finishes or undoes what the journals say was under way, and says which, in a line each."""
        for interrupted in self._interrupted():
            interrupted._recover()

    def _finish_others(self) -> None:
        """Finishes what a candidate beside this one was killed, or failed, in the middle of recording."""
        for other in self._interrupted():
            if other._entry.state in ("judged", "recorded") and other.journal.path != self.journal.path:
                other._recover()

    def _interrupted(self) -> "list[Transaction]":
        """One for each journal, the one nearest to its end first: the ledger may have a part of its line."""
        found = [Transaction(self.repository, path.name) for path in sorted(self.journal.path.parent.glob(JOURNALS))]
        readable = [transaction for transaction in found if transaction._load()]
        return sorted(readable, key=lambda transaction: STATES.index(transaction._entry.state), reverse=True)

    def _load(self) -> bool:
        """Whether there is something to recover. A journal that cannot be read is set aside."""
        if self.journal.load():
            return self.journal.entry is not None
        aside = _unused(self.journal.path.with_suffix(".unreadable"))
        self.journal.path.rename(aside)
        say(f"the journal cannot be read: it is now {aside.relative_to(self.repository.folder)}")
        return False

    def _recover(self) -> None:
        entry = self._entry
        repository = self.repository
        if entry.branch != repository.branch:
            if repository.ask("rev-parse", "-q", "--verify", entry.branch):
                short = entry.branch.removeprefix("refs/heads/")
                raise Refused(
                    f"{entry.what} {entry.number or ''} on branch {short} was interrupted: git switch {short} and run "
                    "any experiment there to finish it first".replace("  ", " ")
                )
            told = f"branch {entry.branch} is gone, and what was under way there with it"
            self._forget()
        else:
            git_locks.clear_abandoned(repository, entry)
            told = self._recovered(entry)
        if told:
            say(f"recovered: {told}")

    def _recovered(self, entry: Entry) -> str:
        if entry.what == SEVERAL:
            names = self._without_row(entry)
            self._forget()
            return f"not judged, to be tried again: {', '.join(names)}" if names else ""
        if entry.state == "prepared":
            self._drop_ref(entry)
            self._forget()
            return f"{entry.what} {entry.number or ''} had hardly begun; nothing was changed".replace("  ", " ")
        needed = [entry.commit, *(blob for _, blob in entry.files)]
        if not all(self.repository.ask("cat-file", "-t", name) for name in needed if name):
            self._forget()
            return f"what {entry.what} {entry.number or ''} had made is gone from git; kernel.py is as it was"
        if entry.head and self.repository.is_ancestor(entry.head, "HEAD"):
            self.journal.advance(state="recorded")
        else:
            self._take_back_line(entry)
            self._index = self.open_ledger()
            if entry.state == "committed":
                self._crashed(entry)
        self._finish()
        if entry.what != "experiment":
            return f"{entry.what} was interrupted, and is finished"
        if not entry.row:
            return f"experiment {entry.number} was killed while it was judged: row FAIL_CRASH, kernel.py is as it was"
        return f"experiment {entry.number} was judged {_row_of(entry).status} when it was killed, and is recorded"

    def _without_row(self, entry: Entry) -> list[str]:
        """Which of several candidates have none: their journals are settled by now."""
        index = self.open_ledger()
        rows = (index.row(number) for number in range(entry.number + 1, index.count + 1))
        judged = {self.repository.blob_at(row.commit, KERNEL) for row in rows}
        return [name for name, blob in entry.files if blob not in judged]

    def _crashed(self, entry: Entry) -> None:
        """committed → judged, with the row of an attempt whose judging did not come to an end."""
        assert self._index is not None
        if entry.ref:
            self.repository.git("update-ref", entry.ref, entry.commit)
        empty: dict[str, Any] = dict.fromkeys(ledger.COLUMNS)
        empty |= dict.fromkeys(("regime", "workloads", "artifact_sha256", "row_sha256"), "")
        row = ledger.Row(
            **empty
            | {name: getattr(entry, name) for name in ("commit", "note", "lineage", "chip", "mode", "judge_sha256")}
            | {"number": self._index.count + 1, "status": "FAIL_CRASH", "parent_commit": entry.parent}
            | {"reason": "the judging was killed before it came to a verdict: the same edit may be tried again"}
        )
        # What is in kernel.py is what the next command is asked to judge.
        line = ledger.next_line(row, self._index.last_sha256)
        self.journal.advance(state="judged", row=line, keeps_edit=True)

    def _take_back_line(self, entry: Entry) -> None:
        """Removes from the ledger's file what an interrupted append left: the row is appended again."""
        path = self.repository.folder / LEDGER
        blob = self.repository.blob_at("HEAD", LEDGER)
        size = int(self.repository.git("cat-file", "-s", blob)) if blob else 0
        if not entry.row or not path.is_file() or path.stat().st_size <= size:
            return
        with path.open("rb") as file:
            file.seek(size)
            tail = file.read()
        whole = entry.row if blob else f"{ledger.HEADER}\n{entry.row}"
        if not whole.encode().startswith(tail) or (blob and blob_id(path, size) != blob):
            return
        if blob:
            with path.open("r+b") as file:
                file.truncate(size)
        else:
            path.unlink()


def check_ledger(repository: Repository) -> list[ledger.Row]:
    """Every row of the ledger, verified, where its file is what HEAD has. Raises Refused or LedgerError by line."""
    committed = (repository.file_at("HEAD", LEDGER) or b"").decode(errors="replace")
    path = repository.folder / LEDGER
    present = path.read_bytes().decode(errors="replace") if path.exists() else ""
    rows = ledger.parse(present)  # the line number of what is wrong, where that can be told
    if present != committed:
        ours, theirs = present.split("\n"), committed.split("\n")
        line = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours) - 1)
        raise Refused(f"{LEDGER}:{line + 1}: differs from the committed ledger; git checkout {LEDGER} restores it")
    return rows


def _row_of(entry: Entry) -> ledger.Row:
    return ledger.parse_row(entry.row.removesuffix("\n"), f"journal, row {entry.number}")


def _subject(row: ledger.Row) -> str:
    return f"ledger {row.number}: {row.status}" + (f" score={row.score:.6g}" if row.score is not None else "")


def _unused(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return free


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Neither this process nor the git that it runs ends on a signal that asks it to."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
