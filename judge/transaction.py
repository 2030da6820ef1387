"""One experiment as a git transaction: commit the edit, judge it, record it, keep it or take it back.

The experiment's commit is made beside the branch (`refs/ratchet/<lineage>/<number>`), with the hypothesis as its
message and kernel.py as its only change; the branch moves to it when it is kept. The ledger's new row is committed on
top in either case, so that a clone has every row and the tree is clean after each experiment. Only kernel.py and
results.tsv are ever written; other files, the index entries of other files and the user's hooks are not touched.
"""

import fcntl
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import git

from judge import ledger
from judge.contract import ContractError, Source, check_source

KERNEL = "kernel.py"
LEDGER = "results.tsv"
ARCHIVE = "experiments.bundle"
REFS = "refs/ratchet"
SCRATCH = ".ratchet"  # ignored by git


class Refused(Exception):
    """The experiment cannot start or be recorded: exit code 2, nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is judged: a commit that exists, with its kernel.py."""

    commit: str
    parent: str
    data: bytes
    unchanged: bool  # kernel.py is the branch's own: nothing to keep or take back


class Repository:
    """The git side of the loop. Raises Refused from every method where git does not allow it."""

    def __init__(self, folder: Path) -> None:
        try:
            self._repo = git.Repo(folder, search_parent_directories=False)
        except (git.InvalidGitRepositoryError, git.NoSuchPathError):
            raise Refused(f"{folder} is not a git repository: run git init and commit first") from None
        if self._repo.bare:
            raise Refused("a bare repository has no kernel.py to edit")
        self.folder = folder

    def git(self, *arguments: str, data: bytes | None = None, index: str | None = None) -> str:
        """Runs git without the user's hooks. Raises Refused with git's message."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        if index is not None:
            environment["GIT_INDEX_FILE"] = index
        for role in ("AUTHOR", "COMMITTER"):
            if not self._has_identity:
                environment |= {f"GIT_{role}_NAME": "Ratchet", f"GIT_{role}_EMAIL": "ratchet@localhost"}
        done = subprocess.run(
            ["git", "-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", *arguments],
            cwd=self.folder,
            env=environment,
            input=data,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            message = done.stderr.decode(errors="replace").strip()
            raise Refused(f"git {arguments[0]} failed: {message or done.returncode}")
        return done.stdout.decode(errors="surrogateescape")

    @property
    def _has_identity(self) -> bool:
        reader = self._repo.config_reader()
        return bool(reader.get_value("user", "email", "") and reader.get_value("user", "name", ""))

    # --- what is there ---

    @property
    def head(self) -> str:
        return self._repo.head.commit.hexsha

    def check_ready(self) -> None:
        """Refuses a state in which an experiment could lose something or be attributed wrongly."""
        if not self._repo.head.is_valid():
            raise Refused("the branch has no commit yet: commit the project first")
        if self._repo.head.is_detached:
            raise Refused("HEAD is detached: check out a branch first, e.g. git switch -c experiments")
        git_folder = Path(self._repo.git_dir)
        for name in ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-merge", "rebase-apply", "BISECT_LOG"):
            if (git_folder / name).exists():
                raise Refused(f"a git operation is in progress ({name}): finish or abort it first")
        if (git_folder / "index.lock").exists():
            raise Refused(
                f"{git_folder / 'index.lock'} exists: another git is running, or one was killed; remove it then"
            )
        path = self.folder / KERNEL
        if path.is_symlink():
            raise Refused(f"{KERNEL} is a symbolic link: the judge reads the file that is committed, so make it one")
        if not path.is_file():
            raise Refused(f"no {KERNEL} here: restore it with git checkout {KERNEL}")
        self.ledger_text()  # says more about a changed ledger than the list of changed files
        strange = self.git("ls-files", "--others", "--exclude-standard", "--", "judge").split()
        if strange:
            raise Refused(f"files in judge/ that git does not know change the judge: {', '.join(strange)}; remove them")
        others = [name for name in self._changed() if name != KERNEL]
        if others:
            raise Refused(
                f"an experiment changes {KERNEL} alone, but also changed: {', '.join(others)}; commit or stash these"
            )

    def _changed(self) -> list[str]:
        """Tracked files that differ from HEAD in the index or the working tree."""
        fields = self.git("status", "--porcelain=v1", "-z", "--untracked-files=no", "--ignore-submodules=none")
        entries = fields.split("\0")
        names, i = [], 0
        while i < len(entries) and entries[i]:
            names.append(entries[i][3:])
            i += 2 if entries[i][0] in "RC" else 1
        return names

    def file_at(self, commit: str, name: str) -> bytes | None:
        """A file's content in a commit, or None."""
        try:
            blob = self._repo.commit(commit).tree / name
        except (KeyError, ValueError, git.BadName):
            return None
        data: bytes = blob.data_stream.read()
        return data

    def ledger_text(self) -> str:
        """The ledger, checked to be what HEAD has: nobody writes it but an experiment."""
        committed = (self.file_at(self.head, LEDGER) or b"").decode(errors="replace")
        path = self.folder / LEDGER
        present = path.read_bytes().decode(errors="replace") if path.exists() else ""
        ledger.parse(present)  # the line number of what is wrong, where that can be told
        if present != committed:
            ours, theirs = present.split("\n"), committed.split("\n")
            line = next(
                (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours) - 1
            )
            raise Refused(f"{LEDGER}:{line + 1}: differs from the committed ledger; git checkout {LEDGER} restores it")
        return present

    def source_at(self, commit: str) -> Source:
        """kernel.py of a commit, as the oracle or the champion."""
        data = self.file_at(commit, KERNEL)
        if data is None:
            raise Refused(f"commit {commit} has no {KERNEL}; git fetch {ARCHIVE} '{REFS}/*:{REFS}/*' may bring it back")
        try:
            return check_source(data, f"{KERNEL} of {commit[:12]}")
        except ContractError as error:
            raise Refused(f"the sealed {error}") from None

    # --- the experiment ---

    def candidate(self, note: str) -> Candidate:
        """The edit in kernel.py as a commit on top of HEAD; HEAD's own last change of it where there is no edit."""
        data = (self.folder / KERNEL).read_bytes()
        if data == self.file_at(self.head, KERNEL):
            commit = self.git("rev-list", "-1", "HEAD", "--", KERNEL).strip()
            return Candidate(commit=commit, parent=self.head, data=data, unchanged=True)
        commit = self._commit(self.head, {KERNEL: data}, note)
        return Candidate(commit=commit, parent=self.head, data=data, unchanged=False)

    def _commit(self, parent: str, files: dict[str, bytes], message: str) -> str:
        """A commit on top of `parent` with some files replaced, made without touching index, tree or branch."""
        with tempfile.TemporaryDirectory(prefix="ratchet-index-") as folder:
            index = str(Path(folder) / "index")
            self.git("read-tree", parent, index=index)
            for name, data in files.items():
                blob = self.git("hash-object", "-w", "--no-filters", "--stdin", data=data).strip()
                entry = self.git("ls-tree", parent, "--", name).split()
                mode = entry[0] if entry else "100644"
                self.git("update-index", "--add", "--cacheinfo", f"{mode},{blob},{name}", index=index)
            tree = self.git("write-tree", index=index).strip()
        text = message.encode(errors="surrogateescape")
        return self.git("commit-tree", tree, "-p", parent, data=text or b"experiment").strip()

    def record(self, candidate: Candidate, row: ledger.Row, *, keep_edit: bool = False) -> str:
        """Makes the verdict durable and returns the row's line. Signals wait until it is.

        Order: the attempt's ref, the ledger commit, the branch (only if it is still where the experiment began), then
        index and working tree. Until the branch moves nothing has happened; afterwards only files are brought into
        line with it, by the next experiment (finish_interrupted) if this one is killed.
        """
        with _signals_ignored():
            return self._record(candidate, row, keep_edit=keep_edit)

    def _record(self, candidate: Candidate, row: ledger.Row, *, keep_edit: bool) -> str:
        committed = (self.file_at(self.head, LEDGER) or b"").decode()
        text = ledger.appended(committed, row)
        self.git("update-ref", self._free_ref(f"{REFS}/{row.lineage}/{row.number}", candidate), candidate.commit)
        is_kept = row.status == "PASS" and not candidate.unchanged
        base = candidate.commit if is_kept else candidate.parent
        subject = f"ledger {row.number}: {row.status}" + (f" score={row.score:.6g}" if row.score is not None else "")
        new_head = self._commit(base, {LEDGER: text.encode()}, f"{subject}\n\n{row.note}")
        branch = self._repo.head.reference.path
        takes_back = not is_kept and not candidate.unchanged and not keep_edit
        journal = self.folder / SCRATCH / "recording"
        journal.write_text(f"{new_head} {candidate.commit if takes_back else ''}")
        try:
            self.git("update-ref", "-m", f"ratchet: {subject}", branch, new_head, candidate.parent)
        except Refused:
            journal.unlink()
            if self.head == candidate.parent:
                raise
            raise Refused("the branch moved while the experiment ran: nothing was recorded; run it again") from None
        self._settle(new_head, candidate.commit if takes_back else "")
        journal.unlink()
        return text.splitlines()[-1]

    def _free_ref(self, ref: str, candidate: Candidate) -> str:
        """`ref`, or with a suffix where another branch's experiment of that number has it: its attempt stays."""
        taken = dict(
            line.split() for line in self.git("for-each-ref", "--format=%(refname) %(objectname)", REFS).splitlines()
        )
        free, suffix = ref, 1
        while taken.get(free, candidate.commit) != candidate.commit:
            suffix += 1
            free = f"{ref}-{suffix}"
        return free

    def _settle(self, head: str, rejected: str) -> None:
        """Brings ledger, kernel.py and index into line with `head`; takes back kernel.py if it is `rejected`'s."""
        ledger.write(self.folder / LEDGER, (self.file_at(head, LEDGER) or b"").decode())
        path = self.folder / KERNEL
        # Not where somebody went on editing it meanwhile.
        if rejected and path.read_bytes() == self.file_at(rejected, KERNEL):
            partial = path.with_name(f".{KERNEL}.part")
            partial.write_bytes(self.file_at(head, KERNEL) or b"")
            partial.chmod(path.stat().st_mode)
            os.replace(partial, path)
        self.git("reset", "-q", "--", KERNEL, LEDGER)

    def finish_interrupted(self) -> None:
        """Settles the files of an experiment that was killed between moving the branch and doing so itself."""
        journal = self.folder / SCRATCH / "recording"
        if not journal.exists():
            return
        head, _, rejected = journal.read_text().partition(" ")
        path = self.folder / LEDGER
        if self._repo.head.is_valid() and self.head == head:
            before = self.file_at(f"{head}^", LEDGER) or b""
            if (path.read_bytes() if path.exists() else b"") in (before, self.file_at(head, LEDGER)):
                self._settle(head, rejected)
        journal.unlink()

    def archive(self) -> str:
        """Packs every attempt's commit into one bundle, thin against the branch, and commits it."""
        self.check_ready()
        self.unpack_archive()  # in a clone, what the bundle has and the new one must keep
        refs = self.git("for-each-ref", "--format=%(refname)", "--no-merged=HEAD", REFS).split()
        if not refs:
            raise Refused("nothing to archive: the branch has every experiment's commit")
        if (self.folder / ARCHIVE).exists():
            packed = {line.split()[1] for line in self.git("bundle", "list-heads", ARCHIVE).splitlines()}
            if packed == set(refs):
                return f"{ARCHIVE} has all {len(refs)} attempts already"
        with tempfile.TemporaryDirectory(prefix="ratchet-bundle-") as folder:
            path = Path(folder) / ARCHIVE
            self.git("bundle", "create", "-q", str(path), f"--glob={REFS}/*", "^HEAD")
            data = path.read_bytes()
        new_head = self._commit(self.head, {ARCHIVE: data}, f"archive of {len(refs)} attempts")
        self.git("update-ref", "-m", "ratchet: archive", self._repo.head.reference.path, new_head, self.head)
        (self.folder / ARCHIVE).write_bytes(data)
        self.git("reset", "-q", "--", ARCHIVE)
        return f"{len(refs)} attempts that the branch does not hold are in {ARCHIVE}, {len(data)} bytes"

    def unpack_archive(self) -> None:
        """Brings back the attempts' refs in a clone, from the committed bundle, where they are missing."""
        if (self.folder / ARCHIVE).exists():
            self.git("fetch", "-q", ARCHIVE, f"{REFS}/*:{REFS}/*")

    def has_commit(self, commit: str) -> bool:
        try:
            self.git("cat-file", "-e", f"{commit}^{{commit}}")
        except Refused:
            return False
        return True

    def is_on_branch(self, commit: str) -> bool:
        try:
            self.git("merge-base", "--is-ancestor", commit, "HEAD")
        except Refused:
            return False
        return True


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


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One experiment at a time in a repository. Raises Refused where another one runs."""
    lock_folder = folder / SCRATCH
    lock_folder.mkdir(exist_ok=True)
    with (lock_folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise Refused(f"another experiment runs in this folder (process {owner}): wait for it") from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield
