"""Changes the problem instead of the kernel."""

from tests.cheats import Case

CASES = [
    Case(
        name="a kinder reference",
        edits=(("return out.astype(queries.dtype), cache", "return out.astype(queries.dtype) * 0, cache"),),
        status="FAIL_CONTRACT",
        reason="changes reference_fn, which the lineage's baseline seals",
    ),
    Case(
        name="says what differs",
        edits=(("return out.astype(queries.dtype), cache", "return out.astype(queries.dtype) * 0, cache"),),
        status="FAIL_CONTRACT",
        reason="+    return (out.astype(queries.dtype) * 0, cache)",
    ),
    Case(
        name="easy inputs",
        edits=(("free_pages = rng.permutation(num_pages)", "free_pages = np.arange(num_pages)"),),
        status="FAIL_CONTRACT",
        reason="changes generate_inputs, which",
    ),
    Case(
        name="more FLOPs",
        edits=(("return int(2 * 2 * HEAD_DIM", "return int(4 * 2 * HEAD_DIM"),),
        status="FAIL_CONTRACT",
        reason="changes compute_flops, which",
    ),
    Case(
        name="fewer bytes",
        edits=(("return int(2 * query_bytes", "return int(query_bytes"),),
        status="FAIL_CONTRACT",
        reason="changes compute_bytes, which",
    ),
    Case(
        name="another workload",
        edits=(('"num_tokens": 64', '"num_tokens": 32'),),
        status="FAIL_CONTRACT",
        reason="changes WORKLOADS, which",
    ),
    Case(
        name="fewer checks",
        edits=(('    "races": {"batch": "races", "poison": True, "magnitude": 64.0},\n', ""),),
        status="FAIL_CONTRACT",
        reason="changes CHECKS, which",
    ),
    Case(
        name="loose tolerance",
        edits=(('{"rtol": 0.01, "atol": 0.004}', '{"rtol": 1.0, "atol": 1.0}'),),
        status="FAIL_CONTRACT",
        reason="changes TOLERANCE, which",
    ),
    Case(
        name="a second definition",
        edits=(("\ndef get_tiling_meta", "\nreference_fn = kernel_fn\n\n\ndef get_tiling_meta"),),
        status="FAIL_CONTRACT",
        reason="changes reference_fn, which",
    ),
    Case(
        name="helpers of the oracle do not matter",
        edits=(("rng.uniform(math.log(64)", "rng.uniform(math.log(16)"), ("pl.loop(0, num_kv_heads)", "pl.loop(0, 1)")),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
]
