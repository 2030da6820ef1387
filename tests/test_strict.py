"""judge/strict.py: whose fault it is where the strict interpreter ends before the program does."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from judge import jax_shims, pipeline, sandbox
from judge.strict import NotRun, Race, strictly

pytestmark = pytest.mark.usefixtures("on_v5e")


def test_memory_that_the_machine_does_not_have_says_nothing_about_a_program():
    program = jax.make_jaxpr(lambda x: jnp.sort(jnp.ones((1 << 42,), jnp.float32) * x))(jnp.float32(1))
    with pytest.raises(NotRun, match=r"here: XLA could not run .*RESOURCE_EXHAUSTED"):
        strictly(program, [jnp.float32(1)], "here")


def test_a_copy_out_of_bounds_is_the_programs_own_fault():
    def body(at, x, out):
        pltpu.sync_copy(x.at[pl.ds(at[0], 8)], out)

    shape = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    call = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(1,), in_specs=[pl.BlockSpec(memory_space=pl.ANY)]
        ),
    )
    jax_shims.patch_detector()
    program = jax.make_jaxpr(call)(jax.ShapeDtypeStruct((1,), jnp.int32), shape)
    with pytest.raises(Race, match=r"here: the strict interpreter stops: .*ut-of-bounds"):
        strictly(program, [jnp.array([12], jnp.int32), jnp.zeros(shape.shape)], "here")


@pytest.mark.parametrize("script, raised", [("strict.py", pipeline.CannotJudge), ("lower.py", pipeline.Failed)])
def test_the_strict_stage_may_say_that_it_cannot_judge_and_lowering_may_not(tmp_path, script, raised):
    told = json.dumps({"status": "CANNOT_JUDGE", "reason": "no memory"})
    (tmp_path / script).write_text(f"open('result.json', 'w').write({told!r})")
    process = sandbox.Process(tmp_path / script, [], folder=tmp_path)
    judging = SimpleNamespace(_is_dry=False, _work=[])
    with pytest.raises(raised):
        pipeline.Judging._finish(judging, (process, tmp_path), 60)
