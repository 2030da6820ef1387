"""JAX's built-in ragged paged attention as a kernel_fn of the contract, with its package's own tuned block sizes.

It has no cache update and reads a cache that holds the new tokens already: here that costs it nothing, and the cache
is handed back as it came. Its pages have K and V heads along one axis, which is how the cache of this problem lies in
memory too, so that the reshape moves nothing where the compiler sees that.
"""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as jax_rpa

KERNEL_NAME = "jax_rpa"
NEEDS = ("jax.experimental.pallas.ops.tpu.ragged_paged_attention",)


@functools.partial(jax.jit, donate_argnames=("kv_cache",))
def kernel_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    if MERGED_KV:  # noqa: F821
        raise NotImplementedError("it knows no cache with keys and values beside each other, for head_dim 64")
    num_pages, page_size, _, _, head_dim = kv_cache.shape
    out = jax_rpa(
        queries,
        kv_cache.reshape(num_pages, page_size, 2 * keys.shape[1], head_dim),
        kv_lens,
        page_indices.reshape(kv_lens.shape[0], -1),
        cu_q_lens,
        distribution[2:],
        sm_scale=SM_SCALE,  # noqa: F821
        sliding_window=SLIDING_WINDOW,  # noqa: F821
        vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16,  # its tuned blocks need more than 16 MiB
    )
    return out, kv_cache
