"""Ragged paged attention for TPU: the file that experiments edit.

One batch holds sequences in any stage: decodes (one new token), chunked prefills and whole prefills, laid end to
end along the token axis (``cu_q_lens``), each with its own context length (``kv_lens``) and its own list of pages in a
shared KV cache (``page_indices``). The kernel writes the new keys and values into their cache slots and attends
causally to everything that the sequence has cached.

This is the plain version: one program per sequence, small tiles, the cache update finished before attention starts,
every KV block of the sequence visited by every query block. The faster ones are in the ledger.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

KERNEL_NAME = "ragged_paged_attention"
PROBLEM_DESCRIPTION = (
    "Causal attention of a ragged batch (decode, prefill, mixed) over a paged KV cache, with the new keys and values "
    "written into their slots; Llama-3-8B heads (32 query, 8 KV, head_dim 128), bfloat16."
)

# Tunables: module-level constants that a search may rewrite, each to one of the values listed.
Q_BLOCK_TOKENS = 128  # new tokens of one sequence in a query block
KV_BLOCK_PAGES = 8  # pages in one double-buffered KV block

TUNABLES = {
    "Q_BLOCK_TOKENS": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "KV_BLOCK_PAGES": (1, 2, 4, 8, 16, 32),
}

DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
LANES = 128


def _align(size, multiple):
    return -(-size // multiple) * multiple


def _split_kv(kv_vmem, slot, head):
    """Keys and values ``[bkv, D]`` of one KV head, out of a block in the cache's layout ``[bkv, rows, pack, D]``.

    A token's 32-bit words of one head lie a token's stride apart: strided loads pick them, two tokens' words at a time
    so that shifts and masks alone make packed bfloat16 rows in token order.
    """
    _, bkv, rows, pack, head_dim = kv_vmem.shape
    words = kv_vmem.bitcast(jnp.uint32).at[slot].reshape(bkv * rows, head_dim)
    if pack == 1:
        k, v = (words[pl.ds(2 * head + i, bkv, stride=rows), :] for i in (0, 1))
        return pltpu.bitcast(k, jnp.float32), pltpu.bitcast(v, jnp.float32)
    even, odd = (words[pl.ds(head + i * rows, bkv // 2, stride=2 * rows), :] for i in (0, 1))
    k = (even & jnp.uint32(0xFFFF)) | (odd << 16)
    v = (even >> 16) | (odd & jnp.uint32(0xFFFF0000))
    return pltpu.bitcast(k, kv_vmem.dtype), pltpu.bitcast(v, kv_vmem.dtype)


# --- the kernel -----------------------------------------------------------------------------------------------------


def _rpa_kernel(
    # scalars, prefetched into SMEM
    kv_lens_ref,  # i32[S]
    page_indices_ref,  # i32[S * pages_per_seq]
    cu_q_lens_ref,  # i32[S + 1]
    distribution_ref,  # i32[3]: decode_end, prefill_end, total
    # operands in HBM
    q_hbm,  # [T, Hq, D]
    new_kv_hbm,  # [T, 2 * Hkv / pack, pack, D]
    _cache_in_hbm,  # the same buffer as cache_hbm
    # results in HBM
    o_hbm,  # [T, Hq, D]
    cache_hbm,  # [P, page_size, 2 * Hkv / pack, pack, D]
    # scratch
    q_vmem,  # [bq, Hq, D]
    q_rows_vmem,  # [Hkv, bq * g, D]: the same by KV head
    o_vmem,  # [bq, Hq, D]
    kv_vmem,  # [2, bkv, 2 * Hkv / pack, pack, D]
    m_vmem,  # f32[Hkv, bq * g, 128]: running maximum of the scores, the same in every lane
    l_vmem,  # f32[Hkv, bq * g, 128]: running sum of exp(score - m)
    acc_vmem,  # f32[Hkv, bq * g, D]: running numerator
    kv_sems,  # DMA[2], one per KV buffer
    io_sem,  # DMA: queries, outputs, cache update
    *,
    sm_scale,
    mask_value,
    num_kv_heads,
):
    num_tokens = q_hbm.shape[0]
    page_size = cache_hbm.shape[1]
    pack = cache_hbm.shape[3]
    bq, num_q_heads, head_dim = q_vmem.shape
    bkv = kv_vmem.shape[1]
    pages_per_block = bkv // page_size
    group = num_q_heads // num_kv_heads
    max_num_seqs = kv_lens_ref.shape[0]
    pages_per_seq = page_indices_ref.shape[0] // max_num_seqs

    seq = pl.program_id(0)
    total = distribution_ref[2]

    def copy(src, dst, sem):
        return pltpu.make_async_copy(src, dst, sem)

    def attend_sequence():
        q_start = cu_q_lens_ref[seq]
        q_end = cu_q_lens_ref[seq + 1]
        q_len = q_end - q_start
        kv_len = kv_lens_ref[seq]
        first_page = seq * pages_per_seq

        def page_of(index):
            return page_indices_ref[first_page + index]

        # 1. Every new token's keys and values go to their slot; attention reads them back from the cache.
        def new_token_copy(token):
            position = kv_len - q_len + token
            return copy(
                new_kv_hbm.at[q_start + token],
                cache_hbm.at[page_of(position // page_size), position % page_size],
                io_sem,
            )

        @pl.loop(0, q_len)
        def _(token):
            new_token_copy(token).start()

        @pl.loop(0, q_len)
        def _(token):
            new_token_copy(token).wait()

        # 2. One query block at a time against the KV blocks that it sees.
        num_pages = pl.cdiv(kv_len, page_size)

        def for_each_page_copy(block, slot, do):
            first = block * pages_per_block

            @pl.loop(0, jnp.minimum(pages_per_block, num_pages - first))
            def _(page):
                do(
                    copy(
                        cache_hbm.at[page_of(first + page)],
                        kv_vmem.at[slot, pl.ds(page * page_size, page_size)],
                        kv_sems.at[slot],
                    )
                )

        def start_fetch(block, slot):
            for_each_page_copy(block, slot, lambda dma: dma.start())

        def wait_fetch(block, slot):
            for_each_page_copy(block, slot, lambda dma: dma.wait())

        @pl.loop(0, pl.cdiv(q_len, bq))
        def _(q_block):
            row_start = q_start + q_block * bq
            row_end = jnp.minimum(row_start + bq, q_end)
            # The last block of the array would read past its end: shift the window back and ignore the rows before.
            window = jnp.minimum(row_start, num_tokens - bq)
            num_kv_blocks = pl.cdiv(kv_len - q_end + row_end, bkv)  # the last that a query of the block sees

            fetch_q = copy(q_hbm.at[pl.ds(window, bq)], q_vmem, io_sem)
            fetch_q.start()
            start_fetch(0, 0)
            m_vmem[...] = jnp.full_like(m_vmem, mask_value)
            l_vmem[...] = jnp.zeros_like(l_vmem)
            acc_vmem[...] = jnp.zeros_like(acc_vmem)
            fetch_q.wait()
            for head in range(num_kv_heads):
                q_rows_vmem[head] = q_vmem[:, head * group : (head + 1) * group, :].reshape(bq * group, head_dim)

            @pl.loop(0, num_kv_blocks)
            def _(block):
                slot = jax.lax.rem(block, 2)

                @pl.when(block + 1 < num_kv_blocks)
                def _():
                    start_fetch(block + 1, 1 - slot)

                wait_fetch(block, slot)

                rows = jax.lax.broadcasted_iota(jnp.int32, (bq * group, bkv), 0) // group
                columns = jax.lax.broadcasted_iota(jnp.int32, (bq * group, bkv), 1) + block * bkv
                q_positions = kv_len - q_len + window - q_start + rows
                visible = columns <= q_positions
                cached = jax.lax.broadcasted_iota(jnp.int32, (bkv, head_dim), 0) + block * bkv < kv_len

                @pl.loop(0, num_kv_heads)
                def _(head):
                    q = q_rows_vmem[head]
                    k, v = _split_kv(kv_vmem, slot, head)
                    v = jnp.where(cached, v, jnp.zeros_like(v))  # slots past kv_len may hold NaN
                    scores = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
                    scores = jnp.where(visible, scores * sm_scale, mask_value)
                    m_old = m_vmem[head][:, :1]
                    m_new = jnp.maximum(m_old, jnp.max(scores, axis=1, keepdims=True))
                    p = jnp.exp(scores - m_new)
                    alpha = jnp.exp(m_old - m_new)
                    l_new = alpha * l_vmem[head][:, :1] + jnp.sum(p, axis=1, keepdims=True)
                    pv = jax.lax.dot_general(
                        p.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
                    )
                    acc_vmem[head] = alpha * acc_vmem[head] + pv
                    m_vmem[head] = jnp.broadcast_to(m_new, (bq * group, LANES))
                    l_vmem[head] = jnp.broadcast_to(l_new, (bq * group, LANES))

            for head in range(num_kv_heads):
                out = acc_vmem[head] / l_vmem[head][:, :1]
                o_vmem[:, head * group : (head + 1) * group, :] = out.reshape(bq, group, head_dim).astype(o_vmem.dtype)

            # A block that is all this sequence's own goes out whole, any other row by row.
            whole = jnp.logical_and(window == row_start, row_end - row_start == bq)

            @pl.when(whole)
            def _():
                store = copy(o_vmem, o_hbm.at[pl.ds(window, bq)], io_sem)
                store.start()
                store.wait()

            @pl.when(jnp.logical_not(whole))
            def _():
                @pl.loop(row_start, row_end)
                def _(row):
                    copy(o_vmem.at[row - window], o_hbm.at[row], io_sem).start()

                @pl.loop(row_start, row_end)
                def _(row):
                    copy(o_vmem.at[row - window], o_hbm.at[row], io_sem).wait()

    pl.when(seq < total)(attend_sequence)

    # 3. Rows past the last sequence are padding: zeros, so that the output is a function of the inputs.
    @pl.when(seq == max_num_seqs - 1)
    def _():
        o_vmem[0] = jnp.zeros_like(o_vmem[0])

        @pl.loop(cu_q_lens_ref[total], num_tokens)
        def _(row):
            zero = copy(o_vmem.at[0], o_hbm.at[row], io_sem)
            zero.start()
            zero.wait()


def ragged_paged_attention(
    queries,
    keys,
    values,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    *,
    use_causal_mask=True,
    update_kv_cache=True,
    skip_kv_mask=False,
    sm_scale=1.0,
    sliding_window=None,
    soft_cap=None,
    attention_sink=None,
    out_dtype=None,
    mask_value=None,
    q_scale=None,
    k_scale=None,
    v_scale=None,
    chunk_prefill_size=None,
    d_block_sizes=None,
    p_block_sizes=None,
    m_block_sizes=None,
    vmem_limit_bytes=None,
    debug_mode=False,
):
    """Causal attention of each sequence's new tokens to its cached and new keys and values.

    Sequence ``s`` of the first ``distribution[2]`` owns rows ``cu_q_lens[s]:cu_q_lens[s + 1]`` of ``queries``; they are
    the last ``q_len`` of its ``kv_lens[s]`` tokens, so row ``i`` sees tokens ``0 … kv_lens[s] - q_len + i``.

    Args:
      queries: ``[T, Hq, D]`` bfloat16 or float32, ``Hq`` a multiple of ``Hkv``.
      keys, values: ``[T, Hkv, D]``, the new tokens' keys and values, of the cache's dtype.
      kv_cache: ``[P, page_size, ceil(2 * Hkv / pack), pack, align(D, 128)]`` with ``pack = 32 / bits of the dtype``:
        heads interleaved k0, v0, k1, v1 … over the two middle axes. Donate it: it is updated in place.
      kv_lens: ``i32[S]``, tokens of each sequence in the cache, the new ones counted.
      page_indices: ``i32[S * pages_per_seq]``, the pages of sequence ``s`` from ``s * pages_per_seq`` on.
      cu_q_lens: ``i32[S + 1]``, running sum of the new tokens; zero-length sequences may stand anywhere.
      distribution: ``i32[3]``, (end of decodes, end of prefills, total). Entries past ``total`` are never read.
      sm_scale: factor of the scores, usually ``D ** -0.5``.
      out_dtype: dtype of the output; that of ``queries`` if None.
      mask_value: score of an invisible position; finite.
      vmem_limit_bytes: VMEM that the compiler may use; its default if None.

    Returns:
      ``(out[T, Hq, D], kv_cache)``; rows of ``out`` that belong to no sequence are zero.

    Raises:
      ValueError: an argument's shape, dtype or value does not fit; the message names it.
      NotImplementedError: a feature that this version of the kernel does not have; the message names it.
    """
    later = {
        "use_causal_mask=False": not use_causal_mask,
        "update_kv_cache=False": not update_kv_cache,
        "skip_kv_mask": skip_kv_mask,
        "sliding_window": sliding_window is not None,
        "soft_cap": soft_cap is not None,
        "attention_sink": attention_sink is not None,
        "q_scale": q_scale is not None,
        "k_scale": k_scale is not None,
        "v_scale": v_scale is not None,
        "chunk_prefill_size": chunk_prefill_size is not None,
        "d_block_sizes": d_block_sizes is not None,
        "p_block_sizes": p_block_sizes is not None,
        "m_block_sizes": m_block_sizes is not None,
        "debug_mode": debug_mode,
        f"a {kv_cache.dtype} KV cache": kv_cache.dtype not in (jnp.bfloat16, jnp.float32),
    }
    for feature, wanted in later.items():
        if wanted:
            raise NotImplementedError(f"ragged_paged_attention: {feature} is not supported yet")
    _validate(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution)

    num_tokens, num_q_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    _, page_size, kv_rows, pack, padded_dim = kv_cache.shape
    max_num_seqs = kv_lens.shape[0]
    out_dtype = queries.dtype if out_dtype is None else out_dtype
    mask_value = DEFAULT_MASK_VALUE if mask_value is None else mask_value
    if not math.isfinite(mask_value):
        raise ValueError(f"mask_value must be finite, got {mask_value}")

    pad_dim = ((0, 0), (0, 0), (0, padded_dim - head_dim))
    q = jnp.pad(queries, pad_dim).astype(kv_cache.dtype)
    new_kv = jnp.stack([jnp.pad(keys, pad_dim), jnp.pad(values, pad_dim)], axis=2)
    new_kv = new_kv.reshape(num_tokens, 2 * num_kv_heads, padded_dim)
    new_kv = jnp.pad(new_kv, ((0, 0), (0, kv_rows * pack - 2 * num_kv_heads), (0, 0)))
    new_kv = new_kv.reshape(num_tokens, kv_rows, pack, padded_dim)

    bq = min(Q_BLOCK_TOKENS, num_tokens)
    bkv = KV_BLOCK_PAGES * page_size
    group = num_q_heads // num_kv_heads
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    out, new_cache = pl.pallas_call(
        functools.partial(_rpa_kernel, sm_scale=sm_scale, mask_value=mask_value, num_kv_heads=num_kv_heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(max_num_seqs,),
            in_specs=[hbm, hbm, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[
                pltpu.VMEM((bq, num_q_heads, padded_dim), q.dtype),
                pltpu.VMEM((num_kv_heads, bq * group, padded_dim), q.dtype),
                pltpu.VMEM((bq, num_q_heads, padded_dim), out_dtype),
                pltpu.VMEM((2, bkv, kv_rows, pack, padded_dim), kv_cache.dtype),
                pltpu.VMEM((num_kv_heads, bq * group, LANES), jnp.float32),
                pltpu.VMEM((num_kv_heads, bq * group, LANES), jnp.float32),
                pltpu.VMEM((num_kv_heads, bq * group, padded_dim), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, num_q_heads, padded_dim), out_dtype),
            jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype),
        ],
        input_output_aliases={6: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        name=KERNEL_NAME,
    )(kv_lens, page_indices, cu_q_lens, distribution, q, new_kv, kv_cache)
    return out[:, :, :head_dim], new_cache


def _validate(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    def require(condition, message):
        if not condition:
            raise ValueError(f"ragged_paged_attention: {message}")

    require(queries.ndim == 3, f"queries must be [T, Hq, D], got shape {queries.shape}")
    require(keys.ndim == 3, f"keys must be [T, Hkv, D], got shape {keys.shape}")
    require(values.shape == keys.shape, f"values {values.shape} must have the shape of keys {keys.shape}")
    require(kv_cache.ndim == 5, f"kv_cache must be [P, page, rows, pack, D], got shape {kv_cache.shape}")
    num_tokens, num_q_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    require(num_tokens > 0, "queries must have at least one row")
    require(keys.shape[0] == num_tokens, f"keys have {keys.shape[0]} tokens, queries {num_tokens}")
    require(keys.shape[2] == head_dim, f"keys have head_dim {keys.shape[2]}, queries {head_dim}")
    require(
        num_kv_heads > 0 and num_q_heads % num_kv_heads == 0,
        f"{num_q_heads} query heads are not a multiple of {num_kv_heads} KV heads",
    )
    require(queries.dtype in (jnp.bfloat16, jnp.float32), f"queries must be bfloat16 or float32, got {queries.dtype}")
    for name, array in (("keys", keys), ("values", values)):
        require(array.dtype == kv_cache.dtype, f"{name} are {array.dtype}, kv_cache {kv_cache.dtype}")
    pack = 32 // (8 * kv_cache.dtype.itemsize)
    expected = (-(-2 * num_kv_heads // pack), pack, _align(head_dim, LANES))
    require(
        kv_cache.shape[2:] == expected,
        f"kv_cache {kv_cache.shape} must end in {expected} for {num_kv_heads} KV heads of {head_dim} {kv_cache.dtype}",
    )
    for name, array in (
        ("kv_lens", kv_lens),
        ("page_indices", page_indices),
        ("cu_q_lens", cu_q_lens),
        ("distribution", distribution),
    ):
        require(array.ndim == 1 and array.dtype == jnp.int32, f"{name} must be i32[n], got {array.dtype}{array.shape}")
    max_num_seqs = kv_lens.shape[0]
    require(max_num_seqs > 0, "kv_lens must have at least one entry")
    require(cu_q_lens.shape == (max_num_seqs + 1,), f"cu_q_lens must have {max_num_seqs + 1} entries")
    require(distribution.shape == (3,), f"distribution must have 3 entries, got {distribution.shape[0]}")
    require(
        page_indices.shape[0] > 0 and page_indices.shape[0] % max_num_seqs == 0,
        f"page_indices has {page_indices.shape[0]} entries, not a positive multiple of {max_num_seqs} sequences",
    )


# --- the contract: the problem this kernel is judged on. Sealed: the judge takes it from the lineage's baseline. ------

NUM_Q_HEADS = 32
NUM_KV_HEADS = 8
HEAD_DIM = 128
DTYPE = jnp.bfloat16
PACK = 2  # bfloat16 values in 32 bits
SM_SCALE = HEAD_DIM**-0.5

# name → keyword arguments of generate_inputs, compute_flops, compute_bytes and get_tiling_meta. `batch` names how the
# lengths are drawn (see _lengths), the rest are shapes: token rows, sequence slots, pages in the pool, tokens a page.
WORKLOADS = {
    "decode": {"batch": "decode", "num_tokens": 64, "num_seqs": 64, "num_pages": 4096, "page_size": 32},
    "prefill": {"batch": "prefill", "num_tokens": 8192, "num_seqs": 8, "num_pages": 512, "page_size": 32},
    "mixed": {"batch": "mixed", "num_tokens": 2048, "num_seqs": 64, "num_pages": 4096, "page_size": 32},
}
# name → what a check set changes in each workload; every shape stays, so that the artifact that is timed is checked.
CHECKS = {
    "edges": {"batch": "edges", "poison": True},
    "short": {"batch": "short", "poison": True},
    "long": {"batch": "long", "poison": True},
}
# One entry an output: bfloat16 attention against a float32 oracle; the cache must agree to the bit.
TOLERANCE = ({"rtol": 0.01, "atol": 0.004}, 0)

MAX_CONTEXT = 8192


def _lengths(*, batch, num_tokens, num_seqs, num_pages, page_size, poison=False):
    """(q_lens, kv_lens, num_decodes): tokens of each live sequence, new and in all. A pure function."""
    del poison
    rng = np.random.default_rng(5)
    if batch == "decode":
        q_lens = np.ones(num_seqs, np.int64)
        kv_lens = _contexts(rng, num_seqs)
        num_decodes = num_seqs
    elif batch == "prefill":
        q_lens = np.array([4001, 2303, 1377, 511])
        kv_lens = q_lens.copy()
        num_decodes = 0
    elif batch == "mixed":
        chunks = np.array([1024, 0, 512, 300, 100])
        q_lens = np.concatenate([np.ones(48, np.int64), chunks])
        kv_lens = np.concatenate([_contexts(rng, 48), chunks + np.array([2048, 0, 3000, 0, 777])])
        num_decodes = 48
    elif batch == "long":
        q_lens = np.array([0, min(num_tokens, 200), 0])
        kv_lens = np.array([0, MAX_CONTEXT - 3, 0])
        num_decodes = 0
    else:
        # Lengths at which kernels go wrong, or anything short, until token rows, sequence slots or pages run out.
        page = page_size
        edges = [1, 0, page, page + 1, page - 1, 2, 2 * page, 0, 3 * page + 1, 7]
        q_list, kv_list, pages = [], [], 0
        for i in range(min(num_seqs - 1, 24)):
            new = edges[i % len(edges)] if batch == "edges" else int(rng.integers(0, 40))
            old = edges[i * 3 % len(edges)] if batch == "edges" else int(rng.integers(0, 300))
            new = max(0, min(new, num_tokens // 16 + 1, num_tokens - 5 - sum(q_list)))
            pages += -(-(new + old) // page)
            if pages > num_pages:
                break
            q_list.append(new)
            kv_list.append(new + old)
        q_lens, kv_lens, num_decodes = np.array(q_list), np.array(kv_list), 0
    assert q_lens.sum() <= num_tokens and len(q_lens) <= num_seqs
    assert (-(-kv_lens // page_size)).sum() <= num_pages and kv_lens.max() <= MAX_CONTEXT
    return q_lens, kv_lens, num_decodes


def _contexts(rng, count):
    """Context lengths of decodes, log-uniform from 64 to MAX_CONTEXT: many short conversations, few long ones."""
    return np.exp(rng.uniform(math.log(64), math.log(MAX_CONTEXT), count)).astype(np.int64)


def generate_inputs(key, **workload):
    """Arguments of kernel_fn. The lengths follow from the workload; `key` draws the values and the page table.

    Entries of the metadata past the last sequence are garbage. With ``poison``, so is all that belongs to no
    sequence: padding rows, unowned pages and cache slots past ``kv_len`` are NaN.
    """
    num_tokens, num_seqs, num_pages = (workload[name] for name in ("num_tokens", "num_seqs", "num_pages"))
    page_size, poison = workload["page_size"], workload.get("poison", False)
    q_lens, kv_lens, num_decodes = _lengths(**workload)
    total = len(q_lens)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key) if typed else key, np.uint32))

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(DTYPE)

    pages_per_seq = MAX_CONTEXT // page_size
    free_pages = rng.permutation(num_pages)
    page_indices = rng.integers(2**20, 2**30, (num_seqs, pages_per_seq))
    owner_tokens = np.zeros(num_pages, np.int64)  # tokens that live in each page
    taken = 0
    for seq, kv_len in enumerate(kv_lens):
        count = -(-kv_len // page_size)
        mine = free_pages[taken : taken + count]
        taken += count
        page_indices[seq, :count] = mine
        owner_tokens[mine] = np.minimum(page_size, kv_len - page_size * np.arange(count))

    # A prime number of random pages, repeated: as good as a pool of random values, and two hundred times cheaper.
    pattern = normal(61, page_size, 2 * NUM_KV_HEADS // PACK, PACK, HEAD_DIM)
    kv_cache = np.resize(pattern, (num_pages, *pattern.shape[1:]))
    queries = normal(num_tokens, NUM_Q_HEADS, HEAD_DIM)
    keys = normal(num_tokens, NUM_KV_HEADS, HEAD_DIM)
    values = normal(num_tokens, NUM_KV_HEADS, HEAD_DIM)
    if poison:
        for page in range(num_pages):
            kv_cache[page, owner_tokens[page] :] = np.nan
        for array in (queries, keys, values):
            array[q_lens.sum() :] = np.nan

    padded_kv_lens = rng.integers(2**20, 2**30, num_seqs)
    padded_kv_lens[:total] = kv_lens
    cu_q_lens = rng.integers(2**20, 2**30, num_seqs + 1)
    cu_q_lens[: total + 1] = np.concatenate([[0], np.cumsum(q_lens)])
    metadata = (padded_kv_lens, page_indices.reshape(-1), cu_q_lens, np.array([num_decodes, num_decodes, total]))
    return (queries, keys, values, kv_cache, *(array.astype(np.int32) for array in metadata))


@functools.partial(jax.jit, donate_argnames=("kv_cache",))
def kernel_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    return ragged_paged_attention(
        queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sm_scale=SM_SCALE
    )


def reference_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """The same in float32, one sequence and one KV head at a time; the cache update is a plain assignment."""
    queries, keys, values = (np.asarray(array) for array in (queries, keys, values))
    kv_lens, page_indices, cu_q_lens = (np.asarray(array) for array in (kv_lens, page_indices, cu_q_lens))
    cache = np.array(kv_cache)
    num_pages, page_size = cache.shape[:2]
    slots = cache.reshape(num_pages * page_size, NUM_KV_HEADS, 2, HEAD_DIM)  # [token slot, head, k or v, D]
    page_indices = page_indices.reshape(len(kv_lens), -1)
    group = NUM_Q_HEADS // NUM_KV_HEADS
    out = np.zeros(queries.shape, np.float32)
    for seq in range(int(distribution[2])):
        start, end, kv_len = int(cu_q_lens[seq]), int(cu_q_lens[seq + 1]), int(kv_lens[seq])
        if start == end:
            continue
        token = np.arange(kv_len)
        slot = page_indices[seq, token // page_size].astype(np.int64) * page_size + token % page_size
        positions = token[kv_len - (end - start) :]
        slots[slot[positions], :, 0] = keys[start:end]
        slots[slot[positions], :, 1] = values[start:end]
        for head in range(NUM_KV_HEADS):
            k = slots[slot, head, 0].astype(np.float32)
            v = slots[slot, head, 1].astype(np.float32)
            q = queries[start:end, head * group : (head + 1) * group].astype(np.float32)
            scores = q.reshape(-1, HEAD_DIM) @ k.T * SM_SCALE
            visible = token <= np.repeat(positions, group)[:, None]
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[start:end, head * group : (head + 1) * group] = (weights @ v).reshape(end - start, group, HEAD_DIM)
    return out.astype(queries.dtype), cache


def compute_flops(**workload):
    """Multiply-adds of QK^T and PV over the visible (query, key) pairs, two FLOPs each."""
    q_lens, kv_lens, _ = _lengths(**workload)
    visible_pairs = (q_lens * (kv_lens - q_lens) + q_lens * (q_lens + 1) // 2).sum()
    return int(2 * 2 * HEAD_DIM * NUM_Q_HEADS * visible_pairs)


def compute_bytes(**workload):
    """HBM bytes that any kernel must move: queries in, output out, new keys and values in and into their slots, and
    the cached tokens of every sequence that has a query, once."""
    q_lens, kv_lens, _ = _lengths(**workload)
    element = jnp.dtype(DTYPE).itemsize
    query_bytes = q_lens.sum() * NUM_Q_HEADS * HEAD_DIM * element
    token_bytes = 2 * NUM_KV_HEADS * HEAD_DIM * element
    cached_tokens = np.where(q_lens > 0, kv_lens - q_lens, 0).sum()
    return int(2 * query_bytes + (2 * q_lens.sum() + cached_tokens) * token_bytes)


def get_tiling_meta(**workload):
    """What the tiles declare: for people to read, never for the verdict."""
    page_size = workload.get("page_size", 32)
    num_tokens = workload.get("num_tokens", 64)
    bq, bkv = min(Q_BLOCK_TOKENS, num_tokens), KV_BLOCK_PAGES * page_size
    rows = bq * NUM_Q_HEADS
    q_bytes = bq * NUM_Q_HEADS * HEAD_DIM * 2
    kv_bytes = bkv * 2 * NUM_KV_HEADS * HEAD_DIM * 2
    return {
        "grid": (workload.get("num_seqs", 64),),
        "buffers": [
            {"name": "q", "size_bytes": 2 * q_bytes, "double_buffered": False},
            {"name": "out", "size_bytes": q_bytes, "double_buffered": False},
            {"name": "kv", "size_bytes": kv_bytes, "double_buffered": True},
            {"name": "m, l, acc", "size_bytes": rows * (2 * LANES + HEAD_DIM) * 4, "double_buffered": False},
        ],
        "inputs": [{"name": "q", "size": num_tokens * NUM_Q_HEADS * HEAD_DIM * 2, "re_reads": 1}],
        "outputs": [{"name": "out", "size": num_tokens * NUM_Q_HEADS * HEAD_DIM * 2, "re_reads": 1}],
        "vreg_estimate_bytes": bq * NUM_Q_HEADS // NUM_KV_HEADS * bkv * 4,
    }
