"""Ends without an answer."""

from tests.cheats import Case

CASES = [
    Case(
        name="raises",
        edits=(("    seq = pl.program_id(0)\n", "    raise KeyError('no such tile')\n"),),
        status="FAIL_CRASH",
        reason="kernel_fn raised KeyError: 'no such tile' (kernel.py:",
    ),
    Case(
        name="exits",
        edits=(("    seq = pl.program_id(0)\n", "    raise SystemExit(0)\n"),),
        status="FAIL_CRASH",
        reason="SystemExit",
    ),
    Case(
        name="never ends",
        edits=(("    seq = pl.program_id(0)\n", "    while True:\n        pass\n"),),
        status="FAIL_TIMEOUT",
        reason="took more than 8 s",
        trace_limit=8.0,
    ),
    Case(
        name="takes all memory",
        edits=(("    seq = pl.program_id(0)\n", "    seq = pl.program_id(0) + int(np.ones(1 << 36)[0])\n"),),
        status="FAIL_CRASH",
        reason="kernel_fn raised",
    ),
    Case(
        name="one output too few",
        edits=(("    return out[:, :, :head_dim], new_cache", "    return new_cache"),),
        status="FAIL_CORRECTNESS",
        reason="kernel_fn returns",
    ),
    Case(
        name="an empty answer",
        edits=(("    return out[:, :, :head_dim], new_cache", "    return out[:0, :, :head_dim], new_cache"),),
        status="FAIL_CORRECTNESS",
        reason="kernel_fn gives",
    ),
    Case(
        name="recursion",
        edits=(("    seq = pl.program_id(0)\n", "    def deeper():\n        return deeper()\n\n    seq = deeper()\n"),),
        status="FAIL_CRASH",
        reason="RecursionError",
    ),
]
