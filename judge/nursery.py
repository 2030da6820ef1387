"""Where the stages' processes come from: forks of one process that has imported jax and has done nothing else.

    python -I -B nursery.py DESCRIPTOR

A stage is then at work after milliseconds, not after a second of imports. Its process is as fresh as an interpreter of
its own: the nursery runs no kernel file, starts no backend and knows of no judging but the names of its folders. What a
stage's process is limited to is decided in the process itself (containment.py).

The judge asks with one message: {"script", "arguments", "folder", "environment", "pipe"} and the descriptors of a
socket, of the log and perhaps of a pipe. Through that socket the nursery reports the exit code, when the process and
its whole group have ended; where the judge closes its side, they are ended.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from judge import containment, jax_shims

MAX_REQUEST_BYTES = 64 << 10
_END_SECONDS = 60.0  # what a killed process may take to end


# --- the judge's side ---


class Forked:
    """A process from the nursery, with what Popen has: `returncode`, `poll`, `wait`, `kill` (its group)."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._control.settimeout(timeout)
            try:
                told = self._control.recv(64)
            except TimeoutError:
                raise subprocess.TimeoutExpired("a stage", timeout) from None
            except OSError:
                told = b""
            # Where the nursery itself is gone, so are its processes.
            self.returncode = int(told) if told else -signal.SIGKILL
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0001)
        return self.returncode

    def kill(self) -> None:
        """Ends the process and everything that it started, and waits for that."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(_END_SECONDS)
        self._control.close()


class Nursery:
    """The judge's end of a nursery, which lives as long as this object and the thread that made it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-B", __file__, str(theirs.fileno())],
                cwd="/",
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=containment.limit,
                pass_fds=(theirs.fileno(),),
            )
        self._requests = ours
        self._owner = os.getpid()

    @property
    def is_ours(self) -> bool:
        """Whether it runs, and this process is the one that started it and no fork of that."""
        if self._owner != os.getpid():
            return False
        try:
            self._requests.recv(1, socket.MSG_DONTWAIT)  # it says nothing: what comes is its end
        except BlockingIOError:
            return True
        except ConnectionResetError:
            pass
        return False

    def __del__(self) -> None:
        self._requests.close()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        else:
            self._process.returncode = 0  # not known here

    def start(
        self, script: Path, arguments: list[str], *, folder: Path, environment: Mapping[str, str], log: int, pipe: int
    ) -> Forked:
        """A process that runs `script`; it inherits the descriptor `pipe` under that number (-1: none)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"script": str(script), "arguments": arguments, "folder": str(folder), "pipe": pipe}
        message = json.dumps(request | {"environment": dict(environment)}).encode()
        with theirs:
            descriptors = [theirs.fileno(), log, *((pipe,) if pipe >= 0 else ())]
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # then the process has ended already
                socket.send_fds(self._requests, [message], descriptors)
        return Forked(ours)


_local = threading.local()


def of_this_thread(environment: Mapping[str, str]) -> Nursery:
    """The thread's own nursery, started where there is none: a process ends with the thread that started it."""
    made: Nursery | None = getattr(_local, "made", None)
    if made is None or not made.is_ours:
        made = _local.made = Nursery(environment)
    return made


# --- the nursery's side ---


def _load() -> None:
    """What the stages import, so that each finds it there."""
    jax_shims.set_environment()
    jax_shims.load()
    gc.collect()
    gc.freeze()


class _Child:
    """A process that was forked, and the socket that tells of its end."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self.ended = os.pidfd_open(pid)

    def end(self) -> None:
        """Kills what is left of the group, then reports the exit code of its leader."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with contextlib.suppress(OSError):
            self.control.send(str(code).encode())
        self.control.close()
        os.close(self.ended)


class _Server:
    """Forks on request, until the judge is gone."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._events = selectors.DefaultSelector()
        self._events.register(requests, selectors.EVENT_READ, self._fork)

    def run(self) -> None:
        while True:
            for key, _ in self._events.select():
                # One child's two events may come together: the second finds it gone.
                if key.fd in self._events.get_map():
                    key.data()

    def _fork(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self._requests, MAX_REQUEST_BYTES, 3)
        if not message:  # the judge is gone; what it started ends with this process
            sys.exit(0)
        request = json.loads(message)
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _become(request, descriptors, parent)
        control, *others = descriptors
        for descriptor in others:
            os.close(descriptor)
        child = _Child(pid, socket.socket(fileno=control))
        for source in (child.ended, child.control):
            self._events.register(source, selectors.EVENT_READ, functools.partial(self._end, child))

    def _end(self, child: _Child) -> None:
        self._events.unregister(child.ended)
        self._events.unregister(child.control)
        child.end()


def _become(request: Mapping[str, Any], descriptors: list[int], parent: int) -> None:
    """In the new process: goes on as the program that was asked for; never returns."""
    code = 1
    try:
        os.setsid()
        containment.limit()
        containment.end_with_parent(parent)
        _take(descriptors, request["pipe"])
        os.environ.update(request["environment"])
        tempfile.tempdir = None
        os.chdir(request["folder"])
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _take(descriptors: list[int], pipe: int) -> None:
    """The log as stdout and stderr, the pipe under its number, and nothing else that is open in the nursery."""
    _, log, *pipes = descriptors
    os.dup2(log, 1)
    os.dup2(log, 2)
    if pipes:
        os.dup2(pipes[0], pipe)
    top = os.sysconf("SC_OPEN_MAX")
    os.closerange(3, pipe if pipes else top)
    if pipes:
        os.closerange(pipe + 1, top)


if __name__ == "__main__":
    _load()
    _Server(socket.socket(fileno=int(sys.argv[1]))).run()
