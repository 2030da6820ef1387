"""JAX's built-in ragged paged attention as a kernel_fn of the contract, with the block sizes of its package.

It has no cache update and reads a cache that holds the new tokens already: here that costs it nothing, and the cache
is handed back as it came. Its pages have K and V heads along one axis, which is how the cache of this problem lies in
memory too, so that the reshape moves nothing where the compiler sees that.
"""

import functools
import math

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as jax_rpa
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import tuned_block_sizes

KERNEL_NAME = "jax_rpa"
NEEDS = ("jax.experimental.pallas.ops.tpu.ragged_paged_attention",)
# Of a KV block. With 4,096 a decode of 8k takes 13 to 17 % longer and its compilation 5 min, with 8,192 more than 20.
MOST_TOKENS = 2048


def _block_sizes(queries, kv_cache, num_kv_heads, pages_per_seq):
    """(KV pages, new tokens) a block: what the package chooses where its table has the problem.

    For any other, contexts of more than 4,096 tokens among them, the package takes 128 pages and 32 new tokens. Here
    such a KV block has MOST_TOKENS at most, and the new tokens are those tuned for the nearest problem, v6e's for
    TPU7x: a prefill of 8k on v6e takes 5.01 ms with those 64, 7.03 with 32.
    """
    (num_tokens, num_q_heads, head_dim), page_size = queries.shape, kv_cache.shape[1]
    of_heads = queries.dtype, kv_cache.dtype, num_q_heads, num_kv_heads, head_dim
    pages, _ = tuned_block_sizes.get_tuned_block_sizes(*of_heads, page_size, num_tokens, pages_per_seq)
    tables = tuned_block_sizes.TUNED_BLOCK_SIZES
    table = tables.get(tuned_block_sizes.get_device_name(), tables["TPU v6"])
    ours = num_kv_heads, num_q_heads, page_size, num_tokens, page_size * pages_per_seq

    def distance(key):
        _, _, q_heads, kv_heads, _, *lengths = key
        return [abs(math.log2(theirs / one)) for theirs, one in zip((kv_heads, q_heads, *lengths), ours, strict=True)]

    _, new_tokens = table[min(table, key=distance)]
    return min(pages, MOST_TOKENS // page_size), min(new_tokens, num_tokens)


@functools.partial(jax.jit, donate_argnames=("kv_cache",))
def kernel_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    if MERGED_KV:  # noqa: F821
        raise NotImplementedError("it knows no cache with keys and values beside each other, for head_dim 64")
    num_pages, page_size, _, _, head_dim = kv_cache.shape
    num_kv_heads = keys.shape[1]
    page_indices = page_indices.reshape(kv_lens.shape[0], -1)
    kv_pages, new_tokens = _block_sizes(queries, kv_cache, num_kv_heads, page_indices.shape[1])
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
        num_kv_pages_per_block=kv_pages,
        num_queries_per_block=new_tokens,
        vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 15 // 16,  # its tuned blocks need more than 16 MiB
    )
    return out, kv_cache
