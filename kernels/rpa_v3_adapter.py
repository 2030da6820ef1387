"""kernel.py in the place of tpu-inference's RPA v3: its two calls, argument by argument.

    from kernels import rpa_v3_adapter
    rpa_v3_adapter.install()  # before the engine's attention layers are imported

Arguments, layouts and results are the production kernel's, and kernel.py documents them. What differs: zero-length
sequences may stand anywhere, int8 caches and sinks are there, and a sliding window costs no time outside of it. For
head_dim 64 it has a kernel of its own, whose cache has a head's keys and values in one row: here that is `merged_kv`.
"""

import importlib
import types
from typing import Any

import jax

import kernel

PACKAGE = "tpu_inference.kernels.ragged_paged_attention.v3"


def ragged_paged_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_cache: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    *,
    debug_mode: bool = False,
    disable_bounds_checks: bool = True,
    disable_semaphore_checks: bool = True,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """RPA v3's call. `options`: what kernel.ragged_paged_attention takes by keyword, under the same names.

    The compiler has no switch for semaphores in this kernel: `disable_semaphore_checks` changes nothing.
    """
    del disable_semaphore_checks
    arrays = (queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution)
    return kernel.ragged_paged_attention(*arrays, debug_mode=debug_mode or not disable_bounds_checks, **options)


def ragged_paged_attention_hd64(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    kv_cache: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    attention_sink: jax.Array | None = None,
    *,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """RPA v3's call for head_dim 64. `options`: as above; block sizes are those of prefills, if both are given."""
    if num_kv_pages_per_block is not None and num_queries_per_block is not None:
        options["p_block_sizes"] = (num_queries_per_block, num_kv_pages_per_block * kv_cache.shape[1])
    arrays = (queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution)
    return kernel.ragged_paged_attention(*arrays, merged_kv=True, attention_sink=attention_sink, **options)


CALLS = {"kernel": ragged_paged_attention, "kernel_hd64": ragged_paged_attention_hd64}


def install(package: types.ModuleType | None = None) -> None:
    """Puts these calls where engines take theirs from; ModuleNotFoundError where those modules are not there."""
    for name, call in CALLS.items():
        module = getattr(package, name) if package else importlib.import_module(f"{PACKAGE}.{name}")
        setattr(module, call.__name__, call)
