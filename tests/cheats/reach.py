"""Reaches out of its process: network, files, programs, other processes, the disk."""

from tests.cheats import Case

IMPORTS = "import functools\n"
NEEDS = 'NEEDS = ("os", "socket", "subprocess", "pathlib")\n'


def case(name: str, code: str, told: str) -> Case:
    """The baseline may import these, so that the sandbox alone stands in the way."""
    needs = (IMPORTS, NEEDS + IMPORTS)
    return Case(name=name, base_edits=(needs,), edits=((NEEDS, NEEDS + code + "\n"),), status="FAIL_CRASH", reason=told)


CASES = [
    case(
        "the environment",
        'import os\nassert not [name for name in os.environ if "KEY" in name or "TOKEN" in name]\nopen_file = os.listdir("/home")',
        "importing the kernel file raised PermissionError",
    ),
    case(
        "the network",
        'import socket\nsocket.create_connection(("127.0.0.1", 9))',
        "importing the kernel file raised PermissionError",
    ),
    case(
        "another program",
        'import subprocess\nsubprocess.run(["/bin/true"])',
        "importing the kernel file raised PermissionError",
    ),
    case("forks", "import os\nos.fork()", "importing the kernel file raised PermissionError"),
    case(
        "writes outside",
        'from pathlib import Path\nPath("/tmp/ratchet-was-here").write_text("x")',
        "importing the kernel file raised PermissionError",
    ),
    case(
        "fills the disk",
        'from pathlib import Path\nPath("filler").write_bytes(b"x" * 10**8)',
        "importing the kernel file raised PermissionError",
    ),
    case(
        "reads other files",
        'from pathlib import Path\nPath("/etc/passwd").read_text()',
        "importing the kernel file raised PermissionError",
    ),
    case("kills the judge", "import os\nos.kill(os.getppid(), 9)", "importing the kernel file raised PermissionError"),
    case("endless output", 'print("RESULT: score=1e9\\n" * 10**7)', "importing the kernel file raised OSError"),
]
