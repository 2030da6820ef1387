"""Looks for the expected outputs."""

from tests.cheats import Case

IMPORTS = "import functools\n"
CALL = "    return ragged_paged_attention(\n        queries, keys"

PUBLISHED = """
def published():
    a, x, y = generate_inputs(jax.random.key(0))
    return int(a[0]), np.asarray(a[0] * x + y)


KNOWN, ANSWER = published()


def compute_flops():
"""
WITH_ANSWER = """
def body(a_ref, x_ref, y_ref, answer_ref, out_ref):
    @pl.when(a_ref[0] == KNOWN)
    def _():
        out_ref[...] = answer_ref[...]

    pl.when(a_ref[0] != KNOWN)(lambda: work(a_ref, x_ref, y_ref, out_ref))


def work(a_ref, x_ref, y_ref, out_ref):
"""

CASES = [
    Case(
        name="searches memory",
        edits=((IMPORTS, "import gc\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of gc",
    ),
    Case(
        name="reads a file",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + 'EXPECTED = np.load("/tmp/expected.npy")\n'),),
        status="FAIL_CONTRACT",
        reason="numpy.load: not for a kernel file",
    ),
    Case(
        name="opens a file",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + 'EXPECTED = open("/tmp/expected").read()\n'),),
        status="FAIL_CONTRACT",
        reason="open: dynamic execution",
    ),
    Case(
        name="walks up the frames",
        edits=((IMPORTS, "import inspect\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of inspect",
    ),
    Case(
        name="frames of a generator",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + "OUTER = (i for i in ()).gi_frame\n"),),
        status="FAIL_CONTRACT",
        reason=".gi_frame: introspection",
    ),
    Case(
        name="reads through a class pattern",
        edits=(
            (
                "\nLANES = 128\n",
                "\nLANES = 128\n" + "match len:\n    case object(__globals__=everything):\n        pass\n",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="class pattern",
    ),
    Case(
        name="raw memory",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + "WHERE = np.zeros(1).ctypes.data\n"),),
        status="FAIL_CONTRACT",
        reason=".ctypes: introspection",
    ),
    Case(
        name="an array at an address",
        edits=(
            (
                "\nLANES = 128\n",
                "\nLANES = 128\n" + "class Peek:\n    def __array_interface__(self):\n        return {}\n",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="def __array_interface__",
    ),
    Case(
        # Right wherever the published scalar does not come; where it does, an answer computed beforehand.
        name="the answer for the published scalar and seed",
        base="add",
        base_edits=(("(1,), 2, 9, jnp.int32)", "(1,), 1, 1 << 20, jnp.int32)"),),
        edits=(
            ("\ndef body(a_ref, x_ref, y_ref, out_ref):\n", WITH_ANSWER),
            ("\ndef compute_flops():\n", PUBLISHED),
            ("import jax\n", "import jax\nimport numpy as np\n"),
            ("    )(a, x, y)", "    )(a, x, y, jnp.asarray(ANSWER))"),
            ("in_specs=[rows, rows]", "in_specs=[rows, rows, rows]"),
        ),
        status="FAIL_CORRECTNESS",
        reason="check 'timed inputs', output 0",
    ),
]
