"""Replaces the clock, the waiting or the statistics."""

from tests.cheats import Case

IMPORTS = "import functools\n"
CALL = "    return ragged_paged_attention(\n        queries, keys"

CASES = [
    Case(
        name="imports the clock",
        edits=((IMPORTS, "import time\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of time",
    ),
    Case(
        name="patches block_until_ready",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + "jax.block_until_ready = lambda x: x\n"),),
        status="FAIL_CONTRACT",
        reason="attribute assignment on module jax (.block_until_ready)",
    ),
    Case(
        name="patches the median",
        edits=((IMPORTS, "import statistics\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of statistics",
    ),
    Case(
        name="patches through an alias",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + "lax = jax.lax\nlax.add = None\n"),),
        status="FAIL_CONTRACT",
        reason="module jax.lax used as a value",
    ),
]
