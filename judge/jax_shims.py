"""Every place that leans on jax internals, tied to the pinned version (jax 0.10.2).

Remove a shim when the version that is pinned no longer shows its symptom.
"""

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
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
CPU_COMPILER_OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "float-normalization-bf16"}
HASTE_BYTES = 4 << 20  # of inputs: with more, optimised code saves more time than it takes to make


# What tracing, lowering, the interpreters and the compiler import when they first need it.
_LOADED = (
    *("jax.export", "jax.extend", "jax.experimental.topologies", "jax.experimental.multihost_utils"),
    *("jax.experimental.pallas.tpu", "jax.experimental.pallas.mosaic_gpu", "jaxlib.mlir.dialects.mhlo"),
    *("jax._src.pallas.mosaic.pallas_call_registration", "jax._src.pallas.mosaic.sc_lowering"),
    *("absl.logging", "scipy.linalg"),
)


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


def load() -> None:
    """Imports what the stages need of jax, and starts none of it."""
    for name in _LOADED:
        importlib.import_module(name)


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


PALLAS_CALLS = ("pallas_call", "core_map", "mpmd_map")
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def check_form(closed_jaxpr: Any) -> None:
    """Raises ValueError where anything in a jaxpr is of another kind than jax makes it of, e.g. something that only
    looks like a primitive."""
    from jax._src import core

    def check(jaxpr: Any) -> None:
        parts = (jaxpr.constvars, jaxpr.invars, jaxpr.outvars, jaxpr.eqns)
        atoms = (*jaxpr.constvars, *jaxpr.invars, *jaxpr.outvars)
        if any(type(part) is not list for part in parts) or not all(
            isinstance(atom, core.Var | core.Literal) for atom in atoms
        ):
            raise ValueError("a jaxpr that jax did not make")

    def visit(equation: Any) -> None:
        kinds = (type(equation), type(equation.params), type(equation.invars), type(equation.outvars))
        if kinds != (core.JaxprEqn, dict, list, list) or not isinstance(equation.primitive, core.Primitive):
            raise ValueError("an equation that jax did not make")

    _walk(closed_jaxpr, visit, visit_jaxpr=check)


def check_calls(closed_jaxpr: Any) -> None:
    """Raises ValueError where a Pallas call says something else of what it is given than its equation does.

    The chip's lowering goes by what the call says, the CPU's by what comes (whether a scalar has a sign, for one), and
    jax compares neither but under its flag for checks, in part.
    """

    def visit(equation: Any) -> None:
        if equation.primitive.name == "pallas_call":
            _check_call(equation)

    _walk(closed_jaxpr, visit)


def _check_call(equation: Any) -> None:
    from jax._src import core
    from jax._src.pallas import core as pallas

    params = equation.params
    mapping, kernel = params["grid_mapping"], [var.aval for var in params["jaxpr"].invars]
    blocks, count = mapping.block_mappings, mapping.num_index_operands
    operands = [var.aval for var in equation.invars[mapping.num_dynamic_grid_bounds :]]
    arrays = [*operands[count:], *params["out_avals"]]
    references = [block.transformed_block_aval for block in blocks]
    ids = list(mapping.index_map_avals[: len(mapping.grid)])

    def like(one: Any, other: Any) -> bool:
        return (one.shape, one.dtype) == (other.shape, other.dtype)

    told = [
        (len(blocks) == len(arrays) == mapping.num_inputs + mapping.num_outputs, "how many blocks there are"),
        (kernel[count:] == [*references, *mapping.scratch_avals], "what its kernel takes"),
        (all(map(like, kernel[:count], operands)), "its scalars"),
        (all(map(like, (block.array_aval for block in blocks), arrays)), "its arrays"),
        (all(ref.dtype == array.dtype for ref, array in zip(references, arrays, strict=False)), "its blocks' types"),
        (list(mapping.index_map_avals) == [*ids, *kernel[:count]], "what its index maps take"),
        (all(aval.shape == () and aval.dtype == "int32" for aval in ids), "its grid"),
        (not params["jaxpr"].constvars and params["mesh"] is None, "what else its kernel takes"),
        (mapping.get_grid_indices is None and mapping.local_grid_env is None, "where its grid comes from"),
        (params["metadata"] is None and not getattr(params["compiler_params"], "flags", None), "how it is compiled"),
    ]
    for block, reference in zip(blocks, references, strict=True):
        index_map = block.index_map_jaxpr
        core.check_jaxpr(index_map.jaxpr)
        told += [
            (pallas._get_ref_block_shape(block.block_shape) == reference.shape, "a block's shape"),
            (not block.transforms and not index_map.consts, "a block"),
            (list(index_map.in_avals) == list(mapping.index_map_avals), "an index map"),
            (all(out.shape == () and out.dtype == "int32" for out in index_map.out_avals), "an index"),
        ]
    wrong = [what for holds, what in told if not holds]
    if wrong:
        raise ValueError(f"a pallas_call is not what it says of {wrong[0]}")


def interpreted(closed_jaxpr: Any) -> Any:
    """The same jaxpr with every Pallas kernel, however deep, switched to the interpreter that lowers to XLA."""
    shared = _rebuilt(closed_jaxpr, lambda equation: [_sharing_memory(equation)])
    return _with_interpreter(shared, True, frozenset())


def shared_memories(params: dict[str, Any]) -> list[tuple[int, int]]:
    """(input, output) references of a pallas_call's kernel that are one memory, and not copied by blocks."""
    mapping, references = params["grid_mapping"], params["jaxpr"].invars
    outputs = mapping.num_index_operands + mapping.num_inputs
    pairs = [(source, outputs + target) for source, target in params["input_output_aliases"]]
    return [pair for pair in pairs if all(is_whole(references[i].aval) for i in pair)]


def is_whole(reference: Any) -> bool:
    """Whether a kernel's reference is the operand itself, not a block of it."""
    return any(name in memory_space(reference) for name in ("hbm", "any"))


def memory_space(reference: Any) -> str:
    """`hbm`, `any`, `smem`, `vmem` …; a reference that names none is in VMEM."""
    return str(getattr(reference, "memory_space", None) or "vmem").lower()


def _sharing_memory(equation: Any) -> Any:
    """A pallas_call whose kernel reads an input that is an output's memory where it writes that output.

    Symptom without: the interpreter gives the two a memory each (its own TODO), so the input stays as it was.
    """
    if equation.primitive.name != "pallas_call":
        return equation
    jaxpr = equation.params["jaxpr"]
    same = {jaxpr.invars[i]: jaxpr.invars[o] for i, o in shared_memories(equation.params)}
    return equation.replace(params={**equation.params, "jaxpr": _renamed(jaxpr, same)}) if same else equation


def _renamed(jaxpr: Any, same: dict[Any, Any]) -> Any:
    """A jaxpr that uses `same[reference]` for each reference there. Raises NotImplementedError where it cannot tell.

    An equation with a jaxpr of its own that takes both still gets both, and the renaming goes on inside: given one
    reference twice, its discharge to values would write the old value back over the new.
    """
    from jax._src import core
    from jax._src.effects import JaxprInputEffect

    def new(var: Any) -> Any:
        return same.get(var, var) if isinstance(var, core.Var) else var

    def effects(having: Any) -> Any:
        return {e.replace(new(e.input)) if isinstance(e, JaxprInputEffect) else e for e in having.effects}

    equations = []
    for equation in jaxpr.eqns:
        both = {var for var in same if var in equation.invars and same[var] in equation.invars}
        parameters = equation.params
        if both and any(map(_holds_jaxpr, parameters.values())):
            parameters = {**parameters, **_renamed_inside(equation, {var: same[var] for var in both})}
        else:
            both = set()
        invars = [var if isinstance(var, core.Var) and var in both else new(var) for var in equation.invars]
        equations.append(equation.replace(invars=invars, params=parameters, effects=effects(equation)))
    return jaxpr.replace(eqns=equations, effects=effects(jaxpr))


def _renamed_inside(equation: Any, same: dict[Any, Any]) -> dict[str, Any]:
    """The parameters that hold jaxprs, with what stands for `same` in them renamed."""
    from jax._src import core

    params, given = equation.params, equation.invars
    if equation.primitive.name == "while":
        tests, first = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        takes = {"cond_jaxpr": [*given[:tests], *given[first:]], "body_jaxpr": given[tests:]}
    elif equation.primitive.name == "cond":
        takes = {"branches": given[1:]}
    else:
        takes = {name: given for name, value in params.items() if _holds_jaxpr(value)}

    def rename(value: Any, outer: Sequence[Any]) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(rename(v, outer) for v in value)
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=rename(value.jaxpr, outer))
        inner = value.constvars if equation.primitive.name == "run_scoped" else value.invars
        if len(inner) != len(outer) or any(var in outer and same[var] not in outer for var in same):
            raise NotImplementedError(f"{equation.primitive.name} takes an operand and the output that is its memory")
        stands = {id(var): own for var, own in zip(outer, inner, strict=True)}
        return _renamed(value, {stands[id(var)]: stands[id(same[var])] for var in same if var in outer})

    return {name: rename(params[name], outer) for name, outer in takes.items()}


def _holds_jaxpr(value: Any) -> bool:
    from jax._src import core

    if isinstance(value, tuple | list):
        return any(map(_holds_jaxpr, value))
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


def rounds_operands(closed_jaxpr: Any) -> bool:
    """Whether a float32 product in it, however deep, is one pass of bfloat16 operands on the chip."""
    found: list[Any] = []

    def visit(equation: Any) -> None:
        if _is_rounded(equation):
            found.append(equation)

    _walk(closed_jaxpr, visit)
    return bool(found)


def _is_rounded(equation: Any) -> bool:
    """HIGH and HIGHEST, for both operands, take more passes; of anything else, the default's one is taken."""
    from jax import lax

    if equation.primitive.name not in _PRODUCTS:
        return False
    precision = equation.params["precision"]
    fine = (lax.Precision.HIGH, lax.Precision.HIGHEST)
    both = precision if isinstance(precision, tuple) else (precision, precision)
    return any(str(atom.aval.dtype) == "float32" for atom in equation.invars[:2]) and not all(p in fine for p in both)


def rounding_operands(closed_jaxpr: Any) -> Any:
    """The same jaxpr with the float32 operands of such products rounded to bfloat16 first.

    Symptom without: the CPU computes exactly what the chip, at default precision, makes in one pass.
    """
    from jax._src import core
    from jax._src.lax import lax

    def rounded(atom: Any, equation: Any, before: list[Any]) -> Any:
        if str(atom.aval.dtype) != "float32":
            return atom
        result = core.Var(atom.aval)
        parameters = {"exponent_bits": 8, "mantissa_bits": 7}
        before.append(
            core.new_jaxpr_eqn(
                [atom], [result], lax.reduce_precision_p, parameters, core.no_effects, equation.source_info
            )
        )
        return result

    def change(equation: Any) -> list[Any]:
        before: list[Any] = []
        if _is_rounded(equation):
            operands = [rounded(atom, equation, before) for atom in equation.invars[:2]]
            equation = equation.replace(invars=[*operands, *equation.invars[2:]])
        return [*before, equation]

    return _rebuilt(closed_jaxpr, change)


def _rebuilt(value: Any, change: Callable[[Any], list[Any]]) -> Any:
    """A jaxpr, or a parameter that holds some, with each equation however deep replaced by `change(equation)`."""
    from jax._src import core

    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_rebuilt(value.jaxpr, change))
    if isinstance(value, core.Jaxpr):
        equations = []
        for equation in value.eqns:
            params = {name: _rebuilt(parameter, change) for name, parameter in equation.params.items()}
            equations += change(equation.replace(params=params))
        return value.replace(eqns=equations)
    if isinstance(value, tuple | list) and _holds_jaxpr(value):
        return type(value)(_rebuilt(v, change) for v in value)
    return value


def strict(closed_jaxpr: Any) -> Any:
    """The same with the interpreter that simulates memories, DMAs and semaphores and looks for races."""
    from jax._src.callback import _OrderedIOEffect
    from jax.experimental.pallas import tpu as pltpu

    parameters = pltpu.InterpretParams(
        detect_races=True,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
        dma_execution_mode="on_wait",
    )
    return _with_interpreter(closed_jaxpr, parameters, frozenset((_OrderedIOEffect,)))


def patch_detector() -> None:
    """Symptom: each access is compared with all before it in Python; ten thousand row copies take ten minutes."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    from judge.races import Detector

    setattr(interpret_pallas_call, "RaceDetectionState", Detector)  # noqa: B010


def race_found() -> str:
    """The first race of the last strict run, in words, or nothing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    detector: Any = interpret_pallas_call.races
    return "" if detector is None or not detector.races_found else detector.first or "somewhere"


def reset_strict() -> None:
    """What the strict interpreter asks for between runs."""
    from jax.experimental.pallas import tpu as pltpu

    pltpu.reset_tpu_interpret_mode_state()


def _with_interpreter(closed_jaxpr: Any, interpret: Any, effects: frozenset[Any]) -> Any:
    """Every Pallas kernel with parameter `interpret`; `effects` are what it then has, and so all that contains it."""
    from jax._src import core

    def convert(value: Any) -> Any:
        if isinstance(value, core.ClosedJaxpr):
            return value.replace(jaxpr=walk(value.jaxpr))
        if isinstance(value, core.Jaxpr):
            return walk(value)
        if isinstance(value, tuple | list) and _holds_jaxpr(value):
            return type(value)(convert(v) for v in value)
        return value

    def walk(jaxpr: Any) -> Any:
        equations = []
        for equation in jaxpr.eqns:
            if equation.primitive.name in PALLAS_CALLS:
                params, has = {**equation.params, "interpret": interpret}, effects
            else:
                params = {name: convert(value) for name, value in equation.params.items()}
                has = effects if any(map(_is_affected, params.values())) else frozenset()
            equations.append(equation.replace(params=params, effects=equation.effects | has))
        inherited = set().union(*(equation.effects & effects for equation in equations))
        return jaxpr.replace(eqns=equations, effects=jaxpr.effects | inherited)

    def _is_affected(value: Any) -> bool:
        if isinstance(value, tuple | list):
            return any(map(_is_affected, value))
        return isinstance(value, core.ClosedJaxpr | core.Jaxpr) and bool(value.effects & effects)

    return convert(closed_jaxpr)


def _walk(
    value: Any,
    visit: Callable[[Any], bool | None],
    visit_jaxpr: Callable[[Any], None] = lambda jaxpr: None,
    seen: set[int] | None = None,
) -> None:
    """Calls visit(equation) for every equation however deep, Pallas bodies and index maps included; where it returns
    False, what is in the equation is left out."""
    from jax._src import core

    seen = set() if seen is None else seen
    if isinstance(value, str | int | float | bool | None) or id(value) in seen:
        return
    seen.add(id(value))
    inside: Iterable[Any] = ()
    if isinstance(value, core.ClosedJaxpr):
        inside = (value.jaxpr,)
    elif isinstance(value, core.Jaxpr):
        visit_jaxpr(value)
        inside = (equation.params for equation in value.eqns if visit(equation) is not False)
    elif isinstance(value, tuple | list):
        inside = value
    elif isinstance(value, dict):
        inside = value.values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = (getattr(value, field.name, None) for field in dataclasses.fields(value))
    for item in inside:
        _walk(item, visit, visit_jaxpr, seen)


def find_primitives(closed_jaxpr: Any, names: Sequence[str]) -> list[str]:
    """Which of the named primitives occur in a jaxpr, however deep, Pallas bodies and index maps included."""
    found: set[str] = set()
    _walk(closed_jaxpr, lambda equation: found.update({equation.primitive.name} & set(names)))
    return sorted(found)


def interpreted_calls(closed_jaxpr: Any) -> int:
    """How many pallas_calls say that they are to be interpreted."""
    found: list[Any] = []

    def visit(equation: Any) -> None:
        if equation.primitive.name in PALLAS_CALLS and equation.params.get("interpret"):
            found.append(equation)

    _walk(closed_jaxpr, visit)
    return len(found)


def constant_bytes(closed_jaxpr: Any) -> int:
    """Bytes of arrays that a jaxpr holds instead of taking or computing them."""
    from jax._src import core

    sizes: dict[int, int] = {}

    def count(value: Any) -> None:
        sizes[id(value)] = int(getattr(value, "nbytes", 0))

    def visit(equation: Any) -> None:
        for atom in equation.invars:
            if isinstance(atom, core.Literal):
                count(atom.val)
        for parameter in equation.params.values():
            if isinstance(parameter, core.ClosedJaxpr):
                for constant in parameter.consts:
                    count(constant)

    for constant in closed_jaxpr.consts:
        count(constant)
    _walk(closed_jaxpr, visit)
    return sum(sizes.values())


def matmul_flops_beside_kernels(closed_jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions outside every Pallas kernel, loops taken once."""
    total = 0.0

    def visit(equation: Any) -> bool:
        nonlocal total
        if equation.primitive.name in _TERMS:
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * _TERMS[equation.primitive.name](equation)
        return equation.primitive.name not in PALLAS_CALLS

    _walk(closed_jaxpr, visit)
    return total


def _terms_of_dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return math.prod(left[i] for i in contracted)


def _terms_of_convolution(equation: Any) -> int:
    features, *_ = equation.params["dimension_numbers"].rhs_spec
    weights = equation.invars[1].aval.shape
    return math.prod(weights) // max(1, weights[features])


# Primitive → products that each element of its result adds up.
_TERMS: dict[str, Callable[[Any], int]] = {
    "dot_general": _terms_of_dot,
    "conv_general_dilated": _terms_of_convolution,
    "ragged_dot_general": lambda equation: int(equation.invars[0].aval.shape[-1]),
}


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


def in_haste(arrays: Sequence[Any]) -> dict[str, Any]:
    """Compiler options for a CPU program with these inputs: small ones run for less time than LLVM would take."""
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return {"xla_backend_optimization_level": 0} if size < HASTE_BYTES else {}


def compile_cpu(function: Any, avals: Sequence[Any], donated: tuple[int, ...]) -> Any:
    """The CPU executable of an exported program; falls back to XLA's default passes where it needs them."""
    import jax

    lowered = jax.jit(function, donate_argnums=donated).lower(*avals)
    try:
        return lowered.compile(compiler_options=CPU_COMPILER_OPTIONS | in_haste(avals))
    except jax.errors.JaxRuntimeError:
        return lowered.compile()


def set_environment() -> None:
    """Before jax is imported: no TPU is attached, whatever the machine has."""
    os.environ.update(COMPILE_ENVIRONMENT)
