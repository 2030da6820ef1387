"""judge/containment.py: what a process that has given up everything can still do, tried in such a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from judge import containment

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(bool(containment.missing()), reason="; ".join(containment.missing()))


def contained(code: str, folder: Path) -> str:
    """What a contained process prints, whose folder may be written."""
    script = f"""
import os, sys
sys.path.append({str(ROOT)!r})
from judge import containment
failed = containment.enter(containment.Need(writable=({str(folder)!r},)), max_file_bytes=10**6)
assert failed == [], failed
try:
    {code}
    print("done")
except BaseException as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() or f"ended with {done.returncode}: {done.stderr[-300:]}"


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd').read()",
        "open(os.path.expanduser('~/.ssh/config')).read()",
        "os.listdir('/tmp')",
        "open('/tmp/ratchet-was-here', 'w')",
        "open(f'/proc/{os.getppid()}/environ').read()",
        "os.symlink('/etc', '/tmp/ratchet-link')",
        "os.kill(os.getppid(), 0)",
        "__import__('resource').prlimit(os.getppid(), 1, (0, 0))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "__import__('subprocess').run(['/bin/true'])",
        "__import__('socket').socket()",
        "__import__('socket').socketpair()",
        "__import__('ctypes').CDLL(None, use_errno=True).mount(b'/', b'/', None, 4096, None) and os.stat('/root/x')",
        "os.unlink(sys.executable)",
        "os.rename(sys.executable, sys.executable + '2')",
    ],
)
def test_refused(code, tmp_path):
    assert contained(code, tmp_path) in ("PermissionError", "FileNotFoundError")


def test_memory_and_files_are_limited(tmp_path):
    assert contained("bytearray(40 << 30)", tmp_path) == "MemoryError"
    assert contained(f"open('{tmp_path}/x', 'wb').write(b'x' * 10**7)", tmp_path) == "OSError"


def test_what_a_kernel_needs_works(tmp_path):
    code = f"import threading, math; t = threading.Thread(target=print); t.start(); t.join(); open('{tmp_path}/x', 'w')"
    assert contained(code, tmp_path) == "done"
    assert contained("import jax.numpy as jnp; assert jnp.ones(3).sum() == 3", tmp_path) == "done"
