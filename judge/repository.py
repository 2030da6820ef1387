"""The git side of the loop: what is there, whether an experiment may start, and commits made beside the branch.

Git is told to run no hook, no file monitor and no signature program of the user's, to write nothing that it need not,
and to have objects and refs on the disk before it answers.
"""

import hashlib
import io
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import git

from judge.contract import ContractError, Source, check_source
from judge.lock import Refused, exclusive

KERNEL = "kernel.py"
LEDGER = "results.tsv"
ARCHIVE = "experiments.bundle"
REFS = "refs/ratchet"
SCRATCH = ".ratchet"  # ignored by git
TURN_PATIENCE_SECONDS = 5.0  # a turn takes milliseconds, but for one that packs the repository

_SETTINGS = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.fsync=committed,reference",
    "gc.auto=0",
    "maintenance.auto=false",
    "core.quotePath=false",
)
_IN_PROGRESS = ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-merge", "rebase-apply", "BISECT_LOG")


class Killed(Refused):
    """A git of ours was killed, so what it was asked has no answer: neither yes nor no."""


class Repository:
    """A folder that is the top of a git working tree. Raises Refused from every method where git does not allow it."""

    def __init__(self, folder: Path) -> None:
        try:
            self._repo = git.Repo(folder, search_parent_directories=False)
        except (git.InvalidGitRepositoryError, git.NoSuchPathError):
            raise Refused(f"{folder} is not a git repository: run git init and commit first") from None
        if self._repo.bare:
            raise Refused("a bare repository has no kernel.py to edit")
        self.folder = folder
        self.git_folder = Path(self._repo.git_dir)  # of this worktree
        self.common_folder = Path(self._repo.common_dir)  # of all worktrees
        self.scratch = folder / SCRATCH
        self._inherited: tuple[int, ...] = ()
        self._in_turn = False
        self._label = ""
        if (self.common_folder / "config").is_file() and self._config("extensions.objectFormat") not in ("", "sha1"):
            raise Refused("the ledger holds SHA-1 commits: use a repository made with git init --object-format=sha1")

    def run(self, *arguments: str, data: bytes | None = None) -> bytes:
        """What git prints. Raises Refused with git's message."""
        settings = [part for setting in _SETTINGS for part in ("-c", setting)]
        done = subprocess.run(
            ["git", *settings, *arguments],
            cwd=self.folder,
            env=_environment() | self._identity,
            input=data,
            capture_output=True,
            check=False,
            pass_fds=self._inherited,
        )
        if done.returncode < 0:
            raise Killed(f"git {arguments[0]} was killed by signal {-done.returncode}: run it again")
        if done.returncode:
            message = done.stderr.decode(errors="replace").strip()
            raise Refused(f"git {arguments[0]} failed: {message or f'code {done.returncode}'}")
        return done.stdout

    def git(self, *arguments: str, data: bytes | None = None) -> str:
        return self.run(*arguments, data=data).decode(errors="surrogateescape").removesuffix("\n")

    def ask(self, *arguments: str) -> str:
        """What git prints, nothing where it fails: for questions whose no is a failure."""
        try:
            return self.git(*arguments)
        except Killed:
            raise
        except Refused:
            return ""

    def _config(self, name: str) -> str:
        done = subprocess.run(
            ["git", "config", "--get", name], cwd=self.folder, env=_environment(), capture_output=True, check=False
        )
        return done.stdout.decode(errors="replace").strip()

    @cached_property
    def _identity(self) -> dict[str, str]:
        """A name for commits where the user has none."""
        if self._config("user.email") and self._config("user.name"):
            return {}
        roles = ("AUTHOR", "COMMITTER")
        names = {f"GIT_{role}_NAME": "Ratchet" for role in roles}
        return names | {f"GIT_{role}_EMAIL": "ratchet@localhost" for role in roles}

    @contextmanager
    def exclusive(self, label: str, *, wait: bool = True) -> Iterator[None]:
        """One command at a time in this working copy. Other worktrees have a lock each, and go on: see `turn`."""
        with exclusive(self.git_folder / "ratchet.lock", label, wait=wait) as descriptor:
            self._inherited, self._label = (descriptor,), label
            try:
                self._make_scratch()
                yield
            finally:
                self._inherited = ()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Alone among all worktrees, and among candidates that are judged at the same time: for the moments in which
        refs and the ledger are written. Inside a turn it is the same turn.
        """
        if self._in_turn:
            yield
            return
        path, outer = self.common_folder / "ratchet-turn.lock", self._inherited
        with exclusive(path, self._label, patience_seconds=TURN_PATIENCE_SECONDS) as descriptor:
            self._inherited, self._in_turn = (*outer, descriptor), True
            try:
                yield
            finally:
                self._inherited, self._in_turn = outer, False

    def _make_scratch(self) -> None:
        try:
            self.scratch.mkdir(exist_ok=True)
        except OSError as error:
            raise Refused(f"cannot make {self.scratch}: {error.strerror}") from None

    # --- what is there ---

    @property
    def head(self) -> str:
        return self.git("rev-parse", "--verify", "HEAD^{commit}")

    @property
    def branch(self) -> str:
        """The full name of the branch that is checked out; empty where HEAD is detached."""
        return self.ask("symbolic-ref", "-q", "HEAD")

    def blob_at(self, commit: str, name: str) -> str:
        """The id of a file in a commit; empty where it has none."""
        return self.ask("rev-parse", "-q", "--verify", f"{commit}:{name}")

    def file_at(self, commit: str, name: str) -> bytes | None:
        """A top file's content in a commit, or None. Raises Refused where an object is not what its name says."""
        full = self.ask("rev-parse", "-q", "--verify", f"{commit}^{{commit}}")
        return self._files_at([full], name)[0] if full else None

    def damaged(self, commits: Iterable[str], name: str) -> dict[str, str]:
        """Commit → what is wrong, for those in which a top file is not to be had as it was committed."""
        found, left = {}, list(commits)
        while left:
            some, left = left[:100], left[100:]  # their files are held at the same time
            try:
                self._files_at(some, name)
            except Refused:
                for commit in some:
                    try:
                        self._files_at([commit], name)
                    except Refused as error:
                        found[commit] = str(error)
        return found

    def _files_at(self, commits: Sequence[str], name: str) -> list[bytes | None]:
        trees = [content[len("tree ") :].split(b"\n", 1)[0].decode() for content in self._objects(commits)]
        blobs = [_entry(content, name) for content in self._objects(trees)]
        contents = iter(self._objects([blob for blob in blobs if blob]))
        return [next(contents) if blob else None for blob in blobs]

    def _objects(self, ids: Sequence[str]) -> list[bytes]:
        """What git has under each id; it takes for granted that an object's file holds what its name says."""
        told = io.BytesIO(self.run("cat-file", "--batch", data="".join(f"{one}\n" for one in ids).encode()))
        found = []
        for one in ids:
            _, _, kind_and_size = told.readline().rstrip(b"\n").partition(b" ")
            if kind_and_size == b"missing":
                raise Refused(f"git has no object {one}; git fetch {ARCHIVE} '{REFS}/*:{REFS}/*' may bring it back")
            content = told.read(int(kind_and_size.split()[1]))
            told.read(1)
            if hashlib.sha1(kind_and_size + b"\0" + content).hexdigest() != one:
                raise Refused(f"git's object {one} is not what its name says: git fsck; fetch it from another clone")
            found.append(content)
        return found

    @property
    def is_shallow(self) -> bool:
        return (self.common_folder / "shallow").exists()

    def kinds(self, names: Iterable[str]) -> list[str]:
        """What each name is to git, all in one question: commit, blob, …, or empty where it is nothing."""
        return self._told("objecttype", names)

    def sizes_bytes(self, names: Iterable[str]) -> list[int]:
        """How long what each name stands for is, all in one question; 0 where it is nothing."""
        return [int(size or 0) for size in self._told("objectsize", names)]

    def _told(self, what: str, names: Iterable[str]) -> list[str]:
        asked = "".join(f"{name}\n" for name in names)
        answers = self.git("cat-file", f"--batch-check=%({what})", data=asked.encode()).splitlines()
        return ["" if answer.endswith(" missing") else answer for answer in answers]

    def has_commit(self, commit: str) -> bool:
        return self.ask("cat-file", "-t", commit) == "commit"

    def is_on_branch(self, commit: str) -> bool:
        return self.is_ancestor(commit, "HEAD")

    def is_ancestor(self, commit: str, descendant: str) -> bool:
        try:
            self.run("merge-base", "--is-ancestor", commit, descendant)
        except Killed:
            raise
        except Refused:
            return False
        return True

    def source_at(self, commit: str) -> Source:
        """kernel.py of a commit, as the oracle or the champion."""
        data = self.file_at(commit, KERNEL)
        if data is None:
            if self.is_shallow and not self.has_commit(commit):
                raise Refused(f"commit {commit} is not in this shallow clone: git fetch --unshallow")
            raise Refused(f"commit {commit} has no {KERNEL}; git fetch {ARCHIVE} '{REFS}/*:{REFS}/*' may bring it back")
        try:
            return check_source(data, f"{KERNEL} of {commit[:12]}")
        except ContractError as error:
            raise Refused(f"the sealed {error}") from None

    # --- whether an experiment may start ---

    def check_branch(self) -> None:
        """Refuses a state in which a commit could not be kept on a branch."""
        if not self.branch:
            raise Refused("HEAD is detached: check out a branch first, e.g. git switch -c experiments")
        if not self.ask("rev-parse", "-q", "--verify", "HEAD^{commit}"):
            raise Refused("the branch has no commit yet: commit the project first")
        for name in _IN_PROGRESS:
            if (self.git_folder / name).exists():
                raise Refused(f"a git operation is in progress ({name}): finish or abort it first")

    def check_files(self) -> None:
        """Refuses a state in which an experiment could lose something or be attributed wrongly."""
        lock = self.git_folder / "index.lock"
        if lock.exists():
            raise Refused(f"{lock} exists: another git is running, or one was killed; remove it then")
        path = self.folder / KERNEL
        if path.is_symlink():
            raise Refused(f"{KERNEL} is a symbolic link: the judge reads the file that is committed, so make it one")
        if not path.is_file():
            raise Refused(f"no {KERNEL} here: restore it with git checkout {KERNEL}")
        strange = self.git("ls-files", "-z", "--others", "--exclude-standard", "--", "judge").split("\0")[:-1]
        if strange:
            raise Refused(f"files in judge/ that git does not know change the judge: {', '.join(strange)}; remove them")
        others = [name for name in self._changed() if name != KERNEL]
        if others:
            raise Refused(
                f"an experiment changes {KERNEL} alone, but also changed: {', '.join(others)}; commit or stash these"
            )

    def _changed(self) -> list[str]:
        """Tracked files that differ from HEAD in the index or the working tree."""
        fields = self.git("status", "--porcelain=v1", "-z", "--untracked-files=no", "--ignore-submodules=untracked")
        entries = fields.split("\0")
        names, i = [], 0
        while i < len(entries) and entries[i]:
            names.append(entries[i][3:])
            i += 2 if entries[i][0] in "RC" else 1
        return names

    # --- making commits ---

    def write_blob(self, content: bytes | Path) -> str:
        """Stores bytes, or a file without reading it into memory, unconverted."""
        if isinstance(content, Path):
            return self.git("hash-object", "-w", "--no-filters", "--", str(content))
        return self.git("hash-object", "-w", "--no-filters", "--stdin", data=content)

    def commit(self, tree_of: str, blobs: Mapping[str, str], message: str, parents: Sequence[str]) -> str:
        """A commit with the tree of `tree_of`, some of its top files replaced; neither index nor branch is touched."""
        listing = self.git("ls-tree", "-z", tree_of).split("\0")
        entries = {name: entry for entry, _, name in (line.partition("\t") for line in listing if line)}
        for name, blob in blobs.items():
            mode = entries.get(name, "")[:6]
            entries[name] = f"{mode if mode == '100755' else '100644'} blob {blob}"
        lines = "".join(f"{entry}\t{name}\0" for name, entry in entries.items())
        tree = self.git("mktree", "-z", "--missing", data=lines.encode(errors="surrogateescape"))
        options = [part for parent in parents for part in ("-p", parent)]
        return self.git("commit-tree", tree, *options, data=_message(message))

    def move_branch(self, branch: str, commit: str, before: str, why: str) -> None:
        self.git("update-ref", "-m", f"ratchet: {why}", branch, commit, before)


def blob_id(path: Path, size_bytes: int | None = None) -> str:
    """What git calls a file's content, or its first bytes; empty where there is no file. The file is streamed."""
    if not path.is_file():
        return ""
    left = path.stat().st_size if size_bytes is None else size_bytes
    digest = hashlib.sha1(f"blob {left}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _entry(tree: bytes, name: str) -> str:
    """The id that a tree, as git stores it, gives for a name; empty where it has none."""
    while tree:
        entry, tree = tree.split(b"\0", 1)
        if entry.split(b" ", 1)[1] == name.encode():
            return tree[:20].hex()
        tree = tree[20:]
    return ""


def _environment() -> dict[str, str]:
    """Ours without what would point git elsewhere. Reading does not write the index, nor heed `git replace`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    own = {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    return kept | own


def _message(text: str) -> bytes:
    """A commit's message from any text: what UTF-8 or git cannot hold is spelled out."""
    text = text.replace("\0", "\\x00")
    try:
        return text.encode(errors="surrogateescape") or b"experiment"
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")
