"""A small kernel that follows the contract: out = a[0] * x + y, with the scalar prefetched and a grid of row blocks."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

KERNEL_NAME = "scaled_add"
PROBLEM_DESCRIPTION = "a * x + y over a matrix of float32"

ROWS, COLUMNS = 256, 128
BLOCK = 32  # rows a grid step


def body(a_ref, x_ref, y_ref, out_ref):
    a = jnp.broadcast_to(a_ref[0], x_ref.shape)
    out_ref[...] = a.astype(jnp.float32) * x_ref[...] + y_ref[...]


def kernel_fn(a, x, y):
    rows = pl.BlockSpec((BLOCK, COLUMNS), lambda i, a_ref: (i, 0))
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(ROWS // BLOCK,), in_specs=[rows, rows], out_specs=rows
        ),
    )(a, x, y)


def reference_fn(a, x, y):
    return a[0] * x + y


def generate_inputs(key):
    of_a, of_x, of_y = jax.random.split(key, 3)
    a = jax.random.randint(of_a, (1,), 2, 9, jnp.int32)
    return a, jax.random.normal(of_x, (ROWS, COLUMNS)), jax.random.normal(of_y, (ROWS, COLUMNS))


def compute_flops():
    return 2 * ROWS * COLUMNS


def get_tiling_meta():
    return {"block": (BLOCK, COLUMNS), "grid": (ROWS // BLOCK,)}
