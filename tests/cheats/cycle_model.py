"""Work that a model of the chip might not count."""

from tests.cheats import Case

CASES = [
    Case(
        name="a semaphore out of balance",
        edits=(("            fetch_q.wait()\n", "            fetch_q.wait()\n            fetch_q.start()\n"),),
        status="FAIL_RACE",
        reason="reads what the copy of",
    ),
    Case(
        # The CPU clamps the index, the schedule's model would read what lies behind the lengths: no head to attend to.
        name="scalars from behind an array, but not where the strict interpreter looks",
        edits=(
            (
                "    seq = pl.program_id(0)\n",
                "    seq = pl.program_id(0)\n    far = jnp.where(distribution_ref[2] == 3, 0, 128)\n    live = jnp.logical_or(distribution_ref[2] == 3, kv_lens_ref[far] > 1000)\n",
            ),
            ("@pl.loop(0, num_kv_heads)", "@pl.loop(0, jnp.where(live, num_kv_heads, 0))"),
        ),
        status="FAIL_RACE",
        reason="goes out of bounds: element 128 of an axis of 10",
    ),
    Case(
        name="scalars that nobody has written",
        base="add",
        edits=(
            (
                "def body(a_ref, x_ref, y_ref, out_ref):\n",
                "def body(a_ref, x_ref, y_ref, out_ref, s_ref):\n    pl.when(s_ref[0] < -5)(lambda: work(a_ref, x_ref, y_ref, out_ref))\n\n\ndef work(a_ref, x_ref, y_ref, out_ref):\n",
            ),
            ("out_specs=rows\n", "out_specs=rows, scratch_shapes=[pltpu.SMEM((1,), jnp.int32)]\n"),
        ),
        status="FAIL_RACE",
        reason="workload default",
    ),
]
