"""kernels/rpa_v3_adapter.py: the production kernel's call, given to ours."""

import inspect
import types

import jax
import jax.numpy as jnp
import pytest

import kernel
from kernels import rpa_v3_adapter

# RPA v3's keyword arguments (tpu-inference 0.32.0).
KEYWORDS = (
    *("use_causal_mask", "update_kv_cache", "skip_kv_mask", "sm_scale", "sliding_window", "soft_cap", "out_dtype"),
    *("mask_value", "q_scale", "k_scale", "v_scale", "chunk_prefill_size", "d_block_sizes", "p_block_sizes"),
    *("m_block_sizes", "vmem_limit_bytes", "debug_mode", "disable_bounds_checks", "disable_semaphore_checks"),
)
ARRAYS = {
    "queries": jax.ShapeDtypeStruct((16, 8, 128), jnp.bfloat16),
    "keys": jax.ShapeDtypeStruct((16, 2, 128), jnp.float8_e4m3fn),
    "values": jax.ShapeDtypeStruct((16, 2, 128), jnp.float8_e4m3fn),
    "kv_cache": jax.ShapeDtypeStruct((9, 32, 1, 4, 128), jnp.float8_e4m3fn),
    "kv_lens": jax.ShapeDtypeStruct((3,), jnp.int32),
    "page_indices": jax.ShapeDtypeStruct((9,), jnp.int32),
    "cu_q_lens": jax.ShapeDtypeStruct((4,), jnp.int32),
    "distribution": jax.ShapeDtypeStruct((3,), jnp.int32),
}
OPTIONS = {
    "use_causal_mask": True,
    "update_kv_cache": True,
    "sm_scale": 0.1,
    "sliding_window": 64,
    "soft_cap": 30.0,
    "k_scale": 2.0,
    "v_scale": 0.5,
    "chunk_prefill_size": 8,
    "d_block_sizes": (1, 64, 1, 64),
    "p_block_sizes": (8, 32, 8, 32),
    "m_block_sizes": (16, 32, 8, 32),
    "vmem_limit_bytes": 32 << 20,
    "disable_semaphore_checks": False,
}


def test_every_argument_of_the_production_kernel_is_taken():
    ours = inspect.signature(kernel.ragged_paged_attention).parameters
    adapter = inspect.signature(rpa_v3_adapter.ragged_paged_attention).parameters
    assert list(adapter)[:8] == list(ours)[:8] == list(ARRAYS)
    assert set(KEYWORDS) <= set(ours) | set(adapter)


def test_a_call_as_an_engine_makes_it():
    def call(*arrays):
        return rpa_v3_adapter.ragged_paged_attention(*arrays, **OPTIONS)

    out, cache = jax.eval_shape(call, *ARRAYS.values())
    assert (out.shape, out.dtype) == ((16, 8, 128), jnp.bfloat16)
    assert (cache.shape, cache.dtype) == (ARRAYS["kv_cache"].shape, jnp.float8_e4m3fn)


@pytest.mark.parametrize(
    ("options", "checked"), [({}, False), ({"disable_bounds_checks": False}, True), ({"debug_mode": True}, True)]
)
def test_bounds_are_checked_where_that_is_asked_for(options, checked):
    traced = jax.make_jaxpr(lambda *a: rpa_v3_adapter.ragged_paged_attention(*a, **options))(*ARRAYS.values())
    (call,) = [one for one in traced.eqns if one.primitive.name == "pallas_call"]
    assert call.params["compiler_params"].disable_bounds_checks is not checked


def test_an_engine_finds_them_after_install():
    package = types.SimpleNamespace(kernel=types.ModuleType("kernel"), kernel_hd64=types.ModuleType("kernel_hd64"))
    rpa_v3_adapter.install(package)
    assert package.kernel.ragged_paged_attention is rpa_v3_adapter.ragged_paged_attention
    assert package.kernel_hd64.ragged_paged_attention_hd64 is rpa_v3_adapter.ragged_paged_attention_hd64


def test_a_call_for_head_dim_64_as_an_engine_makes_it():
    """Eight KV heads, keys and values in one row: a cache of 4 rows of two, where two rows a head would be 8."""
    heads = {name: jax.ShapeDtypeStruct((16, 8, 64), jnp.bfloat16) for name in ("keys", "values")}
    queries = jax.ShapeDtypeStruct((16, 64, 64), jnp.bfloat16)
    arrays = ARRAYS | heads | {"queries": queries, "kv_cache": jax.ShapeDtypeStruct((9, 32, 4, 2, 128), jnp.bfloat16)}
    sink = jax.ShapeDtypeStruct((64,), jnp.float32)
    sizes = {"num_kv_pages_per_block": 2, "num_queries_per_block": 8}

    def call(*arrays):
        return rpa_v3_adapter.ragged_paged_attention_hd64(*arrays, sm_scale=0.1, sliding_window=128, **sizes)

    out, cache = jax.eval_shape(call, *arrays.values(), sink)
    assert (out.shape, cache.shape) == ((16, 64, 64), (9, 32, 4, 2, 128))
    (traced,) = [
        one for one in jax.make_jaxpr(call)(*arrays.values(), sink).eqns if one.primitive.name == "pallas_call"
    ]
    assert "bf16[2,64,5,2,128]" in str(traced.params["jaxpr"])  # two KV blocks of 2 pages, a row more a token
