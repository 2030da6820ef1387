"""One program for the checker, another for the chip: here what the text shows."""

from tests.cheats import Case

IMPORTS = "import functools\n"
CALL = "    return ragged_paged_attention(\n        queries, keys"

CASES = [
    Case(
        name="asks where it runs",
        edits=((CALL, "    assert jax.default_backend()\n" + CALL),),
        status="FAIL_CONTRACT",
        reason="jax.default_backend: not for a kernel file",
    ),
    Case(
        name="private modules",
        edits=((IMPORTS, "from jax._src import core\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of jax._src (private to jax)",
    ),
    Case(
        name="private attribute",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + "LOWERING = pl.pallas_call.__globals__\n"),),
        status="FAIL_CONTRACT",
        reason=".__globals__: a private attribute",
    ),
    Case(
        name="patches the lowering",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + "jax.lax.exp_p.def_impl(None)\n"),),
        status="FAIL_CONTRACT",
        reason=".def_impl: introspection",
    ),
    Case(
        name="getattr in disguise",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + 'INTERNAL = getattr(jax.Array, "_" + "src")\n'),),
        status="FAIL_CONTRACT",
        reason="getattr: dynamic execution",
    ),
    Case(
        name="a module behind a module",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + "MODULES = functools.singledispatch\n"),),
        status="FAIL_CONTRACT",
        reason="functools.singledispatch",
    ),
    Case(
        name="sys behind dataclasses",
        edits=((IMPORTS, "import dataclasses\nMODULES = dataclasses.sys.modules\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="dataclasses.sys: not for a kernel file",
    ),
    Case(
        name="text run as code",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + 'exec("import os")\n'),),
        status="FAIL_CONTRACT",
        reason="exec: dynamic execution",
    ),
    Case(
        name="annotations run as code",
        edits=((IMPORTS, "from typing import get_type_hints\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="typing.get_type_hints",
    ),
    Case(
        name="changes a class in place",
        edits=((IMPORTS, "import dataclasses\ndataclasses.dataclass(jax.Array)\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="dataclass(cls)",
    ),
    Case(
        name="wraps to set attributes",
        edits=(
            ("\nLANES = 128\n", "\nLANES = 128\n" + 'functools.update_wrapper(jax.Array, len, assigned=("at",))\n'),
        ),
        status="FAIL_CONTRACT",
        reason="functools.update_wrapper",
    ),
    Case(
        name="settings of jax",
        edits=(
            ("\nLANES = 128\n", "\nLANES = 128\n" + 'jax.config.update("jax_default_matmul_precision", "float32")\n'),
        ),
        status="FAIL_CONTRACT",
        reason="jax.config",
    ),
    Case(
        name="the interpreter switched on",
        edits=((CALL, "    pltpu.force_tpu_interpret_mode().__enter__()\n" + CALL),),
        status="FAIL_CONTRACT",
        reason=".__enter__: a private attribute",
    ),
    Case(
        name="reads a semaphore",
        edits=(("\nLANES = 128\n", "\nLANES = 128\n" + "READ = pl.semaphore_read\n"),),
        status="FAIL_CONTRACT",
        reason="jax.experimental.pallas.semaphore_read",
    ),
    Case(
        name="one name, two modules",
        edits=(
            (
                "import functools\n",
                "import dataclasses as m\nMODULES = m.sys.modules\nimport jax.numpy as m\nimport functools\n",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="module jax.numpy bound again",
    ),
    Case(
        name="calls itself the main program",
        edits=(("\nLANES = 128\n", '\nLANES = 128\n__name__ = "__main__"\n'),),
        status="FAIL_CONTRACT",
        reason="__name__: introspection",
    ),
    Case(
        name="a class's self that is something else",
        edits=(
            (
                "\nLANES = 128\n",
                "\nLANES = 128\n\n\nclass Patch:\n    def apply(self, other):\n        self = other\n        self.lower = None\n",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="attribute assignment (.lower)",
    ),
]
