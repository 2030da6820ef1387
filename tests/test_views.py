"""judge/views.py: a reference seen as another shape or type is read and written as jax's own rules say."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from judge import views

BF16, U32, I8 = ml_dtypes.bfloat16, np.uint32, np.int8


def whole(*sizes):
    return tuple((0, n, 1) for n in sizes)


CHAINS = {
    "wider words": ((6, 4, 8), BF16, [("bitcast", U32)]),
    "rows of a head": (
        (5, 4, 2, 8),
        BF16,
        [("bitcast", U32), ("reshape", (20, 8)), ("index", ((3, 23, 4), (0, 8, 1)))],
    ),
    "one row": ((5, 4, 2, 8), BF16, [("bitcast", U32), ("reshape", (20, 8)), ("index", (7, (0, 8, 1)))]),
    "narrower": ((6, 8), np.float32, [("bitcast", BF16), ("index", ((4, 8, 1), (0, 8, 1)))]),
    "half of each word": ((6, 8), np.float32, [("bitcast", BF16), ("index", ((1, 13, 2), (0, 8, 1)))]),
    "and back": ((8, 8), I8, [("bitcast", U32), ("reshape", (2, 4, 2)), ("index", (1, (0, 4, 1), (0, 2, 1)))]),
}


def values(shape, dtype):
    width = np.dtype(dtype).itemsize
    raw = np.random.default_rng(1).integers(0, 128, (*shape[:-1], shape[-1] * width), np.uint8)
    return raw.view(dtype)


def bitcast(x, dtype):
    """Of the second-minor axis, as on the chip."""
    ratio = np.dtype(dtype).itemsize / x.dtype.itemsize
    *outer, rows, lanes = x.shape
    if ratio >= 1:
        words = x.reshape(*outer, int(rows / ratio), int(ratio), lanes).swapaxes(-1, -2)
        return np.ascontiguousarray(words).view(dtype).reshape(*outer, int(rows / ratio), lanes)
    parts = np.ascontiguousarray(x)[..., None].view(dtype).swapaxes(-1, -2)
    return parts.reshape(*outer, int(rows / ratio), lanes)


def seen(x, steps):
    for kind, what in steps:
        if kind == "bitcast":
            x = bitcast(x, what)
        elif kind == "reshape":
            x = x.reshape(what)
        else:
            x = x[tuple(slice(*p) if isinstance(p, tuple) else p for p in what)]
    return x


def boxed(view, x):
    return tuple(slice(start, start + count * step, step) for start, count, step in view.box)


@pytest.mark.parametrize("name", CHAINS)
def test_reads_what_the_chain_says(name):
    shape, dtype, steps = CHAINS[name]
    x = values(shape, dtype)
    view = views.view_of(shape, np.dtype(dtype), tuple(steps))
    got, want = view.read(x[boxed(view, x)]), seen(x, steps)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize("name", CHAINS)
def test_writes_that_and_nothing_else(name):
    shape, dtype, steps = CHAINS[name]
    x = values(shape, dtype)
    view = views.view_of(shape, np.dtype(dtype), tuple(steps))
    new = values(seen(x, steps).shape, view.dtype)
    y = x.copy()
    y[boxed(view, x)] = view.written(x[boxed(view, x)], new)
    assert np.ascontiguousarray(seen(y, steps)).tobytes() == np.ascontiguousarray(new).tobytes()
    changed = np.ascontiguousarray(y).view(np.uint8) != np.ascontiguousarray(x).view(np.uint8)
    assert changed.sum() <= new.nbytes


def test_the_box_is_what_is_touched():
    shape, dtype, steps = CHAINS["rows of a head"]
    assert views.view_of(shape, np.dtype(dtype), tuple(steps)).box == ((0, 5, 1), (3, 1, 1), (0, 2, 1), (0, 8, 1))


def test_what_is_no_box_has_the_smallest_around_it():
    view = views.view_of((4, 6), np.dtype(np.float32), (("reshape", (24,)), ("index", ((3, 10, 1),))))
    assert view.box == ((0, 2, 1), (0, 6, 1))
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert view.read(x[boxed(view, x)]).tolist() == list(range(3, 10))
    assert view.written(x[boxed(view, x)], np.zeros(7, np.float32)).reshape(-1).tolist() == [0, 1, 2, *[0] * 7, 10, 11]


def test_out_of_bounds_is_an_error():
    with pytest.raises(IndexError, match="out-of-bounds"):
        views.view_of((4, 6), np.dtype(np.float32), (("reshape", (24,)), ("index", ((20, 28, 1),))))


KERNEL = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from judge import views
views.patch()

def body(x_hbm, o_hbm, x, o, sem):
    copy = pltpu.make_async_copy(x_hbm, x.at[1], sem)
    copy.start()
    WAIT
    words = x.at[1].bitcast(jnp.uint32).reshape(32, 128)
    o[1] = words[pl.ds(1, 16, stride=2), :]
    out = pltpu.make_async_copy(o.at[1].bitcast(jnp.bfloat16).reshape(4, 8, 128), o_hbm, sem)
    out.start()
    out.wait()

call = pl.pallas_call(
    body, out_shape=jax.ShapeDtypeStruct((4, 8, 128), jnp.bfloat16),
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)], out_specs=pl.BlockSpec(memory_space=pl.ANY),
    scratch_shapes=[pltpu.VMEM((2, 16, 4, 128), jnp.bfloat16), pltpu.VMEM((2, 16, 128), jnp.uint32),
                    pltpu.SemaphoreType.DMA],
    interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"))
x = jax.random.normal(jax.random.key(0), (16, 4, 128)).astype(jnp.bfloat16)
got = np.asarray(call(x))
want = np.asarray(x)[:, 2:].reshape(4, 8, 128)
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
print(np.array_equal(got, want), interpreter.races.races_found)
"""


@pytest.mark.parametrize("wait, said", [("copy.wait()", "True False"), ("copy.wait", "False")])
def test_the_strict_interpreter_knows_such_references(wait, said):
    root = Path(__file__).resolve().parent.parent
    text = KERNEL.replace("WAIT", wait)
    done = subprocess.run([sys.executable, "-c", text], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said), done.stdout
