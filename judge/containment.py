"""What a process gives up before it runs a kernel file: files, network, other processes, memory.

Directly from Linux, with no privilege and no helper program: Landlock for the file system and signals, seccomp for
system calls, a user and a network namespace, resource limits. A process calls `enter` while it still has one thread.

Covered: writing and reading outside the named folders, the network, starting programs or processes, ending, tracing or
limiting another process, memory, size and number of open files. Not covered: processor time other than by the judge's
clock, the speed of the machine as a side channel, holes in the kernel. What the machine does not offer is in `missing`.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# System call numbers of x86-64, from the kernel's syscall_64.tbl; those from 424 on are the same everywhere.
_NUMBER = {
    **{"socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "ptrace": 101, "clone": 56},
    **{"pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166, "swapon": 167, "reboot": 169, "unshare": 272},
    **{"init_module": 175, "finit_module": 313, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311},
    **{"execveat": 322, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "keyctl": 250, "add_key": 248},
    **{"io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438, "kexec_load": 246},
    **{"request_key": 249, "memfd_secret": 447, "personality": 135, "open_by_handle_at": 304},
    **{"tkill": 200, "setpriority": 141, "migrate_pages": 256, "move_pages": 279, "kcmp": 312},
}
# Calls whose first argument is a process: 0 and the process itself alone may be named.
_OF_ITSELF = {"kill": 62, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "prlimit64": 302}
_DENIED = tuple(name for name in _NUMBER if name not in ("clone", "clone3"))
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x10000
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_AUDIT_ARCH_X86_64 = 0xC000003E
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a folder
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_DUMPABLE = 1, 38, 22, 4  # of linux/prctl.h
MAX_FILE_BYTES = 8 << 30
MAX_DATA_BYTES = 16 << 30
MAX_OPEN_FILES = 512
MAX_LOG_BYTES = 16 << 20
_SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/opt/python",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_INFORMATION = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/sys/devices/system")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a process still may do: folders that it reads, folders that it writes."""

    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()


def _landlock_version() -> int:
    return int(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1))


def end_with_parent(parent: int) -> None:
    """For a process that was just started by process `parent`: it is killed as soon as that one ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def limit() -> None:
    """For a process that was just started: what every process of the judge is held to."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))


def missing() -> list[str]:
    """What this machine does not offer, in words; found out in a child, which changes nothing here."""
    lacks = []
    if _landlock_version() < 1:
        lacks.append("Landlock (files outside the private folder can be read and written)")
    if platform.machine() != "x86_64" or not _in_child(_seccomp):
        lacks.append("seccomp filters (other programs can be started)")
    if not _in_child(_namespaces):
        lacks.append("user namespaces (the network is closed by the system call filter alone)")
    return lacks


def _in_child(action: object) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            action()  # type: ignore[operator]
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def enter(need: Need, *, max_file_bytes: int | None = None) -> list[str]:
    """Gives everything up but `need`, for good; returns what could not be. The process must have one thread."""
    failed = []
    _limits()
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for step in (_namespaces, lambda: _landlock(need), _seccomp):
        try:
            step()
        except OSError as error:
            failed.append(str(error))
    return failed


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


def _namespaces() -> None:
    _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC), "namespaces")


def _landlock(need: Need) -> None:
    version = _check(_landlock_version(), "Landlock")
    every = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    every |= 1 << 15 if version >= 5 else 0
    network = 3 if version >= 4 else 0  # bind, connect
    scopes = 3 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("=QQQ", every, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, size, 0), "Landlock rules")
    try:
        for folders, access in ((need.writable, every), ((*_readable_always(), *need.readable), _READ)):
            for folder in folders:
                _allow(rules, folder, access)
        for device in _DEVICES:
            _allow(rules, device, _READ | 1 << 1)
        _check(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "Landlock")
    finally:
        os.close(rules)


def _readable_always() -> Sequence[str]:
    """The interpreter, its packages, this project's judge, the C library, what a program asks about the machine."""
    judge = str(Path(__file__).resolve().parent)
    own = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent), judge}
    packages = {os.path.realpath(path) for path in sys.path if path and "-packages" in path}
    return (*sorted(own | packages), *_SYSTEM, *_INFORMATION)


def _allow(rules: int, path: str, access: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no rule
    try:
        if not os.path.isdir(path):
            access &= 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14  # what a file has
        _check(_libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", access, descriptor), 0), f"Landlock: {path}")
    finally:
        os.close(descriptor)


def _seccomp() -> None:
    """Denied calls fail with EPERM; clone may make threads alone; clone3, whose flags are out of sight, is unknown."""
    if platform.machine() != "x86_64":
        raise OSError(_ENOSYS, "seccomp filter for this processor")
    load, equal, some, back = 0x20, 0x15, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    errno = 0x00050000
    code = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH_X86_64), (back, 0, 0, kill), (load, 0, 0, 0)]
    code += [(0x35, 0, 1, 0x40000000), (back, 0, 0, errno | _EPERM)]  # the x32 numbers of the same calls
    for name in _DENIED:
        code += [(equal, 0, 1, _NUMBER[name]), (back, 0, 0, errno | _EPERM)]
    for number in _OF_ITSELF.values():
        code += [(equal, 0, 5, number), (load, 0, 0, 16), (equal, 1, 0, 0), (equal, 0, 1, os.getpid())]
        code += [(back, 0, 0, allow), (back, 0, 0, errno | _EPERM)]
    code += [(equal, 0, 1, _NUMBER["clone3"]), (back, 0, 0, errno | _ENOSYS)]
    code += [
        (equal, 0, 3, _NUMBER["clone"]),
        (load, 0, 0, 16),
        (some, 1, 0, _CLONE_THREAD),
        (back, 0, 0, errno | _EPERM),
    ]
    code += [(back, 0, 0, allow)]
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HxxxxxxP", len(code), ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(header), 0, 0), "seccomp")
