"""JAX's built-in ragged paged attention as a kernel_fn of the contract, with the block sizes that it chooses itself.

Where its package has none for a problem it takes 128 pages, however large they are; here they are MOST_TOKENS at most.
It has no cache update and reads a cache that holds the new tokens already: here that costs it nothing, and the cache
is handed back as it came. Its pages have K and V heads along one axis, which is how the cache of this problem lies in
memory too, so that the reshape moves nothing where the compiler sees that.
"""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import get_tuned_block_sizes
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as jax_rpa

KERNEL_NAME = "jax_rpa"
NEEDS = ("jax.experimental.pallas.ops.tpu.ragged_paged_attention",)
# Of a KV block. With 4,096 a decode of 8k takes 13 to 17 % longer and its compilation 5 min, with 8,192 more than 20.
MOST_TOKENS = 2048


@functools.partial(jax.jit, donate_argnames=("kv_cache",))
def kernel_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    if MERGED_KV:  # noqa: F821
        raise NotImplementedError("it knows no cache with keys and values beside each other, for head_dim 64")
    num_pages, page_size, _, _, head_dim = kv_cache.shape
    (num_tokens, num_q_heads, _), num_kv_heads = queries.shape, keys.shape[1]
    page_indices = page_indices.reshape(kv_lens.shape[0], -1)
    lengths = page_size, num_tokens, page_indices.shape[1]
    kv_pages, q_tokens = get_tuned_block_sizes(
        queries.dtype, kv_cache.dtype, num_q_heads, num_kv_heads, head_dim, *lengths
    )
    scale = None if kv_cache.dtype == queries.dtype else 1.0  # with one, it converts what it reads
    out = jax_rpa(
        queries,
        kv_cache.reshape(num_pages, page_size, 2 * num_kv_heads, head_dim),
        kv_lens,
        page_indices,
        cu_q_lens,
        distribution[2:],
        sm_scale=SM_SCALE,  # noqa: F821
        sliding_window=SLIDING_WINDOW,  # noqa: F821
        k_scale=scale,
        v_scale=scale,
        num_kv_pages_per_block=min(kv_pages, MOST_TOKENS // page_size),
        num_queries_per_block=q_tokens,
        vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16,  # its tuned blocks need more than 16 MiB
    )
    return out, kv_cache
