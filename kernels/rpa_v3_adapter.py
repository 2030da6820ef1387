"""kernel.py in the place of tpu-inference's RPA v3: its call, argument by argument.

    from kernels import rpa_v3_adapter
    rpa_v3_adapter.install()  # before the engine's attention layers are imported

Arguments, layouts and results are the production kernel's, and kernel.py documents them. What differs: zero-length
sequences may stand anywhere, int8 caches and sinks are there, and a sliding window costs no time outside of it.
"""

import importlib
import types
from typing import Any

import jax

import kernel

MODULE = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"


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


def install(module: types.ModuleType | None = None) -> None:
    """Puts this call into the module that engines take theirs from; ModuleNotFoundError where that is not there."""
    setattr(module or importlib.import_module(MODULE), ragged_paged_attention.__name__, ragged_paged_attention)
