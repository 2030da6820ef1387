"""Changes its inputs."""

from tests.cheats import Case

CASES = [
    Case(
        name="writes into the queries",
        edits=(
            (
                "            # A block that is all this",
                "            spoil = copy(o_vmem.at[0], q_hbm.at[num_tokens - 1], io_sem)\n            spoil.start()\n            spoil.wait()\n\n            # A block that is all this",
            ),
            (
                "        o_vmem[0] = jnp.zeros_like(o_vmem[0])\n",
                "        o_vmem[0] = jnp.zeros_like(o_vmem[0])\n        back = copy(q_hbm.at[num_tokens - 1], o_hbm.at[num_tokens - 1], io_sem)\n        back.start()\n        back.wait()\n",
            ),
            ("@pl.loop(cu_q_lens_ref[total], num_tokens)", "@pl.loop(cu_q_lens_ref[total], num_tokens - 1)"),
        ),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="writes into pages of others",
        edits=(
            (
                "cache_hbm.at[page_of(position // page_size), position % page_size],\n                io_sem,",
                "cache_hbm.at[page_of(position // page_size) ^ 1, position % page_size],\n                io_sem,",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
]
