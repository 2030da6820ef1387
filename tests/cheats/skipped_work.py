"""Leaves out work that the timed inputs do not show, or that nobody looks at."""

from tests.cheats import Case

CASES = [
    Case(
        name="head 0 alone",
        edits=(("@pl.loop(0, num_kv_heads)", "@pl.loop(0, 1)"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="the first KV block alone",
        edits=(("num_kv_blocks = pl.cdiv(kv_len, bkv)", "num_kv_blocks = 1"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="not the last KV block",
        edits=(("num_kv_blocks = pl.cdiv(kv_len, bkv)", "num_kv_blocks = jnp.maximum(pl.cdiv(kv_len, bkv) - 1, 1)"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="the diagonal masked",
        edits=(("visible = columns <= q_positions", "visible = columns < q_positions"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="no causal mask",
        edits=(("visible = columns <= q_positions", "visible = columns < kv_len"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="padding rows left",
        edits=(("@pl.loop(cu_q_lens_ref[total], num_tokens)", "@pl.loop(num_tokens, num_tokens)"),),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="cache not written",
        edits=(
            (
                "        @pl.loop(0, q_len)\n        def _(token):\n            new_token_copy(token).start()\n\n        @pl.loop(0, q_len)\n        def _(token):\n            new_token_copy(token).wait()\n",
                "",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
    Case(
        name="one new token cached",
        edits=(
            (
                "        @pl.loop(0, q_len)\n        def _(token):\n            new_token_copy(token).start()\n\n        @pl.loop(0, q_len)\n        def _(token):\n            new_token_copy(token).wait()\n",
                "        @pl.loop(0, jnp.minimum(q_len, 1))\n        def _(token):\n            new_token_copy(token).start()\n\n        @pl.loop(0, jnp.minimum(q_len, 1))\n        def _(token):\n            new_token_copy(token).wait()\n",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
    Case(
        name="slots past the end not masked",
        edits=(("v = jnp.where(cached, v, jnp.zeros_like(v))", "v = v +  jnp.zeros_like(v)"),),
        status="FAIL_CORRECTNESS",
        reason="not finite where the oracle is",
    ),
    Case(
        name="always the first page",
        edits=(("return page_indices_ref[first_page + index]", "return page_indices_ref[first_page + 0 * index]"),),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
    Case(
        name="pages in order",
        edits=(("return page_indices_ref[first_page + index]", "return page_indices_ref[first_page] + index"),),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
    Case(
        name="not the last sequence",
        edits=(("pl.when(seq < total)(attend_sequence)", "pl.when(seq < total - 1)(attend_sequence)"),),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
    Case(
        name="page edge lost",
        edits=(("num_pages = pl.cdiv(kv_len, page_size)", "num_pages = kv_len // page_size"),),
        status="FAIL_CORRECTNESS",
        reason="output",
    ),
]
