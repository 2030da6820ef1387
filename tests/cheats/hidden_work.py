"""Work moved outside the timed program."""

from tests.cheats import Case

CALL = "    return ragged_paged_attention(\n        queries, keys"
IMPORTS = "import functools\n"

CASES = [
    Case(
        name="a callback",
        edits=((CALL, "    queries = jax.pure_callback(lambda x: x, queries, queries)\n" + CALL),),
        status="FAIL_CONTRACT",
        reason="kernel.py",
    ),
    Case(
        name="an effect",
        edits=((IMPORTS, "from jax.experimental import io_callback\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="jax.experimental.io_callback",
    ),
    Case(
        name="on the host",
        edits=((IMPORTS, "from jax.experimental.compute_on import compute_on\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of jax.experimental.compute_on",
    ),
    Case(
        name="a debug callback",
        edits=((CALL, '    jax.debug.print("{x}", x=queries)\n' + CALL),),
        status="FAIL_CONTRACT",
        reason="kernel.py",
    ),
    Case(
        name="a library of its own",
        edits=((IMPORTS, "import jax.ffi\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of jax.ffi",
    ),
]
