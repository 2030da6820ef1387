"""One experiment at a time in a working copy: a lock that knows its owner.

The lock is the kernel's (flock), so it ends with its owner, however that ends; the file's content only says who that
is. It is held by every git that the owner starts, too: a git that outlives its killed owner still holds it, and the
next owner never meets one at work. Filesystems without flock are refused.
"""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.05
SAID_EVERY_SECONDS = 30.0


class Refused(Exception):
    """The command cannot go on: exit code 2, nothing was changed but what the message says."""


def say(text: str) -> None:
    """One line for the person or agent who runs the command."""
    print(f"ratchet: {text}", file=sys.stderr, flush=True)


@contextmanager
def exclusive(path: Path, label: str, *, wait: bool = True, patience_seconds: float = 0.0) -> Iterator[int]:
    """Holds the lock file `path`, made where there is none; yields its descriptor, for children to inherit.

    Waits for another owner, saying after `patience_seconds` who it is, or with `wait` false raises Refused that says
    so. Raises Refused where the file cannot be written or the filesystem has no locks.
    """
    descriptor = _acquire(path, wait=wait, patience_seconds=patience_seconds)
    try:
        _write(descriptor, json.dumps(owner(label)).encode())
        yield descriptor
    finally:
        _write(descriptor, b"")
        os.close(descriptor)


def _acquire(path: Path, *, wait: bool, patience_seconds: float) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror}; make it writable, or work in a clone") from None
    try:
        say_at = time.monotonic() + patience_seconds
        while not _try(descriptor, path):
            holder = describe(os.pread(descriptor, 1 << 16, 0))
            if not wait:
                raise Refused(f"another experiment runs in this folder ({holder}); without --no-wait this waits")
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + SAID_EVERY_SECONDS
                say(f"waiting for the experiment of {holder}")
            time.sleep(POLL_SECONDS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _try(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise Refused(
            f"cannot lock {path}: {error.strerror}; put the repository on a filesystem with file locks"
        ) from None
    return True


def _write(descriptor: int, data: bytes) -> None:
    """The owner's note. A full disk costs the note, not the lock."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
    except OSError:
        pass


def owner(label: str) -> dict[str, str | int]:
    """This process: pid and host say which it is, its start in clock ticks since boot that no later one has its pid."""
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "start_ticks": _start_ticks(pid),
        "boot": _boot(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "label": " ".join(label.split())[:80],
    }


def describe(content: bytes) -> str:
    """Who wrote `content`, and whether it still runs where that can be told."""
    try:
        note = json.loads(content)
        pid, host = int(note["pid"]), str(note["host"])
        text = f"process {pid} on {host}, since {note['since']}: {str(note['label'])!r}"
        here = host == socket.gethostname() and note["boot"] == _boot()
        gone = here and _start_ticks(pid) != note["start_ticks"]
    except (ValueError, TypeError, KeyError):
        return "an unknown process"
    return f"{text}, which is gone; a git that it started still works" if gone else text


def _start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat (proc(5)); 0 where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
