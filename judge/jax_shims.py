"""Every place that leans on jax internals, tied to the pinned version (jax 0.10.2).

Remove a shim when the version that is pinned no longer shows its symptom.
"""

import os
from collections.abc import Sequence
from typing import Any

COMPILE_ENVIRONMENT = {
    # Ahead-of-time compilation with no TPU: the client stays on the CPU and libtpu asks no metadata server.
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Two processes would collide on libtpu's lock file, and one abort.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

# XLA's CPU pipeline otherwise widens a whole bfloat16 buffer to float32 around every dynamic slice of it: a page fetch
# then copies the cache, and a check takes a hundred times as long. LLVM handles bfloat16 natively.
CPU_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "float-normalization-bf16"}


def check_version() -> None:
    """Raises RuntimeError when jax is not the version that these shims were made for."""
    import jax

    if jax.__version__ != "0.10.2":
        raise RuntimeError(
            f"jax {jax.__version__} is installed, the judge is made for 0.10.2: run ./test.sh to reinstall"
        )


def patch_interpreter() -> None:
    """Symptom: an integer literal in a ref index fails with "'TypedInt' object has no attribute 'shape'"."""
    from jax._src import literals

    setattr(literals.TypedInt, "shape", ())  # noqa: B010


def topology_device(topology: str) -> Any:
    """A compile-only device of the named topology, e.g. ``v5e:2x2``."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def on_chip(device: Any) -> Any:
    """Context in which tracing knows the chip. Symptom without: "Unsupported TPU device kind: cpu"."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    return jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("chip",)).abstract_mesh)


def interpreted(closed_jaxpr: Any) -> Any:
    """The same jaxpr with every pallas_call, however deep, switched to the interpreter."""
    from jax._src import core

    def convert(value: Any) -> Any:
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=walk(value.jaxpr))
        if isinstance(value, core.Jaxpr):
            return walk(value)
        if isinstance(value, tuple | list) and any(isinstance(v, core.ClosedJaxpr | core.Jaxpr) for v in value):
            return type(value)(convert(v) for v in value)
        return value

    def walk(jaxpr: Any) -> Any:
        equations = []
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                params = {**equation.params, "interpret": True}
            else:
                params = {name: convert(value) for name, value in equation.params.items()}
            equations.append(equation.replace(params=params))
        return jaxpr.replace(eqns=equations)

    return convert(closed_jaxpr)


def find_primitives(closed_jaxpr: Any, names: Sequence[str]) -> list[str]:
    """Which of the named primitives occur in a jaxpr, however deep, Pallas bodies included."""
    from jax._src import core

    found: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, core.ClosedJaxpr):
            walk(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            for equation in value.eqns:
                found.update({equation.primitive.name} & set(names))
                for parameter in equation.params.values():
                    walk(parameter)
        elif isinstance(value, tuple | list):
            for item in value:
                walk(item)

    walk(closed_jaxpr)
    return sorted(found)


def donated_arguments(closed_jaxpr: Any, num_arguments: int) -> tuple[int, ...]:
    """Arguments that kernel_fn donates: those of the jax.jit that it consists of, if it is one."""
    jaxpr = closed_jaxpr.jaxpr
    if len(jaxpr.eqns) != 1 or "donated_invars" not in jaxpr.eqns[0].params:
        return ()
    equation = jaxpr.eqns[0]
    position = {id(var): i for i, var in enumerate(jaxpr.invars)}
    donated = zip(equation.invars, equation.params["donated_invars"], strict=True)
    found = sorted(position[id(var)] for var, is_donated in donated if is_donated and id(var) in position)
    return tuple(i for i in found if i < num_arguments)


def compile_cpu(function: Any, avals: Sequence[Any], donated: tuple[int, ...]) -> Any:
    """The CPU executable of an exported program; falls back to XLA's default passes where it needs them."""
    import jax

    lowered = jax.jit(function, donate_argnums=donated).lower(*avals)
    try:
        return lowered.compile(compiler_options=CPU_COMPILER_OPTIONS)
    except jax.errors.JaxRuntimeError:
        return lowered.compile()


def set_environment() -> None:
    """Before jax is imported: no TPU is attached, whatever the machine has."""
    os.environ.update(COMPILE_ENVIRONMENT)
