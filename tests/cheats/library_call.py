"""Somebody else does the work."""

from tests.cheats import Case

IMPORTS = "import functools\n"
CALL = "    return ragged_paged_attention(\n        queries, keys"

CASES = [
    Case(
        name="the reference",
        edits=(
            (
                CALL,
                "    return reference_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution)\n"
                + CALL,
            ),
        ),
        status="FAIL_CONTRACT",
        reason="reference_fn called or passed on",
    ),
    Case(
        name="a ready-made kernel",
        edits=((IMPORTS, "from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention\n" + IMPORTS),),
        status="FAIL_CONTRACT",
        reason="import of jax.experimental.pallas.ops",
    ),
    Case(
        name="the compiler's attention",
        edits=((CALL, "    jax.nn.dot_product_attention(queries[None], keys[None], values[None])\n" + CALL),),
        status="FAIL_CONTRACT",
        reason="a ready-made kernel",
    ),
]
