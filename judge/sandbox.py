"""How a stage's process is contained, started, limited and ended.

Covered: a fresh isolated interpreter (`-I`), or a fork of one that has only imported jax (nursery.py), an environment
with nothing of the user's, a private temporary folder, a process group that is killed whole, an end with the judge
however that ends, a wall-clock limit, a limit on written files and on core dumps, a pipe of its own for what it hands
over. What a process that runs a kernel file gives up besides (files, network, other processes, memory) is
containment.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from judge import channel, containment, nursery

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
# Gigabyte arrays come and go in the checks: memory that is given back each time is zeroed by the kernel each time.
_REUSE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


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
        environment: dict[str, str] | None = None,
        pipe: tuple[int, int] | None = None,
        own_interpreter: bool = False,
    ) -> None:
        """Starts `script`; of `pipe`, it inherits the writing end, and the reading end is read from now on.

        `own_interpreter`: with `environment` from its first moment, not as a fork from the nursery.
        """
        self.name = script.name
        self._received: list[bytes] = []
        self._reader = threading.Thread(target=self._receive, args=pipe[:1], daemon=True) if pipe else None
        self._log = folder / f"{script.stem}.log"
        start = _interpreter if own_interpreter else _from_nursery
        with self._log.open("wb") as log, _signals_held():
            own = {"TMPDIR": str(folder)} | (environment or {})
            self._process = start(script, arguments, folder, own, log.fileno(), pipe[1] if pipe else -1)
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
            returncode=-signal.SIGKILL if self._process.returncode is None else self._process.returncode,
            timed_out=timed_out,
            log_tail=tail,
            handed_over=b"".join(self._received),
        )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process and everything that it started."""
        if isinstance(self._process, nursery.Forked):
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.returncode is None:
            # Not Popen.wait: a signal that ended it half way has left its lock taken, and it would wait for ever.
            with contextlib.suppress(ChildProcessError):
                status = os.waitpid(self._process.pid, 0)[1]
                self._process.returncode = os.waitstatus_to_exitcode(status)


def prepare() -> None:
    """Lets the nursery import what it needs while this process does something else."""
    with _signals_held():
        nursery.of_this_thread(_clean_environment())


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """What a signal handler raises while Python forks is printed and lost, so signals wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _clean_environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | _REUSE_MEMORY


def _interpreter(
    script: Path, arguments: list[str], folder: Path, environment: dict[str, str], log: int, pipe: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-B", str(script), *arguments],
        cwd=folder,
        env=_clean_environment() | environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=containment.limit,
        pass_fds=() if pipe < 0 else (pipe,),
    )


def _from_nursery(
    script: Path, arguments: list[str], folder: Path, environment: dict[str, str], log: int, pipe: int
) -> nursery.Forked:
    home = nursery.of_this_thread(_clean_environment())
    return home.start(script, arguments, folder=folder, environment=environment, log=log, pipe=pipe)
