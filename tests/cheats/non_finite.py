"""NaN or infinity where the oracle has a number."""

from tests.cheats import Case

CASES = [
    Case(
        name="all NaN",
        edits=(("out = acc_vmem[head] / l_vmem[head][:, :1]", "out = acc_vmem[head] * jnp.nan"),),
        status="FAIL_CORRECTNESS",
        reason="not finite where the oracle is",
    ),
    Case(
        name="infinite padding rows",
        edits=(("o_vmem[0] = jnp.zeros_like(o_vmem[0])", "o_vmem[0] = jnp.full_like(o_vmem[0], jnp.inf)"),),
        status="FAIL_CORRECTNESS",
        reason="not finite where the oracle is",
    ),
    Case(
        name="cache changed beyond the new slots",
        edits=(
            (
                "cache_hbm.at[page_of(position // page_size), position % page_size]",
                "cache_hbm.at[page_of(position // page_size), (position + 1) % page_size]",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
]
