"""Counts on what was in memory before."""

from tests.cheats import Case, whole_operands

# y goes to the output, which is x's memory, before x is read: y twice on a chip.
OVERWRITTEN = """def body(a_ref, x_hbm, y_hbm, out_hbm, x_vmem, y_vmem, sem):
    pltpu.sync_copy(y_hbm, y_vmem)
    pltpu.sync_copy(y_vmem, out_hbm)
    pltpu.sync_copy(x_hbm, x_vmem)
    x_vmem[...] = jnp.broadcast_to(a_ref[0], x_vmem.shape).astype(jnp.float32) * x_vmem[...] + y_vmem[...]
    pltpu.sync_copy(x_vmem, out_hbm)
"""
ALIAS = "        input_output_aliases={1: 0},\n"

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
    Case(
        name="an operand that the output has overwritten",
        base="add",
        edits=whole_operands(OVERWRITTEN, ALIAS),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
]
