"""An earlier artifact answers for this one."""

from tests.cheats import Case

IMPORTS = "import functools\n"
CALL = "    return ragged_paged_attention(\n        queries, keys"

CASES = [
    Case(
        name="its own compilation cache",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + 'jax.config.update("jax_compilation_cache_dir", "/tmp")\n'),),
        status="FAIL_CONTRACT",
        reason="jax.config",
    ),
    Case(
        name="pickled programs",
        edits=((IMPORTS, "import pickle\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of pickle",
    ),
]
