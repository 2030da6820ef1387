"""Counts on what was in memory before."""

from tests.cheats import Case

CASES = [
    Case(
        name="accumulators not set",
        edits=(("            acc_vmem[...] = jnp.zeros_like(acc_vmem)\n", ""),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="sum not set",
        edits=(("            l_vmem[...] = jnp.zeros_like(l_vmem)\n", ""),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="queries of the block before",
        edits=(
            ("fetch_q.start()\n", "pl.when(seq == 0)(fetch_q.start)\n"),
            ("fetch_q.wait()\n", "pl.when(seq == 0)(fetch_q.wait)\n"),
        ),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="rows never stored",
        edits=(
            (
                "@pl.loop(row_start, row_end)\n                def _(row):\n                    copy(o_vmem.at[row - window], o_hbm.at[row], io_sem).start()",
                "@pl.loop(row_start, row_start)\n                def _(row):\n                    copy(o_vmem.at[row - window], o_hbm.at[row], io_sem).start()",
            ),
            (
                "@pl.loop(row_start, row_end)\n                def _(row):\n                    copy(o_vmem.at[row - window], o_hbm.at[row], io_sem).wait()",
                "@pl.loop(row_start, row_start)\n                def _(row):\n                    copy(o_vmem.at[row - window], o_hbm.at[row], io_sem).wait()",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
]
