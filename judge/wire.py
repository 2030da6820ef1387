"""A traced program as bytes: what the worker hands over instead of anything that it lowered itself.

The kernel file has run in the worker's process, so nothing that jax does there can be relied on. The jaxpr leaves it as
data; lower.py, a process in which no kernel file ever runs, rebuilds it, checks its types and lowers it. Reading is
made for hostile bytes: only classes that jax defines in the modules named here are made, primitives are looked up by
name among jax's own, functions arrive as an object that refuses to be called, and no state is set on anything but a
new object. Should it fail nevertheless, lower.py is contained like the worker.
"""

import dataclasses
import enum
import functools
import io
import pickle
import sys
from typing import Any, ClassVar

MAX_BYTES = 64 << 20  # large constants have no place in a kernel

# Whose classes may be made; elsewhere in jax only what is plain data by its kind (see _is_data).
_MODULES = (
    *("jax._src.core", "jax._src.effects", "jax._src.literals", "jax._src.mesh", "jax._src.source_info_util"),
    *("jax._src.named_sharding", "jax._src.partition_spec", "jax._src.state.types", "jax._src.pallas.core"),
    "jax._src.pallas.mosaic.core",
)
_EXACT = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "slice"),
    ("builtins", "complex"),
    ("builtins", "dict"),
    ("builtins", "bool"),
    ("builtins", "int"),
    ("builtins", "float"),
    ("builtins", "tuple"),
    ("builtins", "list"),
    ("builtins", "NoneType"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("jaxlib._jax", "NamedSharding"),
    ("jax", "P"),
    ("jax", "NamedSharding"),
}
# Functions with which jax and numpy rebuild their own values.
_REBUILDERS = {
    ("jax._src.named_sharding", "_unpickle_named_sharding"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
}
_NO_FLAGS = "metadata and compiler flags of its own have no place in a pallas_call"
_OTHER_CALLS = ("core_map", "mpmd_map")


class WireError(Exception):
    """Bytes that are no program of the worker's, or a program with something that cannot be handed over."""


class Refusing:
    """Stands for a function of the kernel file's process, e.g. a derivative rule; lowering calls none of them."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise WireError("a function of the kernel file was called while lowering")


def dumps(program: Any) -> bytes:
    """A closed jaxpr as bytes. Raises WireError."""
    buffer = io.BytesIO()
    writer = _Writer(buffer)
    try:
        writer.dump(program)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"the traced program cannot be handed over: {error}") from error
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """The closed jaxpr that dumps wrote, with its types checked. Raises WireError."""
    from jax._src import core

    from judge import jax_shims

    if len(data) > MAX_BYTES:
        raise WireError(
            f"the traced program has {len(data)} bytes, at most {MAX_BYTES} may be: are there constants in it?"
        )
    try:
        program = _Reader(io.BytesIO(data)).load()
        if not isinstance(program, core.ClosedJaxpr):
            raise WireError("no traced program")
        jax_shims.check_form(program)
        core.check_jaxpr(program.jaxpr)
        jax_shims.check_calls(program)
    except WireError:
        raise
    except Exception as error:
        raise WireError(f"not a traced program: {type(error).__name__}: {str(error)[:300]}") from error
    return program


# --- how each kind of object travels ---


def _primitive_names() -> dict[int, tuple[str, str]]:
    """id → (module, attribute) of every primitive that jax itself defines."""
    from jax._src import core

    names: dict[int, tuple[str, str]] = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.startswith("jax._src"):
            for attribute, value in vars(module).items():
                if isinstance(value, core.Primitive):
                    names.setdefault(id(value), (module_name, attribute))
    return names


def _import_all() -> None:
    """Both sides know the same primitives."""
    import jax.experimental.pallas
    import jax.experimental.pallas.tpu  # noqa: F401


def primitive(module: str, attribute: str) -> Any:
    from jax._src import core

    value = getattr(sys.modules.get(module), attribute, None) if module.startswith("jax._src.") else None
    if not isinstance(value, core.Primitive):
        raise WireError(f"no primitive {module}.{attribute}")
    _check_kind(value)
    return value


def _check_kind(known: Any) -> None:
    if known.name in _OTHER_CALLS:
        raise WireError(f"pl.pallas_call is the one kind of kernel that is judged: not {known.name}, nor pl.kernel")


def nodes(structure: Any) -> Any:
    """A tree structure as nested pairs (node data, children); a leaf is "leaf"."""
    if structure.num_nodes == 1 and structure.num_leaves == 1:
        return "leaf"
    return structure.node_data(), tuple(nodes(child) for child in structure.children())


def tree(shape: Any) -> Any:
    """Inverse of nodes: in jax's usual registry of containers, else in the one that tracing uses."""
    import jax
    from jax._src import tree_util

    def build(shape: Any, registry: Any) -> Any:
        if shape == "leaf":
            return registry.flatten(0)[1]
        node, children = shape
        if node is None:
            return registry.flatten(None)[1]
        built = [build(child, registry) for child in children]
        return jax.tree_util.PyTreeDef.from_node_data_and_children(registry, node, built)

    try:
        return build(shape, tree_util.default_registry)
    except (RuntimeError, ValueError):
        return build(shape, tree_util.tracing_registry)


@functools.cache
def traceback_at(file: str, function: str, line: int) -> Any:
    """A traceback whose innermost frame is that line: where an equation came from, for messages and dumps."""
    from jaxlib import xla_client

    code = compile("\n" * (min(max(line, 1), 100_000) - 1) + "result = capture()", file[-200:], "exec")
    found: dict[str, Any] = {"capture": xla_client.Traceback.get_traceback}
    exec(code.replace(co_name=function[:200] or "?"), found)
    return found.get("result")


def equation(*fields: Any) -> Any:
    from jax._src import core, source_info_util

    *parts, effects, place, stack = fields
    info = source_info_util.SourceInfo(None if place is None else traceback_at(*place), stack)
    new: Any = core.JaxprEqn
    return new(*parts, effects, info, core.JaxprEqnContext())  # the one of this process: the chip is known in it


def typed_array(array: Any, aval: Any) -> Any:
    from jax._src import literals

    return literals.TypedNdArray(array, aval)


def refusing() -> Refusing:
    return Refusing()


def empty_mesh() -> Any:
    from jax._src import mesh

    return mesh.empty_concrete_mesh if hasattr(mesh, "empty_concrete_mesh") else mesh.EMPTY_ENV.physical_mesh


def dynamic_grid_dim() -> Any:
    """What stands in a grid for a size that the program computes; jax knows it by its identity."""
    from jax._src.pallas import core

    return core.dynamic_grid_dim


def numpy_type(name: str) -> Any:
    import ml_dtypes
    import numpy as np

    value = getattr(np if hasattr(np, name) else ml_dtypes, name, None)
    if not isinstance(value, type) or not issubclass(value, np.generic):
        raise WireError(f"no element type {name}")
    return value


def type_of(value: Any) -> Any:
    """What `type` is called for when None or ... are among the parameters."""
    if value is not None and value is not ... and value is not NotImplemented:
        raise WireError("a type that has no place in a traced program")
    return type(value)


_FUNCTIONS = (primitive, tree, equation, typed_array, refusing, empty_mesh, dynamic_grid_dim, numpy_type)


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        _import_all()
        self._names = _primitive_names()
        self._shapes: dict[Any, Any] = {}

    def reducer_override(self, value: Any) -> Any:
        import types

        import jax
        import numpy as np
        from jax._src import core, effects, frozen_dict, literals, mesh, source_info_util

        # The most common kinds by their constructors, which take fewer bytes than a state to be set.
        if isinstance(value, core.Var):
            return core.Var, (value.aval, value.initial_qdd, value.final_qdd)
        if isinstance(value, core.Literal):
            return core.Literal, (value.val, value.aval)
        if isinstance(value, effects.JaxprInputEffect):
            return type(value), (value.input,)
        if isinstance(value, literals.TypedInt | literals.TypedFloat):
            return type(value), value.__getnewargs__()
        if isinstance(value, core.Primitive):
            if id(value) not in self._names:
                raise WireError(f"the kernel uses a primitive that is not jax's own: {value.name}")
            _check_kind(value)
            return primitive, self._names[id(value)]
        if isinstance(value, jax.tree_util.PyTreeDef):
            return tree, (self._shapes.setdefault(value, nodes(value)),)  # the same object for trees that are equal
        if isinstance(value, core.JaxprEqn):
            frame = source_info_util.user_frame(value.source_info.traceback)
            place = None
            if frame is not None:
                place = (frame.file_name, frame.function_name, frame.start_line)
            parts = (value.invars, value.outvars, value.primitive, value.params, value.effects)
            if value.ctx.compute_type or value.ctx.xla_metadata:
                raise WireError("compute_on and metadata for the compiler have no place in a kernel")
            return equation, (*parts, place, value.source_info.name_stack)
        if isinstance(value, literals.TypedNdArray):
            return typed_array, (np.array(value, copy=True, subok=False), value.aval)
        if isinstance(value, mesh.Mesh):
            if not value.empty:
                raise WireError("the traced program names devices")
            return empty_mesh, ()
        if value is dynamic_grid_dim():
            return dynamic_grid_dim, ()
        if isinstance(value, type) and issubclass(value, np.generic):
            return numpy_type, (value.__name__,)
        if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
            known = value in _FUNCTIONS or (value.__module__, value.__name__) in _REBUILDERS
            return NotImplemented if known else (refusing, ())
        if (
            not isinstance(value, type)
            and callable(value)
            and type(value).__module__.startswith(("jax._src.linear", "functools"))
        ):
            return refusing, ()
        if isinstance(value, jax.Array):
            return np.asarray(value).__reduce_ex__(5)
        if isinstance(value, frozen_dict.FrozenDict):
            raise WireError(_NO_FLAGS)
        return NotImplemented


def _is_data(kind: type) -> bool:
    """Dataclasses, enums, named tuples, abstract values, effects: making one does nothing else."""
    from jax._src import core, effects

    plain = (enum.Enum, core.AbstractValue, effects.Effect)
    return dataclasses.is_dataclass(kind) or issubclass(kind, plain) or hasattr(kind, "_fields")


def _is_of_jax(kind: type) -> bool:
    """A class that jax defines, no module's import of another's, and none that does the tracing."""
    from jax._src import core

    return kind.__module__.startswith("jax") and not issubclass(kind, core.Primitive | core.Trace)


def _takes_state(instance: Any, state: Any) -> bool:
    """Whether it was made for this stream alone; the state of an element type is that of a plain one."""
    import numpy as np
    from jax._src import core, mesh

    if isinstance(instance, np.dtype):
        if not isinstance(state, tuple) or len(state) != 8 or instance.hasobject:
            return False
        return state[2:5] == (None, None, None) and state[5] in (-1, instance.itemsize) and state[7] == instance.flags
    if isinstance(instance, type | enum.Enum | core.Primitive | mesh.Mesh):
        return False
    return not callable(instance) or dataclasses.is_dataclass(instance)


class _Reader(pickle._Unpickler):
    """pickle's own reader in Python, with fewer opcodes and a short list of what may be made."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        _import_all()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "type"):
            return type_of
        if (module, name) == ("builtins", "ellipsis"):
            return type(...)
        if not name.isidentifier():  # a dot would lead through one module into any other
            raise WireError(f"{module}.{name} has no place in a traced program")
        if module == "judge.wire":
            allowed = {function.__name__: function for function in _FUNCTIONS}
            if name in allowed:
                return allowed[name]
        elif (module, name) in _EXACT | _REBUILDERS or (module == "numpy.dtypes" and name.endswith("DType")):
            return super().find_class(module, name)
        elif module in _MODULES or module.startswith("jax._src."):
            value = super().find_class(module, name)
            if isinstance(value, type) and _is_of_jax(value) and (module in _MODULES or _is_data(value)):
                return value
        raise WireError(f"{module}.{name} has no place in a traced program")

    def load_build(self) -> None:
        state, instance = self.stack[-1], self.stack[-2]  # type: ignore[attr-defined]
        if not _takes_state(instance, state):
            raise WireError("state for something that is no new object")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build
    for _code in (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID):
        dispatch.pop(_code[0], None)
