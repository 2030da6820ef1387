"""How a stage's process is contained, started, limited and ended.

Covered: a fresh isolated interpreter (`-I`), an environment with nothing of the user's, a private temporary folder, a
process group that is killed whole, an end with the judge however that ends, a wall-clock limit, a limit on written
files and on core dumps, a pipe of its own for what it hands over. What a process that runs a kernel file gives up
besides (files, network, other processes, memory) is containment.py.
"""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from judge import channel

MAX_FILE_BYTES = 8 << 30
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a process ended; `log_tail` is what it printed last, for people, never parsed."""

    returncode: int
    timed_out: bool
    log_tail: str
    handed_over: bytes = b""  # what came through the channel, where it has one


class Process:
    """A stage running in the background; `wait` it, or `kill` it."""

    def __init__(
        self,
        script: Path,
        arguments: list[str],
        *,
        folder: Path,
        environment: dict[str, str],
        pipe: tuple[int, int] | None = None,
    ) -> None:
        """Starts `script`; of `pipe`, it inherits the writing end, and the reading end is read from now on."""
        self.name = script.name
        self._received: list[bytes] = []
        self._reader = threading.Thread(target=self._receive, args=pipe[:1], daemon=True) if pipe else None
        self._log = folder / f"{script.stem}.log"
        clean = {name: os.environ[name] for name in _KEPT if name in os.environ}
        with self._log.open("wb") as log:
            # What a signal handler raises while Python forks is printed and lost, so signals wait.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-B", str(script), *arguments],
                    cwd=folder,
                    env=clean | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_limit,
                    pass_fds=pipe[1:] if pipe else (),
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if pipe and self._reader:
            os.close(pipe[1])
            self._reader.start()

    def _receive(self, descriptor: int) -> None:
        self._received.append(channel.receive(descriptor))

    def wait(self, limit_seconds: float) -> Finished:
        """Waits for the end, at most `limit_seconds`; then kills the whole group."""
        timed_out = False
        try:
            self._process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            self.kill()
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - 4000))
            tail = log.read(4000).decode(errors="replace")
        if self._reader:
            self._reader.join(10)
        return Finished(
            returncode=self._process.returncode,
            timed_out=timed_out,
            log_tail=tail,
            handed_over=b"".join(self._received),
        )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.returncode is None:
            # Not Popen.wait: a signal that ended it half way has left its lock taken, and it would wait for ever.
            with contextlib.suppress(ChildProcessError):
                status = os.waitpid(self._process.pid, 0)[1]
                self._process.returncode = os.waitstatus_to_exitcode(status)


def end_with_parent(parent: int) -> None:
    """For a process that was just started by process `parent`: it is killed as soon as that one ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _limit() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
