"""judge/wire.py: a traced program arrives as it was, and hostile bytes make nothing else."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_more_than_a_program_has():
    with pytest.raises(wire.WireError, match="are there constants in it"):
        wire.loads(b"\0" * (wire.MAX_BYTES + 1))
