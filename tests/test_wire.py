"""judge/wire.py: a traced program arrives as it was, and hostile bytes make nothing else."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import core
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from judge import wire


def program():
    return jax.make_jaxpr(
        lambda x: jnp.where(x > 0, x * 2, 0.5).sum() + jax.lax.fori_loop(0, 3, lambda i, s: s + i, 0)
    )(jnp.ones((8, 128)))


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def refused(*operations: bytes) -> str:
    with pytest.raises(wire.WireError) as found:
        wire.loads(b"\x80\x05" + b"".join(operations) + b".")
    return str(found.value)


def test_what_is_sent_arrives():
    sent = program()
    assert str(wire.loads(wire.dumps(sent))) == str(sent)


def test_a_grid_of_a_size_that_the_program_computes_arrives():
    block = pl.BlockSpec((8, 128), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct((64, 128), jnp.float32)

    def twice(x, y):
        y[...] = x[...] * 2

    def call(x, count):
        return pl.pallas_call(twice, grid=(count,), in_specs=[block], out_specs=block, out_shape=shape)(x)

    sent = jax.make_jaxpr(call)(shape, jnp.int32(3))
    assert str(wire.loads(wire.dumps(sent))) == str(sent)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("judge.wire", "traceback_at"),
        ("judge.wire", "pickle.loads"),
        ("jax._src.core", "types.FunctionType"),  # through the modules that a module imports
        ("jax._src.core", "types.CodeType"),
        ("jax._src.core", "threading.Thread"),
        ("jax._src.mesh", "np.memmap"),
        ("jax._src.effects", "Iterable"),  # a class that is not jax's
        ("jax._src.core", "Primitive"),
        ("jax._src.core", "jaxpr_as_fun"),
        ("numpy", "memmap"),
        ("numpy.dtypes", "os.system"),
        ("ml_dtypes", "finfo"),  # gives what everybody shares
    ],
)
def test_names_that_have_no_place(module, name):
    assert f"{module}.{name} has no place" in refused(named(module, name))


def test_types_are_not_had_by_asking_for_one():
    function = named("judge.wire", "primitive")
    assert "a type that has no place" in refused(named("builtins", "type"), function, pickle.TUPLE1, pickle.REDUCE)


EXP = named("judge.wire", "primitive") + text("jax._src.lax.lax") + text("exp_p") + pickle.TUPLE2 + pickle.REDUCE
SPACE = named("jax._src.pallas.mosaic.core", "MemorySpace") + text("vmem") + pickle.TUPLE1 + pickle.REDUCE
NAMED_FOO = pickle.EMPTY_DICT + text("name") + text("foo") + pickle.SETITEM


@pytest.mark.parametrize("shared", [EXP, SPACE, named("jax._src.core", "Jaxpr")])
def test_state_of_what_others_share_stays(shared):
    assert "state for something that is no new object" in refused(shared, NAMED_FOO, pickle.BUILD)
    assert jax.lax.exp_p.name == "exp"


def test_the_state_of_an_element_type_has_no_fields():
    kind = named("numpy", "dtype") + text("V8") + pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3 + pickle.REDUCE
    state = pickle.dumps((3, "|", None, ("f",), {"f": (np.dtype("i4"), 0)}, 8, 1, 63), protocol=0)[:-1]
    with pytest.raises(wire.WireError):
        wire.loads(b"\x80\x05" + kind + state + pickle.BUILD + b".")


@pytest.mark.parametrize("name", ["__builtins__", "__dict__", "finfo", "memmap", "no_such_type"])
def test_an_element_type_is_one(name):
    """As `ml_dtypes.__builtins__`, what every function of the process calls could be replaced."""
    kind = named("judge.wire", "numpy_type") + text(name) + pickle.TUPLE1 + pickle.REDUCE
    assert f"no element type {name}" in refused(kind, text("sum"), named("judge.wire", "refusing"), pickle.SETITEM)
    assert sum([1, 2]) == 3


def smaller(a_ref, x_ref, out_ref):
    out_ref[...] = jnp.where(a_ref[0] < a_ref[1], x_ref[...], 0.0)


def with_scalars(kind, **options):
    """A traced Pallas call on two scalars of a type and a block of numbers."""
    block = pl.BlockSpec((8, 128), lambda i, a_ref: (i, 0))
    call = pl.pallas_call(
        smaller,
        out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(2,), in_specs=[block], out_specs=block),
        **options,
    )
    return jax.make_jaxpr(call)(jnp.ones(2, kind), jnp.ones((16, 128)))


def call_of(traced):
    return next(e for e in traced.jaxpr.eqns if e.primitive.name == "pallas_call").params


def in_the_kernel(traced):
    """Its second reference has another block than the call says."""
    reference = call_of(traced)["jaxpr"].invars[1]
    reference.aval = reference.aval.update(inner_aval=reference.aval.inner_aval.update(shape=(4, 128)))


def in_the_mapping(traced):
    array = call_of(traced)["grid_mapping"].block_mappings[0]
    object.__setattr__(array, "array_aval", array.array_aval.update(shape=(32, 128)))


def in_the_grid(traced):
    object.__setattr__(call_of(traced)["grid_mapping"], "index_map_avals", ())


def outside(traced):
    """The scalars have a sign where the call comes from, and none in the kernel."""
    scalars = traced.jaxpr.invars[0]
    scalars.aval = scalars.aval.update(dtype=np.dtype("int32"))


def flags(traced):
    options = pltpu.CompilerParams()
    object.__setattr__(options, "flags", {"any": True})
    call_of(traced)["compiler_params"] = options


def looks_like_a_primitive(traced):
    """A class of jax's that holds what it is given, named as one that is known."""
    eqn, other = traced.jaxpr.eqns[0], core.ShapedArray((), np.dtype("int32"))
    parts = (eqn.invars, eqn.outvars, other, eqn.params, eqn.effects, eqn.source_info, eqn.ctx)
    traced.jaxpr.eqns[0] = core.JaxprEqn(*parts)


def not_a_list(traced):
    traced.jaxpr._eqns = tuple(traced.jaxpr.eqns)


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (looks_like_a_primitive, "an equation that jax did not make"),
        (not_a_list, "a jaxpr that jax did not make"),
        (in_the_kernel, "what it says of what its kernel takes"),
        (in_the_mapping, "what it says of its arrays"),
        (in_the_grid, "what it says of what its index maps take"),
        (outside, "what it says of its scalars"),
        (flags, "what it says of how it is compiled"),
    ],
)
def test_a_call_that_lies(on_v5e, lie, told):
    honest = with_scalars(jnp.uint32)
    assert str(wire.loads(wire.dumps(honest))) == str(honest)
    lie(honest)
    with pytest.raises(wire.WireError, match=told):
        wire.loads(wire.dumps(honest))


def test_a_kernel_chooses_no_flags(on_v5e):
    with pytest.raises(wire.WireError, match="compiler flags of its own"):
        wire.dumps(with_scalars(jnp.int32, compiler_params=pltpu.CompilerParams(flags={"any": True})))


def test_more_than_a_program_has():
    with pytest.raises(wire.WireError, match="are there constants in it"):
        wire.loads(b"\0" * (wire.MAX_BYTES + 1))
