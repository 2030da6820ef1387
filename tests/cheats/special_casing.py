"""Recognises the published operating point and handles only that."""

from tests.cheats import Case

CASES = [
    Case(
        name="by the number of sequences",
        edits=(
            (
                "pl.when(seq < total)(attend_sequence)",
                "pl.when(jnp.logical_and(seq < total, total == 9))(attend_sequence)",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
    Case(
        name="by the first length",
        edits=(
            (
                "pl.when(seq < total)(attend_sequence)",
                "pl.when(jnp.logical_and(seq < total, kv_lens_ref[0] == 2))(attend_sequence)",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
    Case(
        name="by a page of the published seed",
        edits=(
            (
                "pl.when(seq < total)(attend_sequence)",
                "pl.when(jnp.logical_and(seq < total, page_indices_ref[0] == 11))(attend_sequence)",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
    Case(
        name="short contexts alone",
        edits=(("num_kv_blocks = pl.cdiv(kv_len, bkv)", "num_kv_blocks = jnp.minimum(pl.cdiv(kv_len, bkv), 2)"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
]
