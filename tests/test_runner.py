"""judge/measure/runner.py: what is timed on a device is right there, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from judge import oracle
from judge.measure import runner
from judge.worker import load_kernel
from tests.conftest import KERNELS

SEALED = KERNELS / "scaled_add.py"


@pytest.fixture
def measured(tmp_path):
    """A function that measures a program, which knows the inputs of the published seed, on the CPU."""
    published = oracle.inputs_of(load_kernel(SEALED), oracle.TIMED_SEED, {})

    def measure(program):
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in published]
        artifact = tmp_path / "cpu"
        function = jax.jit(lambda a, x, y: program(a, x, y, published[1]))
        artifact.write_bytes(export.export(function, platforms=["cpu"])(*shapes).serialize())
        programs = {"candidate": {"default": {"artifact": str(artifact), "donated": []}}}
        request = {"programs": programs, "sealed": str(SEALED), "secret": 4711, "device": "cpu", "deep": False}
        return runner.measure(request | {"profile": str(tmp_path / "profile")})

    return measure


def test_the_right_answer(measured):
    result = measured(lambda a, x, y, known: a[0] * x + y)
    assert result["status"] == "PASS"
    samples = result["samples"]["default"]["candidate"]
    assert len(samples) == runner.TIMED_CALLS
    assert np.isfinite(samples).all()


def test_the_wrong_answer(measured):
    """As a program gives that was right where it was checked, and knows that it is elsewhere now."""
    with pytest.raises(oracle.Mismatch, match="workload default, a timed call, output 0: off by more than"):
        measured(lambda a, x, y, known: x + y)


def test_what_is_timed_is_not_published(measured):
    result = measured(lambda a, x, y, known: jnp.where(x[0, 0] == known[0, 0], y, a[0] * x + y))
    assert result["status"] == "PASS"
