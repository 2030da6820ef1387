"""Reaches for the judge from inside the kernel file."""

from tests.cheats import Case

IMPORTS = "import functools\n"
CALL = "    return ragged_paged_attention(\n        queries, keys"

CASES = [
    Case(
        name="imports the judge",
        edits=((IMPORTS, "import judge.decide\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of judge.decide",
    ),
    Case(
        name="imports by name",
        edits=((IMPORTS, "import importlib\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of importlib",
    ),
    Case(
        name="__import__",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + '__import__("judge.decide").decide.decide = None\n'),),
        status="FAIL_CONTRACT",
        reason="__import__: introspection",
    ),
    Case(
        name="needs more than its baseline",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + 'NEEDS = ("os", "no pallas")\n'),),
        status="FAIL_CONTRACT",
        reason="changes NEEDS, which",
    ),
]
