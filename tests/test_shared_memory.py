"""An operand that is an output's memory: on the CPU, too, what the kernel wrote there is what it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core

from judge import jax_shims, lower, wire
from judge.strict import strictly

SHAPE = (16, 128)
WHOLE = pl.BlockSpec(memory_space=pl.ANY)

pytestmark = pytest.mark.usefixtures("on_v5e")


def traced(body, specs=(WHOLE, WHOLE)):
    """body(times, x, y, out, buffer) with y's memory as the output's, and the buffer in VMEM."""
    call = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(2,),
            in_specs=[WHOLE, specs[0]],
            out_specs=specs[1],
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
        ),
        input_output_aliases={2: 0},
    )
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    return jax.make_jaxpr(call)(jax.ShapeDtypeStruct((1,), jnp.int32), x, x)


def inputs():
    rng = np.random.default_rng(3)
    return [np.array([3], np.int32), *(rng.normal(size=SHAPE).astype(np.float32) for _ in range(2))]


def on_cpu(program):
    return np.asarray(jax.jit(core.jaxpr_as_fun(jax_shims.interpreted(program)))(*inputs())[0])


def top(ref):
    return ref.at[pl.ds(0, 8)]


def add_one(target, source, buffer):
    """target = source + 1 on the first rows, by way of the buffer."""
    pltpu.sync_copy(top(source), buffer)
    buffer[...] += 1.0
    pltpu.sync_copy(buffer, top(target))


def plainly(times, x, y, out, buffer):
    add_one(out, x, buffer)
    add_one(out, y, buffer)


def in_branches(times, x, y, out, buffer):
    add_one(out, x, buffer)
    pl.when(times[0] == 3)(lambda: add_one(out, y, buffer))
    jax.lax.cond(times[0] > 5, lambda: add_one(out, x, buffer), lambda: add_one(out, y, buffer))


def in_loops(times, x, y, out, buffer):
    @pl.loop(0, times[0])
    def _(i):
        add_one(out, y, buffer)
        pl.when(i == 1)(lambda: add_one(out, y, buffer))

    @pl.loop(0, 2)
    def _(_):
        add_one(out, y, buffer)


def in_scopes(times, x, y, out, buffer):
    def scoped(more):
        add_one(out, x, more)
        add_one(out, y, more)
        pl.when(times[0] == 3)(lambda: add_one(out, y, more))

    pl.run_scoped(scoped, pltpu.VMEM((8, 128), jnp.float32))


def apart(times, x, y, out, buffer):
    """One branch takes the input alone, the next the output alone."""
    add_one(out, x, buffer)
    pl.when(times[0] == 3)(lambda: pltpu.sync_copy(top(y), buffer))
    pl.when(times[0] == 3)(lambda: pltpu.sync_copy(buffer, out.at[pl.ds(8, 8)]))


@pytest.mark.parametrize("body", [plainly, in_branches, in_loops, in_scopes, apart])
def test_an_input_reads_as_the_output_was_written(body):
    program = traced(body)
    want = strictly(program, inputs(), "here")
    assert want is not None
    np.testing.assert_array_equal(on_cpu(program), np.asarray(want[0]))
    _, _, y = inputs()
    assert (np.asarray(want[0])[:8] != y[:8]).all()


def test_what_cannot_be_told_is_a_refusal(tmp_path):
    """The test of the loop reads the input, its body writes the output: the two are never seen together."""

    def body(times, x, y, out, buffer):
        def goes_on(i):
            pltpu.sync_copy(top(y), buffer)
            return i < buffer[0, 0].astype(jnp.int32)

        def step(i):
            add_one(out, x, buffer)
            return i + 1

        jax.lax.while_loop(goes_on, step, 0)

    (tmp_path / "program").write_bytes(wire.dumps(traced(body)))
    request = {
        **{"out": str(tmp_path), "program": str(tmp_path / "program"), "kernel": "kernel.py", "topology": "v5e:2x2"},
        "inputs": [{"shape": list(array.shape), "dtype": str(array.dtype)} for array in inputs()],
        **{"flops": 1.0, "needs_pallas": True, "platforms": ["tpu", "cpu"]},
    }
    with pytest.raises(lower.Refusal, match=r"cannot be checked on the CPU: while takes an operand and the output"):
        lower.lower(request)


def test_blocks_have_a_memory_of_their_own():
    """As on the chip, where each is a buffer in VMEM."""
    block = pl.BlockSpec((8, 128), lambda i, times: (i, 0))

    def body(times, x, y, out, buffer):
        out[...] = y[...] * 2
        out[...] += y[...]

    _, _, y = inputs()
    np.testing.assert_array_equal(on_cpu(traced(body, (block, block))), y * 2 + y)
