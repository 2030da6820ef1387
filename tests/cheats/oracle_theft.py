"""Looks for the expected outputs."""

from tests.cheats import Case

IMPORTS = "import functools\n"
CALL = "    return ragged_paged_attention(\n        queries, keys"

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
]
