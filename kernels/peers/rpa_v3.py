"""vLLM's kernel (tpu-inference, RPA v3) as a kernel_fn of the contract, with the block sizes that it chooses itself.

benchmarks/peers.py puts it in the place of ours, on the same problem; its docstring says how to install it.
"""

import functools

import jax
from tpu_inference.kernels.ragged_paged_attention.v3.kernel import ragged_paged_attention as rpa_v3

KERNEL_NAME = "rpa_v3"
NEEDS = ("tpu_inference.kernels.ragged_paged_attention.v3.kernel",)


@functools.partial(jax.jit, donate_argnames=("queries", "keys", "values", "kv_cache"))
def kernel_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    return rpa_v3(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sm_scale=SM_SCALE)  # noqa: F821
