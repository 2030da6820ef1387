"""Answers from memory."""

from tests.cheats import Case

CASES = [
    Case(
        name="the first answer again",
        edits=(
            (
                '@functools.partial(jax.jit, donate_argnames=("kv_cache",))',
                'ANSWERS = {}\n\n\n@functools.partial(jax.jit, donate_argnames=("kv_cache",))',
            ),
            (
                "    return ragged_paged_attention(\n        queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sm_scale=SM_SCALE\n    )",
                "    if queries.shape not in ANSWERS:\n        ANSWERS[queries.shape] = np.zeros(queries.shape, np.float32)\n    out = ragged_paged_attention(\n        queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sm_scale=SM_SCALE\n    )\n    return jnp.asarray(ANSWERS[queries.shape], DTYPE), out[1]",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
]
