"""Work that a model of the chip might not count."""

from tests.cheats import Case

CASES = [
    Case(
        name="a semaphore out of balance",
        edits=(("            fetch_q.wait()\n", "            fetch_q.wait()\n            fetch_q.start()\n"),),
        status="FAIL_RACE",
        reason=", which the copy of",
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
    Case(
        # XLA transposes the lengths by a copy into another layout: the model must not take them as they were.
        name="scalars in another order than they were",
        edits=(
            ("    # scalars, prefetched into SMEM\n", "    perm_ref,\n    # scalars, prefetched into SMEM\n"),
            (
                "    seq = pl.program_id(0)\n",
                "    seq = pl.program_id(0)\n    live = perm_ref[1] == kv_lens_ref[5]\n",
            ),
            ("@pl.loop(0, num_kv_heads)", "@pl.loop(0, jnp.where(live, num_kv_heads, 0))"),
            ("    )(kv_lens, page_indices,", "    )(kv_lens.reshape(2, 5).T.reshape(-1), kv_lens, page_indices,"),
            ("num_scalar_prefetch=4", "num_scalar_prefetch=5"),
            ("input_output_aliases={6: 1}", "input_output_aliases={7: 1}"),
        ),
        status="FAIL_COMPILE",
        reason="depends on a value that no scalar input gives",
    ),
]
