"""Computes on what a copy has not brought yet, or changes what one has not taken yet."""

from tests.cheats import BOTH_STARTED, Case, whole_operands

CASES = [
    Case(
        name="waits after the computation",
        edits=(
            ("                wait_fetch(block, slot)\n\n", ""),
            (
                "                    l_vmem[head] = jnp.broadcast_to(l_new, (bq * group, LANES))\n",
                "                    l_vmem[head] = jnp.broadcast_to(l_new, (bq * group, LANES))\n\n                wait_fetch(block, slot)\n",
            ),
        ),
        status="FAIL_RACE",
        reason="touch the same memory with no wait between them",
    ),
    Case(
        name="never waits for pages",
        edits=(("                wait_fetch(block, slot)\n\n", ""),),
        status="FAIL_RACE",
        reason="workload small, check 'races'",
    ),
    Case(
        name="queries used before they came",
        edits=(
            ("            fetch_q.wait()\n", ""),
            (
                "            # A block that is all this",
                "            fetch_q.wait()\n            # A block that is all this",
            ),
        ),
        status="FAIL_RACE",
        reason="workload small, check 'races'",
    ),
    Case(
        name="cache read before it is written",
        edits=(
            (
                "        @pl.loop(0, q_len)\n        def _(token):\n            new_token_copy(token).start()\n\n        @pl.loop(0, q_len)\n        def _(token):\n            new_token_copy(token).wait()\n",
                "        @pl.loop(0, q_len)\n        def _(token):\n            new_token_copy(token).start()\n",
            ),
            (
                "            # A block that is all this",
                "            @pl.loop(0, jnp.where(q_block == 0, q_len, 0))\n            def _(token):\n                new_token_copy(token).wait()\n\n            # A block that is all this",
            ),
        ),
        status="FAIL_RACE",
        reason="workload small, check 'races'",
    ),
    Case(
        name="rows stored and not waited for",
        edits=(
            (
                "\n                @pl.loop(row_start, row_end)\n                def _(row):\n                    copy(o_vmem.at[row - window], o_hbm.at[row], io_sem).wait()\n",
                "",
            ),
        ),
        status="FAIL_RACE",
        reason="workload small, check 'races'",
    ),
    Case(
        name="waits late, but not where races are looked for",
        edits=(
            (
                "                wait_fetch(block, slot)\n\n",
                "                races = total == 3\n                pl.when(races)(lambda: wait_fetch(block, slot))\n\n",
            ),
            (
                "                    l_vmem[head] = jnp.broadcast_to(l_new, (bq * group, LANES))\n",
                "                    l_vmem[head] = jnp.broadcast_to(l_new, (bq * group, LANES))\n\n                pl.when(jnp.logical_not(races))(lambda: wait_fetch(block, slot))\n",
            ),
        ),
        status="FAIL_RACE",
        reason="workload small, timed inputs",
    ),
    Case(
        name="an output's blocks visited again",
        base="matmul",
        own_baseline=True,
        edits=(
            ("        acc_ref[...] = jnp.zeros_like(acc_ref)", "        out_ref[...] = jnp.zeros_like(out_ref)"),
            ("    acc_ref[...] += jnp.dot(", "    out_ref[...] += jnp.dot("),
            ("pl.program_id(2) == 0", "pl.program_id(0) == 0"),
            ("        out_ref[...] = acc_ref[...].astype(out_ref.dtype)\n", "        pass\n"),
            ("grid=(M // BM, N // BN, K // BK)", "grid=(K // BK, M // BM, N // BN)"),
            ("lambda i, j, k: (i, k)", "lambda k, i, j: (i, k)"),
            ("lambda i, j, k: (k, j)", "lambda k, i, j: (k, j)"),
            ("lambda i, j, k: (i, j)", "lambda k, i, j: (i, j)"),
        ),
        status="FAIL_RACE",
        reason="Revisited block",
    ),
    Case(
        name="counts on two copies to end in the order of their start",
        base="add",
        edits=whole_operands(
            BOTH_STARTED
            + """    copies[0].wait()
    x_vmem[...] = jnp.broadcast_to(a_ref[0], x_vmem.shape).astype(jnp.float32) * x_vmem[...]
    copies[1].wait()
    x_vmem[...] += y_vmem[...]
    pltpu.sync_copy(x_vmem, out_hbm)
"""
        ),
        status="FAIL_RACE",
        reason="wrong when each ends as late as it may",
    ),
]
