"""A matrix product that follows the contract: blocks of rows and columns, the contracted axis in the grid."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

KERNEL_NAME = "matmul"
PROBLEM_DESCRIPTION = "a @ b, float32"

M, K, N = 256, 256, 256
BM, BK, BN = 128, 128, 128
DTYPE = jnp.float32


def body(a_ref, b_ref, out_ref, acc_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def kernel_fn(a, b):
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((M, N), DTYPE),
        grid=(M // BM, N // BN, K // BK),
        in_specs=[pl.BlockSpec((BM, BK), lambda i, j, k: (i, k)), pl.BlockSpec((BK, BN), lambda i, j, k: (k, j))],
        out_specs=pl.BlockSpec((BM, BN), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((BM, BN), jnp.float32)],
    )(a, b)


def reference_fn(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(DTYPE)


def generate_inputs(key):
    of_a, of_b = jax.random.split(key)
    return jax.random.normal(of_a, (M, K), DTYPE), jax.random.normal(of_b, (K, N), DTYPE)


def compute_flops():
    return 2 * M * K * N


def get_tiling_meta():
    return {"block": (BM, BK, BN)}
