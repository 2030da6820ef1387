"""What a float32 product gives on the chip, in the program that the CPU checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import jaxpr_as_fun

from judge import jax_shims

HIGHEST = jax.lax.Precision.HIGHEST
A, B = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)


def rounded(array):
    return array.astype(jnp.bfloat16).astype(np.float32)


def as_checked(function, *inputs):
    jax_shims.patch_interpreter()
    traced = jax.make_jaxpr(function)(*inputs)
    rounds = jax_shims.rounds_operands(traced)
    (result,) = jaxpr_as_fun(jax_shims.interpreted(jax_shims.rounding_operands(traced)))(*inputs)
    return rounds, np.asarray(result)


def in_kernel(a, b, **options):
    def body(a_ref, b_ref, out_ref):
        @pl.loop(0, 1)
        def _(_):
            out_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32, **options)

    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((64, 64), jnp.float32))(a, b)


def beside_kernels(a, b, **options):
    return jax.lax.cond(a[0, 0] > -1e9, lambda: jnp.dot(a, b, **options), lambda: jnp.zeros((64, 64)))


def scanned(a, b, **options):
    return jax.lax.scan(lambda carry, _: (jnp.dot(a, b, **options), None), jnp.zeros((64, 64)), None, length=1)[0]


@pytest.mark.parametrize("product", [in_kernel, beside_kernels, scanned])
@pytest.mark.parametrize(
    ("options", "is_rounded"),
    [
        ({}, True),
        ({"precision": jax.lax.Precision.DEFAULT}, True),
        ({"precision": (HIGHEST, jax.lax.Precision.DEFAULT)}, True),
        ({"precision": HIGHEST}, False),
    ],
)
def test_a_product_at_default_precision_has_bfloat16_operands(product, options, is_rounded):
    rounds, result = as_checked(lambda a, b: product(a, b, **options), A, B)
    want = rounded(A) @ rounded(B) if is_rounded else A @ B
    assert rounds == is_rounded
    np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-4)
    assert np.abs(rounded(A) @ rounded(B) - A @ B).max() > 0.05


def test_bfloat16_operands_stay_as_they_are():
    a, b = A.astype(jnp.bfloat16), B.astype(jnp.bfloat16)
    rounds, result = as_checked(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32), a, b)
    assert not rounds
    np.testing.assert_allclose(result, rounded(A) @ rounded(B), rtol=1e-5, atol=1e-4)


def test_of_mixed_operands_the_float32_one_is_rounded():
    rounds, result = as_checked(
        lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.float32), A, B.astype(jnp.bfloat16)
    )
    assert rounds
    np.testing.assert_allclose(result, rounded(A) @ rounded(B), rtol=1e-5, atol=1e-4)


def test_a_convolution_is_a_product():
    image, window = A.reshape(1, 1, 64, 64), B[:3, :3].reshape(1, 1, 3, 3)
    rounds, result = as_checked(lambda i, w: jax.lax.conv(i, w, (1, 1), "VALID"), image, window)
    want = jax.lax.conv(rounded(image), rounded(window), (1, 1), "VALID")
    assert rounds
    np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-4)
