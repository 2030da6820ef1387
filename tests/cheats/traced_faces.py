"""What only the traced program shows: two faces, callbacks, knowledge and work that are not its own."""

from tests.cheats import Case

CASES = [
    Case(
        name="platform dependent",
        edits=(
            (
                "    return ragged_paged_attention(\n        queries, keys",
                "    queries = jax.lax.platform_dependent(queries, tpu=lambda x: x, default=lambda x: x + 0)\n    return ragged_paged_attention(\n        queries, keys",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="kernel_fn uses platform_index",
    ),
    Case(
        name="interpreted on the chip",
        edits=(("        name=KERNEL_NAME,\n", "        name=KERNEL_NAME,\n        interpret=True,\n"),),
        status="FAIL_CONTRACT",
        reason="a pallas_call with interpret set",
    ),
    Case(
        name="constants baked in",
        edits=(
            (
                "    return ragged_paged_attention(\n        queries, keys",
                "    queries = queries + 0 * jnp.asarray(np.random.default_rng(0).standard_normal((1 << 19,)), DTYPE)[0]\n    return ragged_paged_attention(\n        queries, keys",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="bytes of constants are baked in",
    ),
    Case(
        name="inputs of the published seed baked in",
        edits=(
            (
                '@functools.partial(jax.jit, donate_argnames=("kv_cache",))',
                'BAKED = np.asarray(generate_inputs(jax.random.key(0), **WORKLOADS["small"])[0])\n\n\n@functools.partial(jax.jit, donate_argnames=("kv_cache",))',
            ),
            (
                "    return ragged_paged_attention(\n        queries, keys",
                "    queries = jnp.asarray(BAKED)\n    return ragged_paged_attention(\n        queries, keys",
            ),
        ),
        status="FAIL_CORRECTNESS",
        reason="output 0",
    ),
    Case(
        name="no kernel at all",
        edits=(
            (
                "    return ragged_paged_attention(\n        queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sm_scale=SM_SCALE\n    )",
                "    return queries, kv_cache",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="kernel_fn has no Pallas kernel",
    ),
    Case(
        name="the work beside the kernel",
        edits=(
            (
                "    return ragged_paged_attention(\n        queries, keys",
                "    scores = jnp.einsum('thd,shd->hts', jnp.tile(queries, (8, 1, 1)), jnp.tile(queries, (8, 1, 1)))\n    queries = queries + 0 * jnp.sum(scores).astype(DTYPE)\n    return ragged_paged_attention(\n        queries, keys",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="matrix products beside the Pallas kernel",
    ),
    Case(
        name="a kernel that nothing depends on",
        base="add",
        own_baseline=True,
        edits=(
            (
                "def kernel_fn(a, x, y):",
                "def kernel_fn(a, x, y):\n    unused(a, x, y)\n    return x + y\n\n\ndef unused(a, x, y):",
            ),
            ("    return a[0] * x + y", "    return x + y"),
        ),
        status="FAIL_CONTRACT",
        reason="the compiled program has no Pallas kernel",
    ),
    Case(
        name="the work beside the kernel, as a convolution",
        edits=(
            (
                "    return ragged_paged_attention(\n        queries, keys",
                "    rows = jnp.tile(queries, (8, 1, 1)).reshape(1, -1, 128)\n    scores = jax.lax.conv_general_dilated(rows, rows.reshape(1, -1, 128).transpose(0, 2, 1), (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC'))\n    queries = queries + 0 * jnp.sum(scores).astype(DTYPE)\n    return ragged_paged_attention(\n        queries, keys",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="matrix products beside the Pallas kernel",
    ),
    Case(
        name="compiler flags of its own",
        base="add",
        own_baseline=True,
        edits=(
            (
                "    )(a, x, y)",
                '        compiler_params=pltpu.CompilerParams(flags={"xla_tpu_any": True}),\n    )(a, x, y)',
            ),
        ),
        status="FAIL_CONTRACT",
        reason="compiler flags of its own",
    ),
    Case(
        name="a kernel of another kind, which nothing follows",
        base="add",
        own_baseline=True,
        edits=(
            ("import jax\n", "import functools\n\nimport jax\n"),
            (
                "    rows = pl.BlockSpec((BLOCK, COLUMNS), lambda i, a_ref: (i, 0))\n    return pl.pallas_call(\n",
                """    @functools.partial(
        pl.kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        mesh=pltpu.create_tensorcore_mesh("core", num_cores=1),
        scratch_types=[pltpu.VMEM(x.shape, x.dtype)],
    )
    def copied(x_hbm, out_hbm, x_vmem):
        pltpu.sync_copy(x_hbm, x_vmem)
        pltpu.sync_copy(x_vmem, out_hbm)

    x = copied(x)
    rows = pl.BlockSpec((BLOCK, COLUMNS), lambda i, a_ref: (i, 0))
    return pl.pallas_call(
""",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="pl.pallas_call is the one kind of kernel that is judged",
    ),
    Case(
        name="approximate on the chip alone",
        edits=(
            (
                "    return ragged_paged_attention(\n        queries, keys",
                "    best = jax.lax.approx_max_k(queries.astype(jnp.float32).reshape(-1), 2, recall_target=0.1)[0]\n    queries = queries + 0 * jnp.sum(best).astype(DTYPE)\n    return ragged_paged_attention(\n        queries, keys",
            ),
        ),
        status="FAIL_CONTRACT",
        reason="kernel_fn uses approx_top_k",
    ),
]
