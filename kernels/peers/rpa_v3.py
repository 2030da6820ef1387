"""vLLM's kernel (tpu-inference, RPA v3) as a kernel_fn of the contract, with the block sizes that it chooses itself.

For head_dim 64, where keys and values lie beside each other in the cache, that is its other kernel, of that layout.
Those for prefills and mixed batches are too large for the VMEM of a TPU7x; benchmarks/peers.py then sets SMALLER to 2.
benchmarks/peers.py puts it in the place of ours, on the same problem; its docstring says how to install it.
"""

import functools

import jax
from tpu_inference.kernels.ragged_paged_attention.v3.kernel import RpaCase, get_default_block_sizes
from tpu_inference.kernels.ragged_paged_attention.v3.kernel import ragged_paged_attention as rpa_v3
from tpu_inference.kernels.ragged_paged_attention.v3.kernel_hd64 import ragged_paged_attention_hd64

KERNEL_NAME = "rpa_v3"
NEEDS = (
    "tpu_inference.kernels.ragged_paged_attention.v3.kernel",
    "tpu_inference.kernels.ragged_paged_attention.v3.kernel_hd64",
)
SMALLER = 1  # what its own block sizes are divided by


def _block_sizes(queries, kv_cache, num_kv_heads, num_seqs, pages_per_seq, case):
    """Its own (bq, bkv, bq in work, bkv in work), in whole pages, divided by SMALLER."""
    page_size = kv_cache.shape[1]
    (num_tokens, num_q_heads, head_dim), kv_dtype = queries.shape, kv_cache.dtype
    heads = (num_q_heads, num_kv_heads, head_dim)
    lengths = (page_size, num_tokens, num_seqs, pages_per_seq)
    own = get_default_block_sizes(queries.dtype, kv_dtype, *heads, *lengths, case=case)
    bq, bq_in_work = (max(own[name] // SMALLER, 1) for name in ("bq_sz", "bq_csz"))
    bkv, bkv_in_work = (max(own[name] // SMALLER // page_size, 1) * page_size for name in ("bkv_sz", "bkv_csz"))
    return bq, bkv, bq_in_work, bkv_in_work


@functools.partial(jax.jit, donate_argnames=("queries", "keys", "values", "kv_cache"))
def kernel_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    arrays = (queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution)
    options = {"sm_scale": SM_SCALE, "sliding_window": SLIDING_WINDOW}  # noqa: F821
    if MERGED_KV:  # noqa: F821
        return ragged_paged_attention_hd64(*arrays, **options)
    sizes = {}
    if SMALLER > 1:
        num_seqs = kv_lens.shape[0]
        call = (queries, kv_cache, keys.shape[1], num_seqs, page_indices.shape[0] // num_seqs)
        sizes["p_block_sizes"] = _block_sizes(*call, RpaCase.PREFILL)
        sizes["m_block_sizes"] = _block_sizes(*call, RpaCase.MIXED)
    return rpa_v3(*arrays, **options, **sizes)
