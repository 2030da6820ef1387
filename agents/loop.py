"""The working tree and one run of ./ratchet.sh, as a driver sees them."""

import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from agents import CannotSearchError, InterruptedSearchError

CLEANUP_SECONDS = 60.0  # what an interrupted ratchet.sh gets to reset the tree
POLL_SECONDS = 0.1
# What ratchet.sh reports about how it judged: scores of a study compare only where these agree.
SAME_WITHIN_STUDY = ("chip", "mode", "judge_sha256")


class Repo:
    """The working tree that holds kernel.py and ratchet.sh. Reads git; writes kernel.py and .ratchet/search/ only."""

    def __init__(self, folder: Path) -> None:
        self.root = Path(_git(folder, "rev-parse", "--show-toplevel").decode().rstrip("\n"))
        self.kernel = self.root / "kernel.py"
        self.state = self.root / ".ratchet" / "search"
        self._edit = self.state / "edit.sha256"
        if not os.access(self.root / "ratchet.sh", os.X_OK):
            raise CannotSearchError(f"{self.root} has no executable ratchet.sh")

    def head_kernel(self) -> bytes:
        return _git(self.root, "show", "HEAD:kernel.py")

    def committed_kernel(self) -> bytes:
        """HEAD's kernel.py. Raises CannotSearchError if the working copy or the index holds another one."""
        head = self.head_kernel()
        staged = _git(self.root, "diff-index", "--cached", "--name-only", "HEAD", "--", "kernel.py")
        if staged or self._working() != head:
            raise CannotSearchError("kernel.py differs from HEAD: commit or discard your edit first")
        return head

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold .ratchet/search/lock: two searches would edit the same kernel.py."""
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / ".gitignore").write_text("*\n")  # whatever the repository's own .gitignore says
        with (self.state / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CannotSearchError("another search is running in this repository") from error
            yield

    @contextlib.contextmanager
    def edited(self, candidate: bytes) -> Iterator[None]:
        """kernel.py is ``candidate`` inside, HEAD's again after, whatever happened inside."""
        self._edit.write_text(_sha256(candidate))
        try:
            self._write(candidate)
            yield
        finally:
            self.restore()

    def restore(self) -> bool:
        """Write HEAD's kernel.py over an edit of a search, this one or one that was killed; True if there was one.

        A kernel.py that no search wrote is somebody's work and stays.
        """
        if not self._edit.exists():
            return False
        head, working = self.head_kernel(), self._working()
        ours = working != head and _sha256(working) == self._edit.read_text()
        if ours:
            self._write(head)
        self._edit.unlink()
        return ours

    def champion_score(self, reported: Mapping[str, str]) -> float | None:
        """Score of the last ledger row for HEAD's kernel.py that was judged as ``reported`` (chip, mode).

        None if there is no such row, or if rows differ in a chip or mode that ``reported`` does not name.
        """
        rows = [
            row for row in self._champion_rows() if all(row.get(key, value) == value for key, value in reported.items())
        ]
        judged = {tuple(row.get(key) for key in SAME_WITHIN_STUDY) for row in rows}
        return _number(rows[-1].get("score")) if len(judged) == 1 else None

    def _champion_rows(self) -> list[dict[str, str]]:
        try:
            with (self.root / "results.tsv").open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if _is_scored(row)]
        except FileNotFoundError:
            return []
        objects = ["HEAD:kernel.py", *(f"{row['commit']}:kernel.py" for row in rows)]
        answers = _git(self.root, "cat-file", "--batch-check", stdin="\n".join(objects).encode()).splitlines()
        return [row for row, answer in zip(rows, answers[1:], strict=True) if answer == answers[0]]

    def _write(self, source: bytes) -> None:
        new = self.state / "kernel.py.new"
        new.write_bytes(source)
        shutil.copymode(self.kernel, new)
        new.replace(self.kernel)  # whole or not at all

    def _working(self) -> bytes:
        try:
            return self.kernel.read_bytes()
        except FileNotFoundError:
            return b""


def _is_scored(row: Mapping[str, str]) -> bool:
    usable = not (row.get("status") or "").startswith("FAIL") and _number(row.get("score")) is not None
    return usable and re.fullmatch("[0-9a-f]{4,64}", row.get("commit") or "") is not None


def _git(folder: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # reading must not write the index
    run = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, input=stdin, capture_output=True, check=False
    )
    if run.returncode:
        raise CannotSearchError(f"git {arguments[0]}: {run.stderr.decode(errors='replace').strip()}")
    return run.stdout


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _number(text: str | None) -> float | None:
    """A score: a positive finite number, else None."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


class Stop:
    """Remembers that a signal asked the search to stop; the loop looks at it, nothing is torn down in the handler."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signals.append(signal.SIGHUP)
        before = [signal.signal(signum, self) for signum in signals]
        try:
            yield
        finally:
            for signum, handler in zip(signals, before, strict=True):
                signal.signal(signum, handler)

    def check(self) -> None:
        if self.signum is not None:
            raise InterruptedSearchError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one run of ratchet.sh said. ``fields`` are its ``key: value`` lines, the last of each key."""

    fields: Mapping[str, str]
    exit_code: int = 1
    message: str = ""
    seconds: float = 0.0

    @property
    def kept(self) -> bool:
        return self.exit_code == 0

    @property
    def status(self) -> str:
        return self.fields.get("status", "")

    @property
    def score(self) -> float | None:
        """The score where there is one to compare; a failed check's figures are not."""
        return None if self.status.startswith("FAIL") else _number(self.fields.get("score"))

    def check(self) -> None:
        """Raise CannotSearchError unless this is a verdict: exit code, status and score must fit together."""
        if self.exit_code not in (0, 1):
            raise CannotSearchError(f"ratchet.sh could not judge (exit {self.exit_code})\n{self.message}".rstrip())
        if not self.status or (self.status == "PASS") != self.kept or (self.kept and self.score is None):
            said = f"status {self.status or 'missing'}, score {self.fields.get('score') or 'missing'}"
            raise CannotSearchError(
                f"ratchet.sh gave no verdict: exit {self.exit_code}, {said}\n{self.message}".rstrip()
            )


def run_ratchet(root: Path, arguments: Sequence[str], stop: Stop) -> Result:
    """Run ./ratchet.sh to its end; a stop request is forwarded to it and it gets CLEANUP_SECONDS."""
    start = time.monotonic()
    # Files, not pipes: a process that outlives ratchet.sh cannot hold up the search. Its own session, so that a
    # terminal's Ctrl-C reaches it once, through here.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            ["./ratchet.sh", *arguments],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            exit_code = _wait(process, stop)
        finally:
            if process.poll() is None:
                _end(process, signal.SIGTERM)
        output, errors = _text(out), _text(err)
    return Result(
        exit_code=exit_code,
        fields=dict(re.findall(r"^([a-z][a-z0-9_]*): *(.*?) *$", output, re.MULTILINE)),
        message="\n".join((errors.strip() or output.strip()).splitlines()[-8:]),
        seconds=time.monotonic() - start,
    )


def _wait(process: "subprocess.Popen[bytes]", stop: Stop) -> int:
    while stop.signum is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=POLL_SECONDS)
    return _end(process, stop.signum)


def _end(process: "subprocess.Popen[bytes]", signum: int) -> int:
    """Signal ratchet.sh and what it runs, as a terminal would, and wait for its clean-up; kill it if that hangs."""
    print(f"\nstopping: ratchet.sh has up to {CLEANUP_SECONDS:.0f} s to clean up", file=sys.stderr, flush=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)
    try:
        return process.wait(timeout=CLEANUP_SECONDS)
    except subprocess.TimeoutExpired:
        print("ratchet.sh did not end and was killed: look at git status and git log", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").splitlines()
    return "\n".join("".join(char if char.isprintable() else " " for char in line) for line in lines)
