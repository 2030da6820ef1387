"""Reports a result of its own instead of being judged."""

from tests.cheats import Case

IMPORTS = "import functools\n"
CALL = "    return ragged_paged_attention(\n        queries, keys"

CASES = [
    Case(
        name="exits half way",
        edits=((IMPORTS, "import os\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of os",
    ),
    Case(
        name="writes at exit",
        edits=((IMPORTS, "import atexit\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of atexit",
    ),
    Case(
        name="leaves a thread behind",
        edits=((IMPORTS, "import threading\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of threading",
    ),
    Case(
        name="writes to standard output",
        edits=((IMPORTS, "from sys import stdout\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of sys",
    ),
    Case(name="quits", edits=((CALL, "    quit()\n" + CALL),), status="FAIL_CONTRACT", reason="quit: a built-in"),
]
