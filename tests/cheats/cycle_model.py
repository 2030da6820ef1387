"""Work that a model of the chip might not count."""

from tests.cheats import Case

CASES = [
    Case(
        name="a semaphore out of balance",
        edits=(("            fetch_q.wait()\n", "            fetch_q.wait()\n            fetch_q.start()\n"),),
        status="FAIL_COMPILE",
        reason="the program halts itself",
    ),
]
