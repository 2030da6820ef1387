"""Ragged paged attention for TPU: the file that experiments edit.

One batch holds sequences in any stage: decodes (one new token), chunked prefills and whole prefills, laid end to
end along the token axis (``cu_q_lens``), each with its own context length (``kv_lens``) and its own list of pages in a
shared KV cache (``page_indices``). The kernel writes the new keys and values into their cache slots and attends
causally to everything that the sequence has cached, or to a window of it.

Decodes are a stream of KV blocks, fetched ahead across sequences, whose keys meet the queries in the order in which
they lie in memory; one part of a block is scored while the one before it, perhaps of another sequence, is weighed.
Prefills go a block of queries at a time, with two or three KV heads in work at once; scores lie in
rows or stand in columns, as the chip's MXU is wide. Decodes wait for HBM and prefills for the MXU, so blocks of both
take turns while there are both.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

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
Q_BLOCK_TOKENS = 128  # new tokens of one sequence in a query block; doubled from v6e on up to MAX_ROWS, BLOCK_SCORES
KV_BLOCK_PAGES = 16  # pages of 32 tokens, or as many tokens, in a segment of a prefill's; from v6e on twice if D > 128
DECODE_BLOCK_PAGES = 16  # the same of a decode with 4 KiB a token, else as many bytes; see _decode_block_tokens
MAX_ROWS = 1024  # queries of a KV head that a query block of twice as many tokens may have
MAX_VALUES = 2**20  # of all queries in a query block before v6e, if a KV head has some tiles of them: more is slower
SOFTMAX_ROWS = 64  # rows of scores that become weights at a time
TILE_COLUMNS = 256  # the same of columns, where scores stand on their side
BLOCK_SCORES = 2**22  # scores in a basic block, where they do: the compiler takes four times as long for twice as many
CHUNK_WORDS = 512  # 32-bit words of a KV block whose keys meet a decode's queries at a time
WORDS_BESIDE = 4  # words of a decode's token whose heads meet the queries at once, where keys and values are merged
PAGES_TOGETHER = 4  # pages whose copies one turn of a loop starts
WINDOW_PAGE_TOKENS = 64  # pages that are larger are fetched in parts of so many by a decode with a window
PIECE_TOKENS = 8  # a decode's last page is fetched in whole pieces of so many tokens
PART_WORDS = 8192  # 128-lane words of a decode's KV block at a time: fewer take as long, more may be in vain
STEP_WORDS = 2048  # of such words in a part that is masked, as many steps of so many are in work as need be
STEPS = 4  # of a part at most: there is a body for each number of them to score, with each to weigh
DECODES_BESIDE = 2  # KV blocks of decodes that go with one of a prefill
VMEM_BYTES = 96 * 2**20  # that the kernel may have if nothing is said and the chip has as much
COMPILERS_OWN_BYTES = 3 * 2**18  # of VMEM, beside the kernel's buffers: registers that it spills, sinks
DECODE_BUFFERS = 5  # KV blocks of decodes in VMEM, or one less: two in work, the others on their way
SEGMENTS_OF_ROWS = 2  # segments of prefills' KV blocks, those of all KV heads counted, that are worth having in work
SEGMENTS_OF_COLUMNS = 8  # the same where scores stand on their side
DECODE_RESULTS = 4  # decodes whose output and new token are on their way

TUNABLES = {
    "Q_BLOCK_TOKENS": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "KV_BLOCK_PAGES": (1, 2, 4, 8, 16, 32),
    "DECODE_BLOCK_PAGES": (8, 16, 32, 64),
}

DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
CACHE_DTYPES = (jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
CACHE_NAMES = ", ".join(jnp.dtype(dtype).name for dtype in CACHE_DTYPES)
LANES = 128
LOG2_E = math.log2(math.e)


def _align(size, multiple):
    return -(-size // multiple) * multiple


def _odd(rows):
    """As many rows, and one more if that is odd: loads at an even stride of 8 or more collide in the banks of VMEM,
    and the compiler takes 2 to 8 of them for one."""
    return rows | 1


def _row_of_tokens(kv, row, count):
    """One row, a head's keys or its values or both, of the first `count` tokens of a block in the cache's layout
    ``[bkv, rows, pack, D]``: ``[count, D]``.

    A token's 32-bit words of one row lie a token's stride apart: strided loads pick them, two tokens' words at a time
    so that shifts and masks alone make packed bfloat16 rows in token order.
    """
    _, rows, pack, head_dim = kv.shape
    fold = head_dim // LANES
    words = _words(kv)
    word, part = divmod(row, pack)
    tiles = []
    for tile in range(fold):
        first, step = word * fold + tile, rows * fold
        if pack == 2:
            even, odd = (words[pl.ds(first + i * step, count // 2, stride=2 * step), :] for i in (0, 1))
            tiles.append((_odd_parts if part else _even_parts)(even, odd))
            continue
        of_word = words[pl.ds(first, count, stride=step), :]
        if pack == 4:
            of_word = pltpu.bitcast((of_word >> 8 * part).astype(jnp.uint8), jnp.uint32)
        tiles.append(of_word)
    words = jnp.concatenate(tiles, axis=1)
    return pltpu.bitcast(words, kv.dtype)


def _compute_dtype(kv_dtype):
    """What meets keys and values in the MXU: bfloat16 if they have 8 bits, whose values it has as well."""
    return jnp.dtype(jnp.bfloat16) if kv_dtype.itemsize == 1 else kv_dtype


def _for_lhs(rows):
    """Rows as the MXU takes them beside bfloat16 on the left, where 8-bit ones are bfloat16; it has all their values.

    Before TPU7x the chips have float8_e4m3b11fnuz and not float8_e4m3fn, for which the compiler has twice as many
    instructions as this: values are a sixteenth there, and -0 has the bits of its only NaN. A NaN becomes 480, as it
    does on the right.
    """
    if rows.dtype.itemsize > 1:
        return rows
    if rows.dtype != jnp.float8_e4m3fn or _generation() >= 7:
        return rows.astype(jnp.bfloat16)
    words, sevens = pltpu.bitcast(rows, jnp.uint32), jnp.uint32(0x7F7F7F7F)
    words &= (words & sevens) + sevens | sevens
    return pltpu.bitcast(words, jnp.float8_e4m3b11fnuz).astype(jnp.bfloat16) * jnp.bfloat16(16.0)


def _lane_tiles(width):
    return [pl.ds(i, LANES) for i in range(0, width, LANES)]


def _interleave(call, k, v, num_tokens, words):
    """New keys and values in the cache's layout: `words` ``u32[D / 128, n * odd, 128]``.

    `k`, `v`: ``u32[n * …, 128]`` for each tile of lanes, tokens' words one after the other. If joined `k` is one array,
    with the cache's words of a token, a row's tiles one after the other.
    """
    rows, itemsize = call.cache_hbm.shape[2], call.cache_hbm.dtype.itemsize
    if call.joined:
        for tile in range(words.shape[0]):
            for row in range(rows):
                of_row = pl.ds(row * words.shape[0] + tile, num_tokens, stride=k.shape[0] // num_tokens)
                words.at[tile][pl.ds(row, num_tokens, stride=words.shape[1] // num_tokens), :] = k[of_row, :]
        return
    for tile, both in enumerate(zip(k, v, strict=True)):

        def of(is_value, word, both=both):
            ref = both[is_value]
            return ref[pl.ds(word, num_tokens, stride=ref.shape[0] // num_tokens), :]

        def store(row, value, tile=tile):
            words.at[tile][pl.ds(row, num_tokens, stride=words.shape[1] // num_tokens), :] = value

        if itemsize == 4:
            for row in range(2 * call.num_kv_heads):
                store(row, of(row % 2, row // 2))
            continue
        if itemsize == 1:
            for row in range(rows):
                k4, v4 = of(0, row // 2), of(1, row // 2)
                low, high = 16 * (row % 2), 16 * (row % 2) + 8
                parts = [(k4 >> low) & 0xFF, ((v4 >> low) & 0xFF) << 8]
                parts += [((k4 >> high) & 0xFF) << 16, (v4 >> high) << 24]
                store(row, functools.reduce(jnp.bitwise_or, parts))
            continue
        for pair in range(-(-call.num_kv_heads // 2)):
            k2, v2 = of(0, pair), of(1, pair)
            store(2 * pair, _even_parts(k2, v2))
            if 2 * pair + 1 < call.num_kv_heads:
                store(2 * pair + 1, _odd_parts(k2, v2))


def _flat(tokens):
    """Words ``u32[n * …, 128]`` of tokens that have one row, or rows of one tile: a token after the other."""
    return tokens.bitcast(jnp.uint32).reshape(-1, LANES)


def _words(packed):
    """Tokens ``[n, rows, pack, D]`` as ``u32[n * rows * D / 128, 128]``, a row's tiles of lanes one after the other."""
    num_tokens, rows, _, width = packed.shape
    words = packed.bitcast(jnp.uint32).reshape(num_tokens * rows, width)
    return words.reshape(num_tokens * rows * (width // LANES), LANES)


def _heads_of_word(words, word, bq, dtype):
    """Rows ``f32[bq, D]`` of the heads that share a word of queries ``u32[bq * odd, 128]`` a tile: two if those have
    16 bits."""
    rows = [tile[pl.ds(word, bq, stride=tile.shape[0] // bq), :] for tile in words]
    rows = jnp.concatenate(rows, axis=1)
    if dtype.itemsize == 4:
        return (pltpu.bitcast(rows, jnp.float32),)
    halves = rows << 16, rows & jnp.uint32(0xFFFF0000)
    return tuple(pltpu.bitcast(half, jnp.float32) for half in halves)


def _word_tiles(tokens, words, part=0):
    """``u32[n * …, 128]`` for each tile of lanes of ``[n, H, D]`` or ``[n, odd, pack, D]``.

    Where D > 128 that is not how they lie: they are moved to a `part` of `words`, ``u32[D / 128, n * odd, 128]``.
    """
    if tokens.ndim == 4 or tokens.shape[-1] == LANES:
        return [_flat(tokens)]

    def take(token, words):
        words[...] = pltpu.bitcast(token[...], jnp.uint32)

    num_rows = tokens.shape[0] * _odd(tokens.shape[1] * tokens.dtype.itemsize // 4)
    words = words.at[:, pl.ds(part * num_rows, num_rows)]
    _move_words(tokens, words, take)
    return [words.at[tile] for tile in range(words.shape[0])]


def _move_words(tokens, words, do):
    """`do(token, its words)` for all of ``[n, H, D]`` and ``u32[D / 128, n * odd, 128]``, 128 lanes at a time."""
    num_tokens, num_heads, head_dim = tokens.shape
    num_words = num_heads * tokens.dtype.itemsize // 4
    for token in range(num_tokens):
        for tile, lanes in enumerate(_lane_tiles(head_dim)):
            at = pl.ds(token * (words.shape[1] // num_tokens), num_words)
            do(tokens.at[token, :, lanes], words.at[tile, at])


def _even_parts(low, high, bits=16):
    """Words of parts with so many bits: in turn one of the even ones of `low` and of `high`."""
    return _in_turn(low, high << bits, bits)


def _odd_parts(low, high, bits=16):
    return _in_turn(low >> bits, high, bits)


def _in_turn(even, odd, bits):
    """The even parts of the words of `even`, and the odd ones of those of `odd`: one select."""
    dtype, ones = {16: (jnp.bfloat16, 0x3F80), 8: (jnp.int8, 0x00010001)}[bits]
    is_even = pltpu.bitcast(jnp.full(even.shape, ones, jnp.uint32), dtype) != 0
    even, odd = (pltpu.bitcast(words, dtype) for words in (even, odd))
    return pltpu.bitcast(jnp.where(is_even, even, odd), jnp.uint32)


def _tiles_as(words, hbm):
    """``(lanes, tokens[n, rows, pack, 128])`` of the type and layout of `hbm` for each tile of words; to read only."""
    *_, rows, pack, head_dim = hbm.shape
    for tile, lanes in enumerate(_lane_tiles(head_dim)):
        tokens = words.at[tile].bitcast(hbm.dtype).reshape(-1, _odd(rows), pack, LANES)
        yield lanes, tokens.at[:, pl.ds(0, rows)]


# --- the kernel -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a call asks for; known when the kernel is compiled."""

    sm_scale: float  # with the scales of queries and keys
    mask_value: float
    sliding_window: int | None
    soft_cap: float | None
    v_scale: float  # what the sums of the values are multiplied by
    causal: bool  # else all of a sequence is seen, and all of it is in the cache already

    @property
    def scale(self):
        """The factor of q · k: what comes of it is a weight's power of two, or what the cap bounds by 1."""
        return self.sm_scale * LOG2_E if self.soft_cap is None else self.sm_scale / self.soft_cap


@dataclasses.dataclass(frozen=True)
class _Call:
    """What every part of the kernel needs: scalars in SMEM, operands and results in HBM, static figures."""

    kv_lens: Any  # i32[S]
    page_indices: Any  # i32[S * pages_per_seq]
    cu_q_lens: Any  # i32[S + 1]
    distribution: Any  # i32[3]: decode_end, prefill_end, total
    q_hbm: Any  # [T, Hq / pack, pack, D], pack heads filling 32 bits, where they lie so: D = 128; else [T, Hq, D]
    k_hbm: Any  # [T, Hkv, D], Hkv even where two of them share a word; with the values in it if joined
    v_hbm: Any  # [T, Hkv, D]
    o_hbm: Any  # as q_hbm
    cache_hbm: Any  # [P, page_size, 2 * Hkv / pack, pack, D]; Hkv / pack if merged_kv
    sink: Any  # f32[Hq, 128]: each head's sink as a score, the same in every lane; None: no sinks
    options: "_Options"
    num_q_heads: int  # those of the model; q_hbm and o_hbm may hold some more, to fill words and tiles
    num_kv_heads: int
    merged_kv: bool  # a head's keys and values are one row: queries are zero where it has values
    joined: bool  # k_hbm has new keys and values as the cache has them

    def scores(self, products, scaled=False):
        """Scores of q · k whose powers of two are weights; `scaled`: q had the scale in it already."""
        cap = self.options.soft_cap
        products = products if scaled else products * self.options.scale
        return products if cap is None else jnp.tanh(products) * (cap * LOG2_E)

    def first_seen(self, position):
        """The first position that the query at `position` sees."""
        window = self.options.sliding_window
        return 0 if window is None else jnp.maximum(position - (window - 1), 0)

    def row_of(self, head, is_value):
        """Which of a cached token's rows has the keys or the values of a KV head."""
        return head if self.merged_kv else 2 * head + is_value

    @property
    def heads_of_word(self):
        """KV heads whose keys share a word of the cache."""
        pack = self.cache_hbm.shape[3]
        return pack if self.merged_kv else max(pack // 2, 1)

    @property
    def words_beside(self):
        return _words_beside(self.cache_hbm.shape, self.merged_kv)

    def new_to(self, k, v):
        """``(HBM, its target)`` of the new tokens' keys and values; none where the cache has them already."""
        if not self.options.causal:
            return ()
        return ((self.k_hbm, k),) if self.joined else ((self.k_hbm, k), (self.v_hbm, v))

    @property
    def group(self):
        return self.num_q_heads // self.num_kv_heads

    @property
    def page_size(self):
        return self.cache_hbm.shape[1]

    @property
    def decode_page_tokens(self):
        return _decode_page_tokens(self.page_size, self.options.sliding_window)

    @property
    def num_tokens(self):
        return self.q_hbm.shape[0]

    @property
    def in_words(self):
        """Whether a token's heads lie in HBM one word of 128 lanes after the other."""
        return self.q_hbm.ndim == 4

    def q_len(self, seq):
        return self.cu_q_lens[seq + 1] - self.cu_q_lens[seq]

    def slots(self, seq, position, count):
        """Where the cache keeps `count` tokens of one page of a sequence."""
        page = self.page_of(seq, position // self.page_size)
        return self.cache_hbm.at[page, pl.ds(jax.lax.rem(position, self.page_size), count)]

    def page_of(self, seq, index):
        return self.page_indices[seq * (self.page_indices.shape[0] // self.kv_lens.shape[0]) + index]

    def next_with(self, wanted, seq):
        """The first sequence from `seq` on whose number of new tokens is `wanted`, or the number of sequences."""
        total = self.distribution[2]
        last = jnp.maximum(total - 1, 0)
        return jax.lax.while_loop(
            lambda s: jnp.logical_and(s < total, jnp.logical_not(wanted(self.q_len(jnp.minimum(s, last))))),
            lambda s: s + 1,
            seq,
        )


def _for_tiles(hbm, vmem, sem, do):
    """`do(copy)` of ``[n, H, D]`` to ``[D / 128, n, H, 128]``: strided loads take 128 lanes at a time."""
    for tile, lanes in enumerate(_lane_tiles(hbm.shape[-1])):
        do(pltpu.make_async_copy(hbm.at[:, :, lanes], vmem.at[tile], sem))


def _start(copy):
    copy.start()


def _wait(copy):
    copy.wait()


def _for_pages(call, seq, first, start, tokens, kv_vmem, sem, do, page_size, piece):
    """`do(copy)` for each page of a KV block that holds any of a sequence's tokens from `start` to before `tokens`.

    The block begins with the page `first`; pages of `page_size` tokens may be parts of the cache's. They are started
    PAGES_TOGETHER at a time, and waited for as if they came in as few copies as can be. `piece`: so many tokens are the
    least that is fetched of the last page, instead of all of it.
    """
    in_page, count = page_size // piece, kv_vmem.shape[0] // page_size
    pieces = jnp.minimum(count * in_page, pl.cdiv(tokens, piece) - first * in_page)
    skipped = 0 if start is None else jnp.maximum(start // page_size - first, 0)
    target = kv_vmem.at[:, pl.ds(0, call.cache_hbm.shape[2])]

    if do is _wait:
        left = jnp.maximum(pieces - skipped * in_page, 0)
        for bit in range((count * in_page).bit_length()):
            some = target.at[pl.ds(0, piece << bit)]
            pl.when(left & 1 << bit != 0)(pltpu.make_async_copy(some, some, sem).wait)
        return

    def copy(page, token=0, count=page_size):
        slots = target.at[pl.ds(page * page_size + token, count)]
        page, parts = first + page, call.page_size // page_size
        if parts > 1:
            page, token = page // parts, jax.lax.rem(page, parts) * page_size + token
        do(pltpu.make_async_copy(call.cache_hbm.at[call.page_of(seq, page), pl.ds(token, count)], slots, sem))

    pages, last = jax.lax.div(pieces, in_page), jax.lax.rem(pieces, in_page)
    for bit in range((in_page - 1).bit_length()):
        so_far = (last >> bit + 1) << bit + 1
        pl.when(last & 1 << bit != 0)(functools.partial(copy, pages, so_far * piece, piece << bit))
    together = jnp.maximum(pages - skipped, 0) // PAGES_TOGETHER

    @pl.loop(0, together)
    def _(i):
        for j in range(PAGES_TOGETHER):
            copy(skipped + i * PAGES_TOGETHER + j)

    pl.loop(skipped + together * PAGES_TOGETHER, pages)(copy)


# --- decodes: sequences with one new token, a stream of KV blocks fetched ahead across sequences ----------------------


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Buffers of the decode pass; `odd`: see _odd."""

    q_ring: Any  # [buffers, 1, …, D] as in HBM: with the first KV block of its sequence
    k_ring: Any  # [buffers, D / 128, 1, Hkv, 128]: the new token's keys, the same; if joined as in HBM, in [:, 0]
    v_ring: Any  # [buffers, D / 128, 1, Hkv, 128]
    kv_ring: Any  # [buffers, bkv, 2 * Hkv / pack, pack, D]
    q: Any  # [Hq, D]: the sequence in work; D here and in acc as _beside has it
    new: Any  # u32[results, D / 128, odd, 128]: the new token's keys and values on their way to the cache
    o: Any  # on its way out: [results, 1, Hq, D], or u32[results, 1, odd, 128]
    m: Any  # f32[Hq, 128]: running maximum of the scores before the part in `s`, the same in every lane
    top: Any  # f32[Hq, 128]: that of the part in `s`, a row's over its lanes
    l: Any  # f32[Hq, 128]: running sum of 2 ** (score - m), a row over its lanes
    total: Any  # f32[Hq, 128]: that sum over its lanes, of a part that is masked; the same in every lane
    acc: Any  # f32[Hq, D]: running numerator
    s: Any  # f32[Hq, part * Hkv]: scores of all keys of a part
    bias: Any  # f32[Hq, part * Hkv]: see _tell_heads_apart
    ring_sems: Any  # DMA[buffers]
    out_sems: Any  # DMA[results]
    v: Any = None  # u32[beside / 2, …, 128]: where merged rows are beside each other, see _keys_and_value_words

    @property
    def buffers(self):
        return self.kv_ring.shape[0]

    @property
    def bkv(self):
        return self.kv_ring.shape[1]

    @property
    def part_tokens(self):
        return _part_tokens(self.bkv, self.kv_ring.shape[2], self.kv_ring.shape[4] // LANES)

    @property
    def steps(self):
        return _steps(self.part_tokens, self.kv_ring.shape[2], self.kv_ring.shape[4] // LANES)

    def keys_and_values(self, part, tokens):
        """The first `tokens` of a part."""
        return self.kv_ring.at[part.slot, pl.ds(part.number * self.part_tokens, tokens)]


class _Part(NamedTuple):
    """A part of a decode's KV block, whose tokens from `start` to before `end` are seen; integers all."""

    slot: Any = 0
    number: Any = 0
    start: Any = 0
    end: Any = 0
    begins: Any = 0  # 1 where its sequence begins with it
    ends: Any = 0  # 1 where it ends


NO_PART = _Part()


def _part_tokens(bkv, rows, tiles):
    """Tokens of a decode's KV block that are in work at once: a share of it, in whole chunks and at most PART_WORDS;
    all of it where there is none."""
    most = pl.cdiv(bkv * rows * tiles, PART_WORDS)
    counts = (n for n in range(most, 2 * most) if bkv % n == 0 and bkv * rows % (n * CHUNK_WORDS) == 0)
    return bkv // next(counts, 1)


def _steps(part, rows, tiles):
    """Tokens of a part that is masked which may be in work, the first of these sizes that has all that is seen of it.
    Steps between them are equal, and whole chunks; where that cannot be, there is but one."""
    most = min(max(pl.cdiv(part * rows * tiles, STEP_WORDS), 2), STEPS)
    count = next(n for n in range(most, 0, -1) if n == 1 or part * rows % (n * CHUNK_WORDS) == 0)
    return [part // count * (i + 1) for i in range(count)]


def _decode_page_tokens(page_size, sliding_window):
    """Tokens that one copy brings for a decode; its first KV block begins with as many, of which it sees some."""
    return page_size if sliding_window is None else math.gcd(page_size, WINDOW_PAGE_TOKENS)


def _left_out(call, seq):
    """How many tokens come before a decode's first KV block."""
    if call.options.sliding_window is None:
        return 0
    return call.first_seen(call.kv_lens[seq] - 1) // call.decode_page_tokens * call.decode_page_tokens


def _next_decode(call, seq):
    return call.next_with(lambda q_len: q_len == 1, seq)


def _for_decode_block(call, d, seq, block, slot, do):
    """`do(copy)` of a KV block's pages, and with the first one of the queries and the new token."""

    @pl.when(block == 0)
    def _():
        row = call.cu_q_lens[seq]
        do(pltpu.make_async_copy(call.q_hbm.at[pl.ds(row, 1)], d.q_ring.at[slot], d.ring_sems.at[slot]))
        for hbm, ring in call.new_to(d.k_ring, d.v_ring):
            new, target, sem = hbm.at[pl.ds(row, 1)], ring.at[slot], d.ring_sems.at[slot]
            do(pltpu.make_async_copy(new, target.at[0], sem)) if call.joined else _for_tiles(new, target, sem, do)

    kv, sem = d.kv_ring.at[slot], d.ring_sems.at[slot]
    in_cache = call.kv_lens[seq] - 1 if call.options.causal else call.kv_lens[seq]
    page_size = call.decode_page_tokens
    first = _left_out(call, seq) // page_size + block * (d.bkv // page_size)
    _for_pages(call, seq, first, None, in_cache, kv, sem, do, page_size, math.gcd(PIECE_TOKENS, page_size))


def _fetch_decode_block(call, d, ahead):
    """Starts the fetch of the block at `ahead` = (sequence, block, slot), if there is one; the one after it."""
    seq, block, slot = ahead
    total = call.distribution[2]

    @pl.when(seq < total)
    def _():
        _for_decode_block(call, d, seq, block, slot, _start)

    some = jnp.minimum(seq, jnp.maximum(total - 1, 0))
    last = block + 1 >= pl.cdiv(call.kv_lens[some] - _left_out(call, some), d.bkv)
    after = _next_decode(call, jnp.where(last, jnp.minimum(seq + 1, total), seq))
    return after, jnp.where(last, 0, block + 1), jax.lax.rem(slot + 1, d.buffers)


def _for_decode_results(call, d, seq, number, do):
    """`do(copy)` of the output and the new token of the decode of that `number`; to wait, any `seq` is as good."""
    at = jax.lax.rem(number, d.out_sems.shape[0])
    out = next(_tiles_as(d.o.at[at], call.o_hbm))[1] if call.in_words else d.o.at[at]
    do(pltpu.make_async_copy(out, call.o_hbm.at[pl.ds(call.cu_q_lens[seq], 1)], d.out_sems.at[at]))
    if not call.options.causal:
        return
    slots = call.slots(seq, call.kv_lens[seq] - 1, 1)
    for lanes, tokens in _tiles_as(d.new.at[at], call.cache_hbm):
        do(pltpu.make_async_copy(tokens, slots.at[:, :, :, lanes], d.out_sems.at[at]))


def _begin_decodes(call, d):
    """The state before the first block of the first decode; the first fetches are on their way."""
    first, zero = _next_decode(call, jnp.int32(0)), jnp.int32(0)
    ahead = first, zero, zero
    state = (*ahead, ahead, jax.tree.map(jnp.int32, NO_PART), zero, zero)
    for _ in range(d.buffers - 1):
        ahead = _fetch_decode_block(call, d, ahead)
    _tell_heads_apart(call, d)
    d.s[...] = jnp.full_like(d.s, DEFAULT_MASK_VALUE)  # of no part, which the first one finds before it
    for of_none in (d.m, d.top, *(() if d.v is None else (d.v,))):
        of_none[...] = jnp.zeros_like(of_none)
    _reset_sums(call, d)
    return (*state[:3], ahead, *state[4:])


def _decode_some_blocks(call, d, state, most):
    """KV blocks of decodes, `most` of them or all that are left; the state after them.

    `state`: (sequence, block, slot, the block to be fetched next, the part to be weighed next, how many decodes have
    their scores, the last of them).
    """

    def is_next(carry):
        count, state = carry
        return jnp.logical_and(count < most, state[0] < call.distribution[2])

    def one(carry):
        count, state = carry
        return count + 1, _decode_one_block(call, d, state)

    return jax.lax.while_loop(is_next, one, (jnp.int32(0), state))[1]


def _decode_one_block(call, d, state):
    seq, block, slot, ahead, pending, count, before = state
    results = d.out_sems.shape[0]
    left_out, kv_len = _left_out(call, seq), call.kv_lens[seq]
    last = pl.cdiv(kv_len - left_out, d.bkv) - 1

    @pl.when(jnp.logical_and(block == 0, count >= results))
    def _():
        _for_decode_results(call, d, seq, count, _wait)

    _for_decode_block(call, d, seq, block, slot, _wait)
    pl.when(block == 0)(lambda: _begin_decode(call, d, slot, jax.lax.rem(count, results)))
    offset = left_out + block * d.bkv
    first_seen, tokens = call.first_seen(kv_len - 1) - offset, kv_len - offset
    if call.options.causal:

        @pl.when(block == last)
        def _():
            for lanes, new in _tiles_as(d.new.at[jax.lax.rem(count, results)], call.cache_hbm):
                d.kv_ring[slot, tokens - 1, :, :, lanes] = new[0]

    parts = pl.cdiv(jnp.minimum(tokens, d.bkv), d.part_tokens)

    def step(part, pending):
        begins = jnp.logical_and(block == 0, part == 0).astype(jnp.int32)
        ends = jnp.logical_and(block == last, part == parts - 1).astype(jnp.int32)
        offset = part * d.part_tokens
        current = _Part(slot, part, first_seen - offset, tokens - offset, begins, ends)
        return _decode_part(call, d, current, pending, before, count - 1)

    pending = jax.lax.fori_loop(0, parts, step, pending)
    ahead = _fetch_decode_block(call, d, ahead)
    done = block == last
    after = _next_decode(call, jnp.where(done, seq + 1, seq))
    block = jnp.where(done, 0, block + 1)
    count, before = count + done.astype(jnp.int32), jnp.where(done, seq, before)
    return after, block, jax.lax.rem(slot + 1, d.buffers), ahead, pending, count, before


def _decode_part(call, d, current, pending, seq, number):
    """The scores of the `current` part of a KV block, and the sums of the one before, `pending`; what is pending then.

    With the last of a sequence's go the results: of `seq`, the decode of that `number`.
    """

    def is_whole(part):
        whole = part.end >= d.part_tokens
        return whole if call.options.sliding_window is None else jnp.logical_and(whole, part.start <= 0)

    whole = jnp.logical_and(is_whole(current), jnp.logical_and(is_whole(pending), pending.ends == 0))
    work = functools.partial(_score_and_weigh, call, d, current, pending)

    def masked(to_score):
        _by_size(pending.end, d.steps, lambda to_weigh: work(to_score, to_weigh, masked=True))

    all_tokens = d.part_tokens
    jax.lax.cond(
        whole,
        lambda: work(all_tokens, all_tokens, masked=False),
        lambda: _by_size(current.end, d.steps, masked),
    )
    pl.when(pending.ends == 1)(lambda: _give_results(call, d, seq, number))
    return current


def _by_size(tokens, sizes, do):
    """`do(size)` with the first of ascending sizes that has so many tokens, or with the last; found by halves."""
    if len(sizes) == 1:
        do(sizes[0])
        return
    half = len(sizes) // 2
    jax.lax.cond(
        tokens <= sizes[half - 1],
        lambda: _by_size(tokens, sizes[:half], do),
        lambda: _by_size(tokens, sizes[half:], do),
    )


def _give_results(call, d, seq, number):
    acc = _own(call, d.acc[...])
    out = _output(call, acc, _lanes(d.total[...], acc.shape[1])).astype(call.o_hbm.dtype)
    out = pltpu.bitcast(out, jnp.uint32) if call.in_words else out
    d.o[jax.lax.rem(number, d.out_sems.shape[0]), 0, : out.shape[0]] = out
    _for_decode_results(call, d, seq, number, _start)
    _reset_sums(call, d)


def _finish_decodes(call, d, state):
    """The results of the last decodes."""
    *_, pending, count, before = state

    @pl.when(count > 0)
    def _():
        work = functools.partial(_score_and_weigh, call, d, NO_PART, pending, d.steps[0], masked=True)
        _by_size(pending.end, d.steps, work)
        _give_results(call, d, before, count - 1)
        for back in range(1, d.out_sems.shape[0] + 1):
            pl.when(count >= back)(lambda back=back: _for_decode_results(call, d, before, count - back, _wait))


def _words_beside(cache_shape, merged_kv):
    """How many words of a token meet a decode's queries beside each other, whose row is then zero for all but its own:
    so many heads fewer scores that are none, and an MXU that is 256 wide is filled. 1: all are below each other."""
    *_, rows, pack, head_dim = cache_shape
    if merged_kv:
        return math.gcd(rows, WORDS_BESIDE)
    return 2 if rows % 2 == 0 and pack > 1 and head_dim == LANES and _generation() >= 6 else 1


def _begin_decode(call, d, slot, result):
    ring = d.q_ring.at[slot]
    d.q[...] = _beside(call, pltpu.bitcast(_words(ring)[...], d.q.dtype) if call.in_words else ring[0])
    if call.options.causal:
        k, v = ([_flat(ring.at[slot, tile]) for tile in range(ring.shape[1])] for ring in (d.k_ring, d.v_ring))
        k = k[0] if call.joined else k
        _interleave(call, k, v, 1, d.new.at[result])


def _reset_sums(call, d):
    d.l[...] = jnp.full_like(d.l, 0.0 if call.sink is None else 1 / LANES)
    d.acc[...] = jnp.zeros_like(d.acc)


def _output(call, acc, l):
    if call.o_hbm.dtype.itemsize == 4:
        out = acc / l
    else:  # an estimate and one step of Newton's: all that is left after rounding, in a third of a division's slots
        estimate = pl.reciprocal(l, approx=True)
        out = acc * (estimate * (2.0 - l * estimate))
    return out if call.options.v_scale == 1.0 else out * call.options.v_scale


def _between(shape, axis, start, end):
    """Whether an index along `axis` is from `start` (None: 0) to before `end`."""
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return index < end if start is None else jnp.logical_and(index >= start, index < end)


def _score_and_weigh(call, d, current, pending, to_score, to_weigh, *, masked):
    """All query heads against the first `to_score` keys of the `current` part, and `to_weigh` values of the `pending`.

    While one waits for the MXU or the lane reductions, the other works; the scores of the one go where those of the
    other have been taken from. Any part that ends a sequence is weighed `masked`: the sums over lanes that its results
    need are made here, where nothing waits for them.

    The keys of all heads, in the order in which they lie in memory, meet all query rows: the MXU takes as long for one
    row as for its fill of weights, and what is not a row's own head has no weight.
    """
    kv, before = d.keys_and_values(current, to_score), d.keys_and_values(pending, to_weigh)
    seen, seen_before = (_seen_of(call, part) if masked else None for part in (current, pending))
    q, m_old = d.q[...], d.m[...]
    m_new = jnp.maximum(m_old, jnp.max(d.top[...], axis=1, keepdims=True))
    alpha, top = jnp.exp2(m_old - m_new), None
    l_new, pv = alpha * d.l[...], _lanes(alpha, d.acc.shape[1]) * d.acc[...]

    def weigh(chunk):
        if chunk.merged and chunk.beside > 1:
            v = [pltpu.bitcast(d.v[tile, _of_tile(chunk), :], kv.dtype) for tile in range(d.v.shape[0])]
            v = jnp.concatenate(v, axis=1)
        else:
            v = _chunk_of(before, chunk, 1, seen_before)
        p = jnp.exp2(d.s[:, chunk.columns] - _lanes(m_new, v.shape[0]))
        return _lane_sums(p), jnp.dot(p.astype(d.q.dtype), v, preferred_element_type=jnp.float32)

    def score(chunk):
        if chunk.merged and chunk.beside > 1:
            k, words = _keys_and_value_words(kv, chunk, seen)
            for tile in range(len(words)):
                d.v[tile, _of_tile(chunk), :] = words[tile]
        else:
            k = _chunk_of(kv, chunk, 0, None)
        s = call.scores(jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32))
        if seen is not None:
            visible = _between_words(_word_of_column(kv, chunk), kv, seen)
            s = jnp.where(visible, s, call.options.mask_value)
        s += d.bias[:, chunk.columns]
        d.s[:, chunk.columns] = s
        return _lane_max(s)

    for chunk in _chunks(call, before):
        l_of_chunk, pv_of_chunk = weigh(chunk)
        l_new, pv = l_new + l_of_chunk, pv + pv_of_chunk
    for chunk in _chunks(call, kv):
        most = score(chunk)
        top = most if top is None else jnp.maximum(top, most)
    d.l[...], d.acc[...], d.top[...] = l_new, pv, top
    if masked:
        d.total[...] = jnp.broadcast_to(jnp.sum(l_new, axis=1, keepdims=True), d.total.shape)
    m_first = jnp.full_like(m_new, call.options.mask_value) if call.sink is None else call.sink[...]
    d.m[...] = jnp.where(current.begins == 1, m_first, m_new)


def _seen_of(call, part):
    """What is seen of a part: (None or its first token, the end)."""
    return None if call.options.sliding_window is None else part.start, part.end


def _in_a_basic_block(call, do):
    """`do()` in a basic block of its own, by a condition that always holds."""
    pl.when(call.distribution[2] > 0)(do)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Some 32-bit words of a KV block in memory's order, and where the scores of their keys are."""

    start: int
    words: int
    beside: int  # words whose rows are beside each other, of as many heads
    merged: bool
    columns: Any  # as many as there are keys, or rows beside each other


def _of_tile(chunk):
    """Where a tile of the value words of a chunk is kept."""
    count = chunk.words // chunk.beside
    return pl.ds(chunk.start // chunk.beside, count)


def _words_of(kv):
    """32-bit words of a KV block ``[bkv, rows, pack, D]``, for 128 lanes of D."""
    return kv.shape[0] * kv.shape[1]


def _chunks(call, kv):
    """The words of a KV block, CHUNK_WORDS at a time; all at once where that does not divide them."""
    total = _words_of(kv)
    words = CHUNK_WORDS if total % CHUNK_WORDS == 0 else total
    width = words * kv.shape[2] // _values_of_column(call.words_beside, call.merged_kv)
    return [
        _Chunk(i * words, words, call.words_beside, call.merged_kv, pl.ds(i * width, width))
        for i in range(total // words)
    ]


def _values_of_column(beside, merged_kv):
    """How many rows of the cache, of keys or values or both, go with a column of scores."""
    return beside if merged_kv else 2 * beside


def _word_of_column(kv, chunk):
    """``i32[1, columns]``: the word of the block that the key of a column of scores comes from."""
    pack = kv.shape[2]
    column = jax.lax.broadcasted_iota(jnp.int32, (1, chunk.columns.size), 1)
    if chunk.merged:
        return chunk.start + chunk.beside * (column // pack)
    if pack == 1:
        return chunk.start + 2 * column
    return chunk.start + chunk.beside * (2 * (column // pack) + column % 2)


def _head_of_column(kv, chunk):
    """``i32[1, columns]``: the KV head that the key of a column of scores belongs to; the first of those beside it."""
    rows, pack = kv.shape[1:3]
    row = _word_of_column(kv, chunk) % rows
    in_word = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1) % pack
    return pack * row + in_word if chunk.merged else (pack * row + in_word) // 2


def _between_words(word, kv, seen, first=0):
    """Whether words, numbered from `first` on, are of tokens in `seen`."""
    start, end = (None if token is None else token * kv.shape[1] - first for token in seen)
    return word < end if start is None else jnp.logical_and(word >= start, word < end)


def _chunk_of(kv, chunk, is_value, seen):
    """Keys or values ``[columns, D]`` of a chunk, both if merged; zero where not of a token in `seen`."""
    *_, pack, head_dim = kv.shape
    fold = head_dim // LANES
    words = _words(kv)
    of_one_token = pack > 1 and not chunk.merged and kv.shape[1] % (2 * chunk.beside) == 0  # both words of a row

    def load(tile, start, count, step=1):
        loaded = words[_strided(start * fold + tile, count, step * fold), :]
        return loaded if seen is None or of_one_token else _seen_words(loaded, kv, seen, start, step)

    if chunk.merged:
        return pltpu.bitcast(load(0, chunk.start, chunk.words), kv.dtype)
    tiles, beside = [], chunk.beside
    for tile in range(fold * beside):
        if pack == 1:
            tiles.append(load(tile, chunk.start + is_value, chunk.words // 2, 2))
            continue
        tile, first = (0, chunk.start + tile) if beside > 1 else (tile, chunk.start)
        half, step = chunk.words // (2 * beside), 2 * beside
        low, high = load(tile, first, half, step), load(tile, first + beside, half, step)
        both = (_odd_parts if is_value else _even_parts)(low, high, 32 // pack)
        tiles.append(both if seen is None or not of_one_token else _seen_words(both, kv, seen, first, step))
    return pltpu.bitcast(jnp.concatenate(tiles, axis=1), kv.dtype)


def _keys_and_value_words(kv, chunk, seen):
    """Of merged ones, where two words and more are beside each other: keys ``[columns, beside * 64]``, in two halves of
    128 lanes those of two heads `pack` apart; and their values in words, ``u32[…, 128]`` for each of these tiles, the
    other way round. So half of the words are turned, once."""
    words, count = _words(kv), chunk.words // chunk.beside
    keys, values = [], []
    for i in range(chunk.start, chunk.start + chunk.beside, 2):
        first, second = (words[_strided(i + j, count, chunk.beside), :] for j in (0, 1))
        if seen is not None:
            first, second = (_seen_words(x, kv, seen, i + j, chunk.beside) for j, x in enumerate((first, second)))
        second = _halves_turned(second)
        is_first = jax.lax.broadcasted_iota(jnp.int32, first.shape, 1) < LANES // 2
        keys.append(pltpu.bitcast(jnp.where(is_first, first, second), kv.dtype))
        values.append(jnp.where(is_first, second, first))
    return jnp.concatenate(keys, axis=1), values


def _strided(first, count, stride):
    return pl.ds(first, count) if stride == 1 else pl.ds(first, count, stride=stride)


def _seen_words(words, kv, seen, first, step):
    """`words` of a KV block, each `step`-th from `first` on, zero where not of a token in `seen`."""
    word = step * jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
    return jnp.where(_between_words(word, kv, seen, first), words, jnp.zeros_like(words))


def _halves_turned(x):
    """The halves of 128 lanes in the place of each other."""
    turned = pltpu.roll(x if x.dtype == jnp.float32 else pltpu.bitcast(x, jnp.int32), LANES // 2, 1)
    return turned if x.dtype == jnp.float32 else pltpu.bitcast(turned, x.dtype)


def _beside(call, rows):
    """Queries ``[Hq, D]`` where `_chunk_of` has the keys of their heads; if merged, with zeros for others."""
    if call.words_beside < 2:
        return rows
    if not call.merged_kv:
        return jnp.concatenate([jnp.where(own, rows, 0) for own in _own_parts(call, rows.shape)], axis=1)
    wide = rows.astype(jnp.float32)
    turned = _halves_turned(wide)
    parts = [jnp.where(own, turned if i % 2 else wide, 0.0) for i, own in enumerate(_own_parts(call, rows.shape))]
    parts = [sum(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return jnp.concatenate(parts, axis=1).astype(rows.dtype)


def _own(call, acc):
    """The sums ``[Hq, D]`` of each query's own head; if merged, in lanes 64 to 127."""
    if call.words_beside < 2:
        return acc
    out = 0.0
    for i, own in enumerate(_own_parts(call, (acc.shape[0], LANES))):
        tile = i // 2 if call.merged_kv else i
        part = acc[:, tile * LANES : (tile + 1) * LANES]
        out += jnp.where(own, _halves_turned(part) if call.merged_kv and i % 2 else part, 0.0)
    return out


def _own_parts(call, shape):
    """For each of the words beside each other, which query heads have their KV head there."""
    of_word = call.group * call.heads_of_word
    word = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // of_word
    return [word % call.words_beside == part for part in range(call.words_beside)]


def _tell_heads_apart(call, d):
    """Fills `d.bias`: zero where a column of scores belongs to a row's head, else what leaves it no weight."""
    kv = d.keys_and_values(NO_PART, d.part_tokens)
    head_of_row = jax.lax.broadcasted_iota(jnp.int32, (d.q.shape[0], 1), 0) // call.group
    of_beside = call.heads_of_word * call.words_beside
    head_of_row = head_of_row // of_beside * of_beside + head_of_row % call.heads_of_word
    for chunk in _chunks(call, kv):
        own = head_of_row == _head_of_column(kv, chunk)
        d.bias[:, chunk.columns] = jnp.where(own, 0.0, DEFAULT_MASK_VALUE)


# --- prefills: sequences with more new tokens, a block of queries at a time -------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Prefill:
    """Buffers of the prefill pass; `odd`: see _odd."""

    q: Any  # [2, bq, odd, pack, D] or [2, bq, Hq, D]: of the item in work and of the following one
    k: Any  # [2, bq, Hkv, D]: the same tokens' new keys; if joined with their values
    v: Any  # [2, bq, Hkv, D]
    new: Any  # u32[D / 128, bq * odd, 128]: the item's keys and values in the cache's layout
    words: Any  # u32[D / 128, …, 128]: the item's queries, keys and values, see _word_tiles
    o_words: Any  # u32[D / 128, bq * odd, 128]: its output
    o: Any  # [bq, Hq, D]: what of that goes out, where it does not go in words
    kv: Any  # [2, bkv, odd, pack, D]
    kv_sems: Any  # DMA[2], one per KV buffer
    in_sems: Any  # DMA[2]: queries, keys, values
    new_sem: Any  # DMA: cache update
    out_sem: Any  # DMA: output
    sums: "_Rows | _Columns"

    @property
    def bq(self):
        return self.k.shape[1]


@dataclasses.dataclass(frozen=True)
class _Item:
    """A block of one sequence's queries: rows ``row_start:row_end`` of the batch, from token `position` on.

    The last block of the batch would read past its end: its window is shifted back and the rows before are ignored.
    """

    seq: Any
    row_start: Any
    row_end: Any
    window: Any
    position: Any
    exists: Any  # False: none is left, and the rest is of no meaning

    @property
    def end(self):
        """What a query of the block sees is before this position."""
        return self.position + self.row_end - self.row_start

    @property
    def skipped(self):
        return self.row_start - self.window


def _item(call, b, seq, q_block):
    bq, exists = b.bq, seq < call.distribution[2]
    seq = jnp.minimum(seq, call.kv_lens.shape[0] - 1)
    row_start = call.cu_q_lens[seq] + q_block * bq
    q_end = call.cu_q_lens[seq + 1]
    window = jnp.minimum(row_start, call.num_tokens - bq)
    position = call.kv_lens[seq] - q_end + row_start
    return _Item(seq, row_start, jnp.minimum(row_start + bq, q_end), window, position, exists)


def _prefill_pass(call, b, decode_some, decoding):
    """One block of queries after the other; what the next one needs first is fetched while one is in work.

    With each KV block go some of decodes, whose pages come while the MXU has the prefill's work to do: `decode_some`
    takes the state of the decodes, `decoding` at first, so many of their KV blocks further; the last state is returned.
    Those that are left when no item is go through the same loop, so that the decodes' code is in the program once.
    """
    total = call.distribution[2]

    def is_prefill(q_len):
        return q_len > 1

    def first_block(item):
        return call.first_seen(item.position) // b.kv.shape[1]

    def attend(state):
        seq, q_block, slot, kept, parity, before, decoding = state
        item = _item(call, b, seq, q_block)
        last = item.row_end == call.cu_q_lens[item.seq + 1]
        next_seq = call.next_with(is_prefill, jnp.where(last, seq + 1, seq))
        next_block = jnp.where(last, 0, q_block + 1)
        following = _item(call, b, next_seq, next_block)

        @pl.when(item.exists)
        def _():
            _for_inputs(call, b, item, parity, _wait)
            _begin_item(call, b, item, parity)

        following_first = first_block(following)
        stays = jnp.logical_and(next_seq == seq, following_first == _last_block(call, b, item))

        def start_inputs():
            pl.when(following.exists)(lambda: _for_inputs(call, b, following, 1 - parity, _start))

        def start_following(slot):
            wanted = jnp.logical_and(following.exists, jnp.logical_not(stays))
            pl.when(wanted)(lambda: _for_item_pages(call, b, following, following_first, slot, _start))

        ahead = start_inputs, start_following
        first = first_block(item)
        slot, decoding = _attend_item(call, b, item, first, kept, (slot, decoding), *ahead, decode_some)

        @pl.when(item.exists)
        def _():
            if call.options.causal:
                _for_new_tokens(call, b, item, _last_block(call, b, item), 1 - slot, _wait)
            pl.when(before[0] >= 0)(lambda: _for_rows(call, b, _item(call, b, *before), _wait))
            _finish_item(call, b)
            _for_rows(call, b, item, _start)

        kept, slot = jnp.where(stays, following_first, -1), jnp.where(stays, 1 - slot, slot)
        before = jax.tree.map(lambda new, old: jnp.where(item.exists, new, old), (seq, q_block), before)
        return next_seq, next_block, slot, kept, 1 - parity, before, decoding

    for head in range(call.num_q_heads):
        b.sums.reset(call, head)
    zero = jnp.int32(0)
    first = call.next_with(is_prefill, zero)

    @pl.when(first < total)
    def _():
        item = _item(call, b, first, 0)
        _for_inputs(call, b, item, 0, _start)
        _for_item_pages(call, b, item, first_block(item), 0, _start)

    none = jnp.int32(-1)
    state = (first, zero, zero, none, zero, (none, zero), decoding)
    *_, before, decoding = jax.lax.while_loop(lambda s: jnp.minimum(s[0], s[-1][0]) < total, attend, state)
    pl.when(before[0] >= 0)(lambda: _for_rows(call, b, _item(call, b, *before), _wait))
    return decoding


def _for_inputs(call, b, item, parity, do):
    for hbm, vmem in ((call.q_hbm, b.q), *call.new_to(b.k, b.v)):
        target = vmem.at[parity, :, pl.ds(0, hbm.shape[1])]
        do(pltpu.make_async_copy(hbm.at[pl.ds(item.window, b.bq)], target, b.in_sems.at[parity]))


def _new_of_block(b, item, block):
    """The first of the item's own tokens in a KV block, and the end of them."""
    bkv = b.kv.shape[1]
    return jnp.maximum(item.position, block * bkv), jnp.minimum(item.end, (block + 1) * bkv)


def _for_new_tokens(call, b, item, block, slot, do):
    """`do(copy)` of the item's new tokens of a KV block, which has them in work already, on to the cache.

    A page that is all new goes whole, any other token by token.
    """
    page_size, bkv = call.page_size, b.kv.shape[1]
    start, block_end = _new_of_block(b, item, block)

    def copy(first, count):
        tokens = b.kv.at[slot, pl.ds(first - block * bkv, count), pl.ds(0, call.cache_hbm.shape[2])]
        do(pltpu.make_async_copy(tokens, call.slots(item.seq, first, count), b.new_sem))

    @pl.loop(start // page_size, pl.cdiv(block_end, page_size))
    def _(page):
        first = jnp.maximum(start, page * page_size)
        end = jnp.minimum(block_end, (page + 1) * page_size)
        whole = end - first == page_size
        if page_size <= b.bq:
            pl.when(whole)(lambda: copy(first, page_size))
            end = jnp.where(whole, first, end)
        pl.loop(first, end)(lambda token: copy(token, 1))


def _for_rows(call, b, item, do):
    """`do(copy)` of the output: whole if every row of the window is the item's own, else row by row."""
    bq = b.bq

    def copy(start, count):
        rows = call.o_hbm.at[pl.ds(start, count)]
        do(pltpu.make_async_copy(_output_of(call, b).at[pl.ds(start - item.window, count)], rows, b.out_sem))

    whole = jnp.logical_and(item.row_end - item.window == bq, item.skipped == 0)
    pl.when(whole)(lambda: copy(item.window, bq))
    pl.when(jnp.logical_not(whole))(lambda: pl.loop(item.row_start, item.row_end)(lambda row: copy(row, 1)))


def _output_of(call, b):
    """The item's output as it goes out: `bq` tokens in the layout of `o_hbm`."""
    return next(_tiles_as(b.o_words, call.o_hbm))[1] if call.in_words else b.o


def _begin_item(call, b, item, parity):
    if call.options.causal:
        if call.joined:
            k, v = _flat(b.k.at[parity]), None
        else:
            k, v = _word_tiles(b.k.at[parity], b.words), _word_tiles(b.v.at[parity], b.words, 1)
        _interleave(call, k, v, b.bq, b.new)
    words = _word_tiles(b.q.at[parity], b.words)
    heads_per_word = 4 // b.q.dtype.itemsize
    for word in range(pl.cdiv(call.num_q_heads, heads_per_word)):
        for head, rows in enumerate(_heads_of_word(words, word, b.bq, b.q.dtype), word * heads_per_word):
            if head < call.num_q_heads:
                b.sums.take(call, head, rows)


def _last_block(call, b, item):
    """The last KV block that the item sees."""
    return pl.cdiv(item.end if call.options.causal else call.kv_lens[item.seq], b.kv.shape[1]) - 1


def _for_item_pages(call, b, item, block, slot, do, kept=None):
    """`do(copy)` for each page of a KV block with tokens from before the item's own, which it brings itself.

    None of the block that is `kept`: it is there from the item before.
    """
    start = None if call.options.sliding_window is None else call.first_seen(item.position)
    end = item.position if call.options.causal else call.kv_lens[item.seq]
    end = end if kept is None else jnp.where(block == kept, 0, end)
    page_size, first = call.page_size, block * (b.kv.shape[1] // call.page_size)
    _for_pages(call, item.seq, first, start, end, b.kv.at[slot], b.kv_sems.at[slot], do, page_size, page_size)


def _attend_item(call, b, item, first, kept, carry, start_inputs, start_following, decode_some):
    """The item against the KV blocks that it sees, block `first` being on its way to a slot, or there if it is `kept`.
    Without an item, all decodes that are left.

    `carry`: that slot, and the state of the decodes, some of whose blocks go with each; both as they are afterwards.
    """
    bkv = b.kv.shape[1]
    end = item.end if call.options.causal else call.kv_lens[item.seq]
    last = jnp.where(item.exists, _last_block(call, b, item), first)
    first_new = item.position // bkv  # a page there may hold old tokens too, and is read before it is written

    def attend_block(block, slot):
        def start_next():
            _for_item_pages(call, b, item, block + 1, 1 - slot, _start)

        def give_new_tokens():
            _patch(call, b, item, block, slot)
            _for_new_tokens(call, b, item, block, slot, _start)

        if call.options.causal:  # where the next pages go, new ones of the block before may still be on their way
            pl.when(block > first_new)(lambda: _for_new_tokens(call, b, item, block - 1, 1 - slot, _wait))
        pl.when(block < last)(start_next)
        _for_item_pages(call, b, item, block, slot, _wait, kept)
        if call.options.causal:
            pl.when(block >= first_new)(give_new_tokens)
        pl.when(block == first + (last - first) // 2)(start_inputs)  # far from other copies that something waits for
        pl.when(block == last)(lambda: start_following(1 - slot))

        window = call.options.sliding_window
        fetched = None if window is None else call.first_seen(item.position) - block * bkv, end - block * bkv
        _prefill_block(call, b, slot, item.position - item.skipped - block * bkv, fetched)

    def step(block, carry):
        slot, decoding = carry
        pl.when(item.exists)(lambda: attend_block(block, slot))
        return 1 - slot, decode_some(decoding, jnp.where(item.exists, DECODES_BESIDE, 2**30))

    return jax.lax.fori_loop(first, last + 1, step, carry)


def _patch(call, b, item, block, slot):
    """The KV block's tokens that the item brings itself; the cache gets them from there."""
    first_position = block * b.kv.shape[1]
    start, end = _new_of_block(b, item, block)

    def copy(position, count):
        for lanes, new in _tiles_as(b.new, call.cache_hbm):
            tokens = new[pl.ds(position - item.position + item.skipped, count)]
            b.kv[slot, pl.ds(position - first_position, count), : tokens.shape[1], :, lanes] = tokens

    for together in (64, 16, 1):
        if together <= b.bq:
            whole = jnp.maximum(end - start, 0) // together
            pl.loop(0, whole)(lambda i, start=start, together=together: copy(start + i * together, together))
            start += whole * together


def _finish_item(call, b):
    """Numerators and sums to the output, whose words hold two heads if it is 16 bits wide: in pairs they are turned,
    where they stand in columns."""
    heads_per_word = 4 // call.o_hbm.dtype.itemsize
    halves = []
    for head in range(call.num_q_heads):
        out = b.sums.output(call, head)
        b.sums.reset(call, head)  # here, where the store slots are idle
        halves.append(pltpu.bitcast(out.astype(call.o_hbm.dtype).astype(jnp.float32), jnp.uint32))
        if len(halves) == heads_per_word or head + 1 == call.num_q_heads:
            words = halves[0] if heads_per_word == 1 else _odd_parts(halves[0], halves[-1])
            words = words.T if b.sums.stands else words
            rows = pl.ds(head // heads_per_word, b.bq, stride=b.o_words.shape[1] // b.bq)
            for tile in range(b.o_words.shape[0]):
                b.o_words.at[tile][rows, :] = words[:, tile * LANES : (tile + 1) * LANES]
            halves = []
    if not call.in_words:

        def give(token, words):
            token[...] = pltpu.bitcast(words[...], token.dtype)

        _move_words(b.o, b.o_words, give)


def _prefill_block(call, b, slot, first_row, fetched):
    """A block of queries, the first at position `first_row` of a KV block that holds the tokens of the range `fetched`.

    Only what straddles the diagonal or the window's edge is masked; quarters that no query sees are left out.
    """
    bq, bkv = b.bq, b.kv.shape[1]
    causal, window = call.options.causal, call.options.sliding_window
    whole = first_row >= bkv - 1 if causal else fetched[1] >= bkv
    if window is not None:
        whole = jnp.logical_and(whole, first_row + bq <= window)
    parts = next(parts for parts in (4, 2, 1) if parts == 1 or bkv % (parts * LANES) == 0)
    part = bkv // parts
    end = first_row + bq if causal else fetched[1]
    sizes = [part * (i + 1) for i in range(parts)]

    def masked():
        _by_size(end, sizes, lambda width: _prefill_keys(call, b, slot, width, (first_row, fetched)))

    jax.lax.cond(whole, lambda: _prefill_keys(call, b, slot, bkv, None), masked)


def _prefill_keys(call, b, slot, width, masked):
    """All queries against the first `width` keys of a KV block; those that were not fetched are zero.

    `masked`: (first_row, fetched) where a query may not see all of them.
    """

    def of(is_value, head, start, count):
        x = _row_of_tokens(b.kv.at[slot, pl.ds(start, count)], call.row_of(head, is_value), count)
        if masked is None:
            return x
        fetched = (None if token is None else token - start for token in masked[1])
        return jnp.where(_between(x.shape, 0, *fetched), x, jnp.zeros_like(x))

    b.sums.add(call, functools.partial(of, 0), functools.partial(of, 1), width, masked)


def _segments(width, longest):
    """A KV block's first `width` keys, so many at a time: ``(first, count)``."""
    return [(start, min(longest, width - start)) for start in range(0, width, longest)]


def _visible(call, query, key, first_row, fetched):
    """Which keys of a KV block the queries of an item see: numbers of the same shape."""
    visible = key <= first_row + query if call.options.causal else key < fetched[1]
    if call.options.sliding_window is not None:
        visible = jnp.logical_and(visible, key > first_row - call.options.sliding_window + query)
    return visible


def _of_head(call, bq, head):
    """Where a query head's rows or columns are in what is kept by KV head."""
    return head // call.group, pl.ds(head % call.group * bq, bq)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Scores and sums of an item, a row of them for each query of a head: for MXUs that are 128 wide.

    The scores of one KV head are computed while those of the one before become weights.
    """

    stands = False  # output() is [bq, D]

    bq: int
    q: Any  # [Hkv, g * bq, D]: the item's queries by KV head
    m: Any  # f32[Hkv, g * bq, 128]: running maximum of the scores, the same in every lane
    l: Any  # f32[Hkv, g * bq, 128]: running sum of 2 ** (score - m), a row over its lanes
    acc: Any  # f32[Hkv, g * bq, D]: running numerator
    s0: Any  # f32[g * bq, segment]: scores of a head
    s1: Any  # f32[g * bq, segment]: scores of the next head or segment
    p0: Any  # [g * bq, segment]: the weights of the same two
    p1: Any  # [g * bq, segment]

    @staticmethod
    def shapes(bq, num_kv_heads, rows, head_dim, value_dim, bkv, segment, dtype):
        del bq, value_dim, bkv
        f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
        sums = f32((num_kv_heads, rows, LANES)), f32((num_kv_heads, rows, LANES)), f32((num_kv_heads, rows, head_dim))
        scores, weights = f32((rows, segment)), pltpu.VMEM((rows, segment), dtype)
        return pltpu.VMEM((num_kv_heads, rows, head_dim), dtype), *sums, scores, scores, weights, weights

    def take(self, call, head, rows):
        self.q[_of_head(call, self.bq, head)] = rows.astype(self.q.dtype)

    def reset(self, call, head):
        at = _of_head(call, self.bq, head)
        if call.sink is None:
            self.m[at] = jnp.full_like(self.m[at], call.options.mask_value)
            self.l[at] = jnp.zeros_like(self.l[at])
        else:
            self.m[at] = jnp.broadcast_to(call.sink[pl.ds(head, 1), :], self.m[at].shape)
            self.l[at] = jnp.full_like(self.l[at], 1 / LANES)
        self.acc[at] = jnp.zeros_like(self.acc[at])

    def output(self, call, head):
        at = _of_head(call, self.bq, head)
        return _output(call, self.acc[at], jnp.sum(self.l[at], axis=1, keepdims=True))

    def add(self, call, keys, values, width, masked):
        buffers = ((self.s0, self.p0), (self.s1, self.p1))
        steps = [(head, *of) for head in range(call.num_kv_heads) for of in _segments(width, self.s0.shape[1])]
        self._score(*steps[0], keys, self.s0)
        for i, step in enumerate(steps):
            if i + 1 < len(steps):
                self._score(*steps[i + 1], keys, buffers[(i + 1) % 2][0])
            self._weigh(call, *step, values, *buffers[i % 2], masked)

    def _score(self, head, start, width, keys, scores):
        k = keys(head, start, width)
        scores[:, :width] = jax.lax.dot_general(
            self.q[head], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    def _weigh(self, call, head, start, width, values, scores, weights, masked):
        """One head's scores to weights, SOFTMAX_ROWS rows at a time so that what is live fits registers, to sums."""
        num_rows = scores.shape[0]
        for row in range(0, num_rows, SOFTMAX_ROWS):
            rows = pl.ds(row, min(SOFTMAX_ROWS, num_rows - row))
            s = call.scores(scores[rows, :width])
            if masked is not None:
                query = jax.lax.rem(row + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0), self.bq)
                key = start + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
                s = jnp.where(_visible(call, query, key, *masked), s, call.options.mask_value)
            m_old = self.m[head, rows]
            m_new = jnp.maximum(m_old, jnp.max(s, axis=1, keepdims=True))
            p = jnp.exp2(s - _lanes(m_new, width))
            alpha = jnp.exp2(m_old - m_new)
            weights[rows, :width] = p.astype(weights.dtype)
            self.m[head, rows] = m_new
            self.l[head, rows] = alpha * self.l[head, rows] + _lane_sums(p)
            self.acc[head, rows] = _lanes(alpha, self.acc.shape[2]) * self.acc[head, rows]
        v = values(head, start, width)
        self.acc[head] += jnp.dot(weights[:, :width], v, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The same with a column for each query of a head, made up to whole lanes: for MXUs that are 256 wide.

    Maxima and sums run down registers, and the product with the values has the weights, 256 keys by 256 queries, where
    the MXU holds one side of it. The MXU, the EUP and the VALU all have something to do: with a tile's scores go the
    weights of the tile that as many came before as a head has, and then the sums of one that was before that one: as
    many steps behind the weights as these have buffers. Scores need a head's tiles or more. What a step leaves in its
    buffer, the next one has taken before it is written again.
    """

    stands = True  # output() is [D, bq]

    bq: int
    q: Any  # [Hkv, 1 or 2, columns, D]: the item's queries by KV head; if 2, scaled and as a sum of two
    m: Any  # f32[Hkv, 1, columns]: running maximum of the scores
    acc: Any  # f32[Hkv, Dv + 8, columns]: running numerator; in each of 8 more rows, the sum of 2 ** (score - m)
    s: Any  # f32[…, segment, 256]: scores of a tile
    top: Any  # f32[…, 256]: maximum of what was seen and them
    p: Any  # […, segment, 256]: weights of a tile
    alpha: Any  # f32[…, 256]: factor of its numerator
    bias: Any  # f32[bkv, …]: what leaves an invisible key no weight; for some columns, which the others repeat

    @staticmethod
    def shapes(bq, num_kv_heads, rows, head_dim, value_dim, bkv, segment, dtype):
        f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
        columns = _align(rows, LANES)
        parts = 2 if head_dim == LANES and dtype == jnp.bfloat16 else 1
        tile, of_head = min(columns, TILE_COLUMNS), pl.cdiv(columns, TILE_COLUMNS)
        scores, weights = of_head, of_head
        if head_dim > LANES:  # the order that the compiler makes most of, and on TPU7x what its VMEM has room for
            scores, weights = (2 * of_head, of_head - 1) if _generation() == 6 else (of_head, of_head // 2)
            weights = max(weights, 1)
        return (
            pltpu.VMEM((num_kv_heads, parts, columns, head_dim), dtype),
            *(f32((num_kv_heads, 1, columns)), f32((num_kv_heads, value_dim + 8, columns))),
            *(f32((scores, segment, tile)), f32((scores, tile))),
            *(pltpu.VMEM((weights, segment, tile), dtype), f32((weights, tile))),
            f32((bkv, columns if bq % TILE_COLUMNS and TILE_COLUMNS % bq else min(max(bq, TILE_COLUMNS), columns))),
        )

    @property
    def _value_dim(self):
        return self.acc.shape[1] - 8

    @property
    def _splits(self):
        return self.q.shape[1] == 2

    def take(self, call, head, rows):
        head, columns = _of_head(call, self.bq, head)
        if self._splits:
            rows *= call.options.scale
        self.q[head, 0, columns] = high = rows.astype(self.q.dtype)
        if self._splits:  # the MXU multiplies both parts of a sum of two in the time of one: it would be half empty
            self.q[head, 1, columns] = (rows - high.astype(jnp.float32)).astype(high.dtype)

    def reset(self, call, head):
        """All of a KV head, at its last query head."""
        head, i = divmod(head, call.group)
        if i + 1 < call.group:
            return
        self.m[head] = jnp.full_like(self.m[head], call.options.mask_value)
        self.acc[head] = jnp.zeros_like(self.acc[head])
        if call.sink is not None:
            sums = self.acc.at[head, pl.ds(self._value_dim, 8)]
            sums[...] = jnp.ones_like(sums)
            columns = self.m.shape[2]
            of_group = jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1) // self.bq
            for i in range(call.group):
                sink = _lanes(call.sink[pl.ds(head * call.group + i, 1), :], columns)
                self.m[head] = jnp.where(of_group == i, sink, self.m[head])

    def output(self, call, head):
        value_dim = self._value_dim
        head, columns = _of_head(call, self.bq, head)
        out = _output(call, self.acc[head, :value_dim, columns], self.acc[head, pl.ds(value_dim, 1), columns])
        if value_dim < self.q.shape[3]:
            out = jnp.concatenate([jnp.zeros_like(out), out])  # in lanes 64 to 127 of what is merged
        return out

    def add(self, call, keys, values, width, masked):
        columns = self.acc.shape[2]
        tiles = [pl.ds(i, min(TILE_COLUMNS, columns - i)) for i in range(0, columns, TILE_COLUMNS)]
        if masked is not None:
            bias = self.bias.at[pl.ds(0, width)]
            key, column = (jax.lax.broadcasted_iota(jnp.int32, bias.shape, axis) for axis in (0, 1))
            visible = _visible(call, jax.lax.rem(column, self.bq), key, *masked)
            bias[...] = jnp.where(visible, 0.0, call.options.mask_value)
        segments = _segments(width, self.s.shape[1])
        steps = [(head, *of, tile) for head in range(call.num_kv_heads) for of in segments for tile in tiles]
        weighed = len(tiles)  # so many steps behind the scores
        summed = weighed + self.p.shape[0]
        count = len(steps) + summed
        scores = call.num_kv_heads * columns * self.bias.shape[0]
        together = count if scores <= BLOCK_SCORES else max(BLOCK_SCORES // (segments[0][1] * tiles[0].size), 1)

        def some(first):
            k = v = None
            for i in range(first, min(first + together, count)):
                if i >= summed:
                    head, start, width, tile = steps[i - summed]
                    if v is None or tile == tiles[0]:
                        v = self._with_ones(_for_lhs(values(head, start, width)).T[-self._value_dim :])
                    self._sum_up(head, v, width, tile, i - summed)
                if weighed <= i < len(steps) + weighed:
                    head, _, width, tile = steps[i - weighed]
                    self._weigh(head, tile, width, i - weighed)
                if i < len(steps):
                    head, start, width, tile = steps[i]
                    if k is None or tile == tiles[0]:
                        k = _for_lhs(keys(head, start, width))
                        k = jnp.concatenate([k] * 2, axis=1) if self._splits else k
                    self._score(call, head, k, start, width, tile, masked, i)

        for first in range(0, count, together):
            some(first) if together == count else _in_a_basic_block(call, functools.partial(some, first))

    @staticmethod
    def _with_ones(values):
        """Rows of ones below ``[Dv, width]``, so that the MXU also sums the weights."""
        return jnp.concatenate([values, jnp.ones((8, values.shape[1]), values.dtype)], axis=0)

    def _score(self, call, head, keys, start, width, tile, masked, step):
        q = jnp.concatenate([self.q[head, part, tile] for part in range(self.q.shape[1])], axis=1)
        products = jax.lax.dot_general(keys, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        s = call.scores(products, self._splits)
        if masked is not None:
            s += self.bias[pl.ds(start, width), pl.ds(tile.start % self.bias.shape[1], tile.size)]
        at = step % self.s.shape[0]
        self.s[at, :width, : tile.size] = s
        self.top[pl.ds(at, 1), : tile.size] = jnp.maximum(self.m[head, :, tile], jnp.max(s, axis=0, keepdims=True))

    def _weigh(self, head, tile, width, step):
        at = step % self.s.shape[0]
        m_old, m_new = self.m[head, :, tile], self.top[pl.ds(at, 1), : tile.size]
        alpha = jnp.exp2(m_old - m_new)
        p = jnp.exp2(self.s[at, :width, : tile.size] - m_new)
        at = step % self.p.shape[0]
        self.p[at, :width, : tile.size] = p.astype(self.p.dtype)
        self.m[head, :, tile], self.alpha[pl.ds(at, 1), : tile.size] = m_new, alpha

    def _sum_up(self, head, values, width, tile, step):
        at = step % self.p.shape[0]
        weighed = jnp.dot(values, self.p[at, :width, : tile.size], preferred_element_type=jnp.float32)
        self.acc[head, :, tile] = self.alpha[pl.ds(at, 1), : tile.size] * self.acc[head, :, tile] + weighed


def _lanes(x, width):
    """`x` whose LANES lanes of a row are equal, as `width` lanes."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (-(-width // LANES)), axis=1)[:, :width]


def _lane_max(x):
    """The same as _lane_sums for maxima."""
    tiles = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    if tiles[-1].shape[1] < LANES:
        pad = LANES - tiles[-1].shape[1]
        tiles[-1] = jnp.pad(tiles[-1], ((0, 0), (0, pad)), constant_values=DEFAULT_MASK_VALUE)
    return functools.reduce(jnp.maximum, tiles)


def _lane_sums(x):
    """Sums over the lanes `i`, `i + LANES`, … of each row: their sum is the row's, and no lane is crossed."""
    if x.shape[1] % LANES:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def _zero_padding(call, b):
    """Rows past the last sequence are padding: zeros, so that the output is a function of the inputs."""
    zeros = b.o_words if call.in_words else b.o
    zeros[...] = jnp.zeros_like(zeros)

    def for_copies(row, do):
        do(pltpu.make_async_copy(_output_of(call, b).at[pl.ds(0, 1)], call.o_hbm.at[pl.ds(row, 1)], b.out_sem))

    first, end = call.cu_q_lens[call.distribution[2]], call.num_tokens
    pl.loop(first, end)(lambda row: for_copies(row, _start))
    pl.loop(first, end)(lambda row: for_copies(row, _wait))


def _rpa_kernel(
    # scalars, prefetched into SMEM
    kv_lens_ref,
    page_indices_ref,
    cu_q_lens_ref,
    distribution_ref,
    # operands in HBM
    q_hbm,
    k_hbm,
    v_hbm,
    _cache_in_hbm,  # the same buffer as cache_hbm
    *others,  # the sinks in VMEM, where there are any; results in HBM; scratch
    options,
    num_q_heads,
    num_kv_heads,
    merged_kv,
    joined,
    sums,
):
    *sink, o_hbm, cache_hbm, decode_scratch, prefill_scratch = others
    call = _Call(
        kv_lens_ref,
        page_indices_ref,
        cu_q_lens_ref,
        distribution_ref,
        q_hbm,
        k_hbm,
        v_hbm,
        o_hbm,
        cache_hbm,
        sink[0] if sink else None,
        options,
        num_q_heads,
        num_kv_heads,
        merged_kv,
        joined,
    )
    d = _Decode(*decode_scratch)
    *buffers, of_sums = prefill_scratch
    b = _Prefill(*buffers, None)
    b = dataclasses.replace(b, sums=sums(b.bq, *of_sums))
    decoding = _begin_decodes(call, d)
    decoding = _prefill_pass(call, b, functools.partial(_decode_some_blocks, call, d), decoding)
    _finish_decodes(call, d, decoding)
    _zero_padding(call, b)


def _padded_heads(num_heads, dtype):
    """The next number of heads that fills words and whole tiles of them, as XLA has them in HBM: 8 rows of 32 or 16
    bits. What the models have needs no padding, which would be copies of all queries and of the output."""
    heads_per_word = 4 // dtype.itemsize
    words, tile = -(-num_heads // heads_per_word), 4 if heads_per_word == 2 else 8
    return heads_per_word * (_align(words, tile) if words > 4 else 1 << (words - 1).bit_length())


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
    merged_kv=False,
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
    """Attention of each sequence's new tokens to its cached and new keys and values.

    Sequence ``s`` of the first ``distribution[2]`` owns rows ``cu_q_lens[s]:cu_q_lens[s + 1]`` of ``queries``; they are
    the last ``q_len`` of its ``kv_lens[s]`` tokens, so row ``i`` is at position ``p = kv_lens[s] - q_len + i`` and sees
    tokens ``0 … p``, with a sliding window the last ``sliding_window`` of them. Its output is

        v_scale * sum(w * v) / (sum(w) + exp(sink)),    w = exp(cap(sm_scale * q_scale * k_scale * q · k))

    where ``cap(x) = soft_cap * tanh(x / soft_cap)``. Where not given, scales are 1, and there is no cap and no sink.

    Args:
      queries: ``[T, Hq, D]`` bfloat16 or float32, ``Hq`` a multiple of ``Hkv``.
      keys, values: ``[T, Hkv, D]``, the new tokens' keys and values, of the cache's dtype.
      kv_cache: ``[P, page_size, ceil(2 * Hkv / pack), pack, align(D, 128)]`` with ``pack = 32 / bits of the dtype``:
        heads interleaved k0, v0, k1, v1 … over the two middle axes; bfloat16, float32, int8, float8_e4m3fn, of which a
        NaN is read as 480 before TPU7x, or float8_e5m2. Donate it: it is updated in place. With ``merged_kv`` it is
        ``[P, page_size, ceil(Hkv / pack), pack, 128]``: a row is a head's keys in lanes 0 to 63 and its values in the
        others, half as many bytes.
      kv_lens: ``i32[S]``, tokens of each sequence in the cache, the new ones counted.
      page_indices: ``i32[S * pages_per_seq]``, the pages of sequence ``s`` from ``s * pages_per_seq`` on; those before
        the windows of all queries are never read.
      cu_q_lens: ``i32[S + 1]``, running sum of the new tokens; zero-length sequences may stand anywhere.
      distribution: ``i32[3]``, (end of decodes, end of prefills, total). Entries past ``total`` are never read.
      use_causal_mask: if False, every query sees all ``kv_lens[s]`` tokens; the new ones are then brought into the
        cache by XLA, before the kernel runs.
      update_kv_cache: if False, the cache is handed back as it came: the kernel works on a copy.
      skip_kv_mask: with ``use_causal_mask=False`` only; nothing is masked here that need not be, so it changes nothing.
      merged_kv: whether that is the cache's layout; for head_dim 64 only.
      sm_scale: factor of the scores, usually ``D ** -0.5``.
      sliding_window: how many tokens a query sees at most, itself counted. What lies before costs no time.
      soft_cap: bound of the scores' magnitude.
      attention_sink: ``f32[Hq]``, a score a head that takes part in the sum of the weights and has no value.
      out_dtype: dtype of the output, bfloat16 or float32; that of ``queries`` if None.
      mask_value: score of an invisible position; finite.
      q_scale: queries are divided by it and rounded to the cache's dtype, and the scores multiplied by it.
      k_scale, v_scale: what cached keys and values are multiplied by.
      chunk_prefill_size: accepted as the engines give it; prefills of any length take the same path here.
      d_block_sizes, p_block_sizes, m_block_sizes: (queries, KV tokens, …) a block, for decodes, for prefills and, where
        the former are not given, for mixed batches; the compute sizes that may follow are the kernel's own. KV tokens
        must be whole pages.
      vmem_limit_bytes: VMEM that the compiler may use; 96 MiB, or all that the chip has, if None. Block sizes that are
        not given are halved until they fit.
      debug_mode: the chip checks the bounds of copies.

    Returns:
      ``(out[T, Hq, D], kv_cache)``; rows of ``out`` that belong to no sequence are zero.

    Raises:
      ValueError: an argument's shape, dtype or value does not fit; the message names it.
    """
    _validate(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, merged_kv)
    _validate_options(
        attention_sink=(attention_sink, queries.shape[1]),
        at_least_one={"sliding_window": sliding_window, "chunk_prefill_size": chunk_prefill_size},
        positive={"soft_cap": soft_cap, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale},
        finite={"sm_scale": sm_scale, "mask_value": mask_value},
        block_sizes={"d_block_sizes": d_block_sizes, "p_block_sizes": p_block_sizes, "m_block_sizes": m_block_sizes},
        page_size=kv_cache.shape[1],
        out_dtype=out_dtype,
    )
    if skip_kv_mask and use_causal_mask:
        raise ValueError("ragged_paged_attention: skip_kv_mask needs use_causal_mask=False")
    num_tokens, num_q_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    _, page_size, kv_rows, pack, padded_dim = kv_cache.shape
    out_dtype = jnp.dtype(queries.dtype if out_dtype is None else out_dtype)
    compute_dtype = _compute_dtype(kv_cache.dtype)
    options = _Options(
        sm_scale=sm_scale * (q_scale or 1.0) * (k_scale or 1.0),
        mask_value=DEFAULT_MASK_VALUE if mask_value is None else mask_value,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        v_scale=v_scale or 1.0,
        causal=use_causal_mask,
    )
    if q_scale is not None:
        queries = _rounded(queries / q_scale, kv_cache.dtype)
    given_cache = kv_cache
    if merged_kv:
        keys = values = jnp.concatenate([keys, values], axis=2)
    if not use_causal_mask:
        arrays = kv_cache, keys, values, kv_lens, page_indices, cu_q_lens, distribution
        kv_cache = _with_new_tokens(*arrays, merged_kv=merged_kv)

    def padded(array):
        heads = (0, _padded_heads(array.shape[1], array.dtype) - array.shape[1])
        return jnp.pad(array, ((0, 0), heads, (0, padded_dim - array.shape[2])))

    q = padded(queries.astype(compute_dtype))
    joined = merged_kv or (num_kv_heads == 1 and pack > 1)  # two copies and pads less by XLA
    if joined and not merged_kv:
        lanes = (0, 0), (0, 0), (0, padded_dim - head_dim)
        keys = values = jnp.pad(_one_heads_words(keys, values), lanes)
    else:
        keys, values = padded(keys), padded(values)
    heads, tiles = q.shape[1], padded_dim // LANES
    q_words, out_words = (heads * dtype.itemsize // 4 for dtype in (q.dtype, out_dtype))
    in_words = tiles == 1
    if in_words:
        q = q.reshape(num_tokens, q_words, -1, padded_dim)
    q_token = (_odd(q_words), *q.shape[2:]) if in_words else q.shape[1:]
    new_token = (1, 1, *keys.shape[1:]) if joined else (tiles, 1, keys.shape[1], LANES)
    new_words = 0 if joined else 2 * _odd(keys.shape[1] * keys.dtype.itemsize // 4)
    moved_words = 0 if in_words else max(_odd(q_words), new_words)
    o_token = (out_words, heads // out_words, padded_dim) if in_words else (heads, padded_dim)

    token_bytes = kv_rows * pack * padded_dim * kv_cache.dtype.itemsize
    own_bkv = _block_tokens(KV_BLOCK_PAGES, page_size)
    value_dim = head_dim if merged_kv else padded_dim
    beside = _words_beside(kv_cache.shape, merged_kv)
    columns_per_token = kv_rows * pack // _values_of_column(beside, merged_kv)
    key_dim = max(beside * (LANES // 2 if merged_kv else LANES), padded_dim)
    # Wide sums are scaled half as often in blocks twice as long; beside an option's own needs, TPU7x lacks the VMEM,
    # and its compiler the time where keys and values have 8 bits.
    is_plain = sliding_window is None and soft_cap is None and attention_sink is None and kv_cache.dtype.itemsize > 1
    is_long = _generation() == 6 or (_generation() >= 7 and is_plain)
    if is_long and tiles > 1 and own_bkv * token_bytes <= 2 * 2**20:
        own_bkv *= 2
    own_bq, group = Q_BLOCK_TOKENS, num_q_heads // num_kv_heads
    fills_block = 2 * own_bq * num_q_heads * own_bkv <= BLOCK_SCORES
    if _generation() >= 6 and (2 * own_bq * group <= MAX_ROWS or fills_block):
        own_bq *= 2
    while _generation() < 6 and own_bq * num_q_heads * padded_dim > MAX_VALUES and own_bq * group > 2 * TILE_COLUMNS:
        own_bq //= 2
    given_bq, given_bkv = (p_block_sizes or m_block_sizes or (None, None))[:2]
    segment = own_bkv if given_bkv is None else given_bkv
    unpacked = 2 if kv_cache.dtype.itemsize == 1 else 1  # by the same basic block
    own_bkv *= _num_segments(num_kv_heads, own_bq * num_q_heads * own_bkv * unpacked)
    longest = page_indices.shape[0] // kv_lens.shape[0] * page_size
    decode_bkv = _decode_block_tokens(token_bytes, page_size, kv_rows)
    if sliding_window is not None:
        decode_bkv = _window_block_tokens(sliding_window, decode_bkv, page_size, kv_rows, tiles)
    own = min(decode_bkv, longest), own_bkv, min(own_bq, num_tokens)
    given = (d_block_sizes or (1, None))[1], given_bkv, given_bq and min(given_bq, num_tokens)
    sums = _Columns if _generation() >= 6 else _Rows

    def scratch(decode_buffers, decode_bkv, bkv, bq):
        value_words, part = (), _part_tokens(decode_bkv, kv_rows, tiles)
        if merged_kv and beside > 1:
            value_words = (pltpu.VMEM((beside // 2, part * kv_rows // beside, LANES), jnp.uint32),)
        return [
            (
                pltpu.VMEM((decode_buffers, 1, *q.shape[1:]), q.dtype),
                *(pltpu.VMEM((decode_buffers, *new_token), keys.dtype) for _ in range(2)),
                pltpu.VMEM((decode_buffers, decode_bkv, kv_rows, pack, padded_dim), kv_cache.dtype),
                pltpu.VMEM((heads, key_dim), q.dtype),
                pltpu.VMEM((DECODE_RESULTS, tiles, _odd(kv_rows), LANES), jnp.uint32),
                pltpu.VMEM((DECODE_RESULTS, 1, _odd(out_words), LANES), jnp.uint32)
                if in_words
                else pltpu.VMEM((DECODE_RESULTS, 1, heads, padded_dim), out_dtype),
                *(pltpu.VMEM((heads, LANES), jnp.float32) for _ in range(4)),
                pltpu.VMEM((heads, key_dim), jnp.float32),
                *(pltpu.VMEM((heads, part * columns_per_token), jnp.float32) for _ in range(2)),
                pltpu.SemaphoreType.DMA((decode_buffers,)),
                pltpu.SemaphoreType.DMA((DECODE_RESULTS,)),
                *value_words,
            ),
            (
                pltpu.VMEM((2, bq, *q_token), q.dtype),
                pltpu.VMEM((2, bq, *keys.shape[1:]), keys.dtype),
                pltpu.VMEM((2, bq, *keys.shape[1:]), keys.dtype),
                pltpu.VMEM((tiles, bq * _odd(kv_rows), LANES), jnp.uint32),
                pltpu.VMEM((tiles, max(bq * moved_words, 8), LANES), jnp.uint32),
                pltpu.VMEM((tiles, bq * _odd(out_words), LANES), jnp.uint32),
                pltpu.VMEM((1, 1, LANES) if in_words else (bq, *o_token), out_dtype),
                pltpu.VMEM((2, bkv, _odd(kv_rows), pack, padded_dim), kv_cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA,
                sums.shapes(bq, num_kv_heads, group * bq, padded_dim, value_dim, bkv, min(segment, bkv), q.dtype),
            ),
        ]

    vmem_limit_bytes = vmem_limit_bytes or min(getattr(_chip(), "vmem_capacity_bytes", VMEM_BYTES), VMEM_BYTES)
    scratch_shapes = scratch(*_fitting(scratch, vmem_limit_bytes, own, given, page_size))
    sinks = ()
    if attention_sink is not None:
        sink = jnp.pad(attention_sink * LOG2_E, (0, heads - num_q_heads))
        sinks = (jnp.broadcast_to(sink[:, None], (heads, LANES)),)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    out, new_cache = pl.pallas_call(
        functools.partial(
            _rpa_kernel,
            options=options,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            merged_kv=merged_kv,
            joined=joined,
            sums=sums,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[hbm, hbm, hbm, hbm, *(pl.BlockSpec(memory_space=pltpu.VMEM) for _ in sinks)],
            out_specs=[hbm, hbm],
            scratch_shapes=scratch_shapes,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, *o_token), out_dtype),
            jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype),
        ],
        input_output_aliases={7: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=not debug_mode,
        ),
        name=KERNEL_NAME,
    )(kv_lens, page_indices, cu_q_lens, distribution, q, keys, values, kv_cache, *sinks)
    out = out.reshape(num_tokens, heads, padded_dim)
    first = head_dim if merged_kv else 0  # where a row has its values
    return out[:, :num_q_heads, first : first + head_dim], new_cache if update_kv_cache else given_cache


def _block_tokens(pages_of_32, page_size):
    """Tokens of a KV block of so many pages of 32 tokens, in whole pages of the size at hand."""
    return max(pages_of_32 * 32 // page_size, 1) * page_size


def _num_segments(num_kv_heads, scores):
    """Of how many segments, each with so many `scores`, a prefill's KV block is: two or more where KV heads are few.

    They are in work together as heads are: one segment's scores are computed while another's are weighed.
    """
    in_work = SEGMENTS_OF_COLUMNS if _generation() >= 6 else SEGMENTS_OF_ROWS
    for count, most in ((4, BLOCK_SCORES // 2), (2, BLOCK_SCORES)):
        if count * num_kv_heads <= in_work and count * scores <= most:
            return count
    return 1


def _decode_block_tokens(token_bytes, page_size, kv_rows):
    """Tokens of a KV block of a decode, in whole pages: what a step costs besides its bytes must not count.

    With 8 KV heads of 128 in bfloat16 a token has 4 KiB, DECODE_BLOCK_PAGES of 32 tokens 2 MiB; four times as much on
    chips whose HBM is that fast. Blocks are whole chunks where they have as many tokens.
    """
    block_bytes = DECODE_BLOCK_PAGES * 32 * 4096 * (4 if _generation() >= 7 else 1)
    unit = math.lcm(page_size, _chunk_tokens(kv_rows))
    unit = unit if unit * token_bytes <= block_bytes else page_size
    return max(block_bytes // (token_bytes * unit), 1) * unit


def _chunk_tokens(kv_rows):
    """The fewest tokens that are whole chunks."""
    return CHUNK_WORDS // math.gcd(CHUNK_WORDS, kv_rows)


def _window_block_tokens(sliding_window, most, page_size, kv_rows, tiles):
    """Tokens of a KV block of a decode with a window: of blocks with `most` tokens and parts at most it has as few as
    can be, all of a size, in whole chunks."""
    page_size = _decode_page_tokens(page_size, sliding_window)
    span = sliding_window - 1 + page_size
    count = pl.cdiv(span, min(most, PART_WORDS // (kv_rows * tiles)))
    return min(_align(pl.cdiv(span, count), math.lcm(_chunk_tokens(kv_rows), page_size)), most)


def _fitting(scratch, vmem_limit_bytes, own, given, page_size):
    """(decode_buffers, decode_bkv, bkv, bq): those `given`, and of the kernel's `own` what VMEM has room for.

    Where the buffers of `scratch(…)` need more, decodes have one KV block less. Where that is not enough, the own
    sizes are halved, the decodes' until they are those of prefills, since theirs cost least, then all in turn, while
    half a KV block is whole pages and whole LANES.
    """
    sizes = [own_size if size is None else size for own_size, size in zip(own, given, strict=True)]
    units = math.lcm(page_size, LANES), math.lcm(page_size, LANES), 8
    turn = 0

    def fit(decode_buffers):
        return _vmem_bytes(scratch(decode_buffers, *sizes)) <= vmem_limit_bytes - COMPILERS_OWN_BYTES

    decode_buffers = DECODE_BUFFERS if fit(DECODE_BUFFERS) else DECODE_BUFFERS - 1
    while not fit(decode_buffers):
        can = [i for i in range(3) if given[i] is None and sizes[i] % (2 * units[i]) == 0]
        if not can:
            break
        larger = 0 in can and sizes[0] > sizes[1]
        i = 0 if larger else next((i for i in can if i >= turn), can[0])
        sizes[i] //= 2
        turn = turn if larger else (i + 1) % 3
    return decode_buffers, *sizes


def _vmem_bytes(buffers):
    """Bytes of scratch buffers in VMEM: in tiles of 128 lanes by 8 words, or fewer if a power of two holds the rows."""
    total = 0
    for buffer in jax.tree.leaves(buffers):
        if getattr(buffer, "memory_space", None) == pltpu.VMEM:
            *outer, rows, lanes = buffer.shape
            itemsize = jnp.dtype(buffer.dtype).itemsize
            tile = min(32 // itemsize, max(1 << (rows - 1).bit_length(), 4 // itemsize))
            total += math.prod(outer) * _align(rows, tile) * _align(lanes, LANES) * itemsize
    return total


def _chip():
    """What is known of the chip that is compiled for; None where that is no TPU."""
    try:
        return pltpu.get_tpu_info()
    except ValueError:
        return None


def _generation():
    """The chip's generation; 0 where that is no TPU."""
    return getattr(_chip(), "generation", 0)


def _one_heads_words(keys, values):
    """New tokens of one KV head ``[T, 1, D]`` as the cache has them: ``u32[T, 1, D]``, keys in the low bits."""
    bits = 8 * keys.dtype.itemsize
    low, high = (jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32) for x in (keys, values))
    return low | high << bits


def _rounded(x, dtype):
    """The nearest values that `dtype` has."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.clip(jnp.round(x), jnp.iinfo(dtype).min, jnp.iinfo(dtype).max).astype(dtype)
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -limit, limit).astype(dtype)


def _with_new_tokens(kv_cache, keys, values, kv_lens, page_indices, cu_q_lens, distribution, *, merged_kv):
    """The cache with the new tokens in their slots, by XLA."""
    num_tokens = keys.shape[0]
    num_pages, page_size, rows, pack, padded_dim = kv_cache.shape
    seq_ends = jnp.where(jnp.arange(kv_lens.shape[0]) < distribution[2], cu_q_lens[1:], cu_q_lens[distribution[2]])
    token = jnp.arange(num_tokens)
    seq = jnp.minimum(jnp.sum(token[:, None] >= seq_ends, axis=1), kv_lens.shape[0] - 1)
    position = kv_lens[seq] - cu_q_lens[seq + 1] + token
    page = page_indices[seq * (page_indices.shape[0] // kv_lens.shape[0]) + position // page_size]
    slot = jnp.where(token < cu_q_lens[distribution[2]], page * page_size + position % page_size, num_pages * page_size)
    new = keys if merged_kv else jnp.stack([keys, values], axis=2).reshape(num_tokens, -1, keys.shape[2])
    new = jnp.pad(new, ((0, 0), (0, rows * pack - new.shape[1]), (0, padded_dim - new.shape[2])))
    slots = kv_cache.reshape(num_pages * page_size, rows, pack, padded_dim)
    return slots.at[slot].set(new.reshape(num_tokens, rows, pack, padded_dim), mode="drop").reshape(kv_cache.shape)


def _validate_options(*, attention_sink, at_least_one, positive, finite, block_sizes, page_size, out_dtype):
    def require(condition, message):
        if not condition:
            raise ValueError(f"ragged_paged_attention: {message}")

    sink, num_q_heads = attention_sink
    if sink is not None:
        told = f"attention_sink must be f32[{num_q_heads}], one a query head"
        require(hasattr(sink, "dtype"), f"{told}, got {sink!r}")
        require(sink.shape == (num_q_heads,) and sink.dtype == jnp.float32, f"{told}, got {sink.dtype}{sink.shape}")
    for name, value in at_least_one.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        require(value is None or (whole and value >= 1), f"{name} must be a whole number of at least 1, got {value!r}")
    for name, value in (positive | finite).items():
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        require(value is None or (number and math.isfinite(value)), f"{name} must be finite, got {value!r}")
        require(value is None or name in finite or value > 0, f"{name} must be positive, got {value!r}")
    for name, sizes in block_sizes.items():
        whole = sizes is None or all(isinstance(size, int | np.integer) and size >= 1 for size in sizes)
        require(whole and (sizes is None or len(sizes) >= 2), f"{name} must be (queries, KV tokens, …), got {sizes!r}")
        require(
            sizes is None or sizes[1] % page_size == 0,
            f"{name}: {sizes and sizes[1]} KV tokens are not whole pages of {page_size}",
        )
    require(
        out_dtype is None or jnp.dtype(out_dtype) in (jnp.bfloat16, jnp.float32),
        f"out_dtype must be bfloat16 or float32, got {out_dtype}",
    )


def _validate(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, merged_kv):
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
    require(kv_cache.dtype in CACHE_DTYPES, f"kv_cache must be one of {CACHE_NAMES}, got {kv_cache.dtype}")
    for name, array in (("keys", keys), ("values", values)):
        require(array.dtype == kv_cache.dtype, f"{name} are {array.dtype}, kv_cache {kv_cache.dtype}")
    pack = 32 // (8 * kv_cache.dtype.itemsize)
    require(not merged_kv or head_dim == LANES // 2, f"merged_kv needs head_dim {LANES // 2}, got {head_dim}")
    expected = (-(-(1 if merged_kv else 2) * num_kv_heads // pack), pack, _align(head_dim, LANES))
    heads = f"{num_kv_heads} KV heads of {head_dim} {kv_cache.dtype}{', merged' if merged_kv else ''}"
    require(kv_cache.shape[2:] == expected, f"kv_cache {kv_cache.shape} must end in {expected} for {heads}")
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
DTYPE = jnp.bfloat16  # of queries and output
KV_DTYPE = jnp.bfloat16  # of the cache, and of new keys and values
PACK = 4 // jnp.dtype(KV_DTYPE).itemsize  # of those in 32 bits
MERGED_KV = HEAD_DIM == LANES // 2  # a row of the cache is a head's keys and values, beside each other
SM_SCALE = HEAD_DIM**-0.5
SLIDING_WINDOW = None  # tokens that a query sees at most; None: all before it

# name → keyword arguments of generate_inputs, compute_flops, compute_bytes and get_tiling_meta. `batch` names how the
# lengths are drawn (see _lengths), the rest are shapes: token rows, sequence slots, pages in the pool, tokens a page.
WORKLOADS = {
    "decode": {"batch": "decode", "num_tokens": 64, "num_seqs": 64, "num_pages": 4096, "page_size": 32},
    "prefill": {"batch": "prefill", "num_tokens": 8192, "num_seqs": 8, "num_pages": 512, "page_size": 32},
    "mixed": {"batch": "mixed", "num_tokens": 2048, "num_seqs": 64, "num_pages": 4096, "page_size": 32},
}
# name → what a check set changes in each workload; every shape stays, so that the artifact that is timed is checked.
# None is drawn by the judge, anew for each judging; `races` is also what the strict interpreter runs.
CHECKS = {
    "edges": {"batch": "edges", "poison": True},
    "holdout": {"batch": "short", "poison": True, "draw": None},
    "races": {"batch": "races", "poison": True, "magnitude": 64.0},
    "long": {"batch": "long", "poison": True},
}
# One entry an output: bfloat16 attention against a float32 oracle; the cache must agree to the bit.
TOLERANCE = ({"rtol": 0.01, "atol": 0.004}, 0)

MAX_CONTEXT = 8192


def _lengths(*, batch, num_tokens, num_seqs, num_pages, page_size, poison=False, draw=5, magnitude=1.0):
    """(q_lens, kv_lens, num_decodes): tokens of each live sequence, new and in all. A pure function."""
    del poison, magnitude
    rng = np.random.default_rng(draw)
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
    elif batch == "races":
        # Few tokens, but several KV blocks and an unfinished one: every buffer is used again.
        q_lens = np.array([1, 0, min(num_tokens // 2, 9)])
        kv_lens = np.array([min(num_pages * page_size // 4, 1100), 0, min(num_pages * page_size // 4, 77)])
        num_decodes = 1
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

    def normal(dtype, rows, *shape, scale=1.0):
        # A prime number of random rows, repeated, is as good as more of them: no block and no page is as long.
        some = scale * rng.standard_normal((min(rows, 1021), *shape), dtype=np.float32)
        return np.resize(some.astype(dtype), (rows, *shape))

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

    of_token, width = (NUM_KV_HEADS, 2 * HEAD_DIM) if MERGED_KV else (2 * NUM_KV_HEADS, HEAD_DIM)
    pattern = normal(KV_DTYPE, 61, page_size, -(-of_token // PACK), PACK, width)  # pages, repeated in the same way
    kv_cache = np.resize(pattern, (num_pages, *pattern.shape[1:]))
    queries = normal(DTYPE, num_tokens, NUM_Q_HEADS, HEAD_DIM, scale=workload.get("magnitude", 1.0))
    keys = normal(KV_DTYPE, num_tokens, NUM_KV_HEADS, HEAD_DIM)
    values = normal(KV_DTYPE, num_tokens, NUM_KV_HEADS, HEAD_DIM)
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
    arrays = queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution
    return ragged_paged_attention(*arrays, merged_kv=MERGED_KV, sm_scale=SM_SCALE, sliding_window=SLIDING_WINDOW)


def reference_fn(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """The same in float32, one sequence and one KV head at a time; the cache update is a plain assignment."""
    queries, keys, values = (np.asarray(array) for array in (queries, keys, values))
    kv_lens, page_indices, cu_q_lens = (np.asarray(array) for array in (kv_lens, page_indices, cu_q_lens))
    cache = np.array(kv_cache)
    num_pages, page_size = cache.shape[:2]
    slots = cache.reshape(num_pages * page_size, -1, HEAD_DIM)  # [token slot, k0 v0 k1 v1 …, D]
    of_keys, of_values = (slice(first, 2 * NUM_KV_HEADS, 2) for first in (0, 1))
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
        slots[slot[positions], of_keys] = keys[start:end]
        slots[slot[positions], of_values] = values[start:end]
        for head in range(NUM_KV_HEADS):
            k = slots[slot, 2 * head].astype(np.float32)
            v = slots[slot, 2 * head + 1].astype(np.float32)
            for row in range(
                start, end, 256
            ):  # a few rows at a time, against what they see, stay in the processor's cache
                rows = slice(row, min(row + 256, end))
                seen = positions[rows.start - start : rows.stop - start]
                length = seen[-1] + 1
                q = queries[rows, head * group : (head + 1) * group].astype(np.float32) * np.float32(SM_SCALE)
                scores = q.reshape(-1, HEAD_DIM) @ k[:length].T
                last = np.repeat(seen, group)[:, None]
                hidden = token[:length] > last
                if SLIDING_WINDOW is not None:
                    hidden |= token[:length] <= last - SLIDING_WINDOW
                scores[hidden] = -np.inf
                scores -= scores.max(axis=1, keepdims=True)
                weights = np.exp(scores, out=scores)
                weights /= weights.sum(axis=1, keepdims=True)
                out[rows, head * group : (head + 1) * group] = (weights @ v[:length]).reshape(-1, group, HEAD_DIM)
    return out.astype(queries.dtype), cache


def compute_flops(**workload):
    """Multiply-adds of QK^T and PV over the visible (query, key) pairs, two FLOPs each."""
    q_lens, kv_lens, _ = _lengths(**workload)
    visible_pairs = (_pairs(kv_lens) - _pairs(kv_lens - q_lens)).sum()
    return int(2 * 2 * HEAD_DIM * NUM_Q_HEADS * visible_pairs)


def _pairs(lengths):
    """Visible (query, key) pairs of sequences all of whose tokens are queries."""
    hidden = 0 if SLIDING_WINDOW is None else np.maximum(lengths - SLIDING_WINDOW, 0)
    return lengths * (lengths + 1) // 2 - hidden * (hidden + 1) // 2


def compute_bytes(**workload):
    """HBM bytes that any kernel must move: queries in, output out, new keys and values in and into their slots, and
    the cached tokens that any query of a sequence sees, once."""
    q_lens, kv_lens, _ = _lengths(**workload)
    query_bytes = q_lens.sum() * NUM_Q_HEADS * HEAD_DIM * jnp.dtype(DTYPE).itemsize
    token_bytes = 2 * NUM_KV_HEADS * HEAD_DIM * jnp.dtype(KV_DTYPE).itemsize
    cached_tokens = np.where(q_lens > 0, kv_lens - q_lens, 0)
    if SLIDING_WINDOW is not None:
        cached_tokens = np.minimum(cached_tokens, SLIDING_WINDOW - 1)
    return int(2 * query_bytes + (2 * q_lens.sum() + cached_tokens.sum()) * token_bytes)


def get_tiling_meta(**workload):
    """What the tiles declare: for people to read, never for the verdict."""
    page_size = workload.get("page_size", 32)
    num_tokens = workload.get("num_tokens", 64)
    bq, bkv = min(Q_BLOCK_TOKENS, num_tokens), _block_tokens(KV_BLOCK_PAGES, page_size)
    rows = bq * NUM_Q_HEADS
    q_bytes = bq * NUM_Q_HEADS * HEAD_DIM * 2
    kv_bytes = bkv * 2 * NUM_KV_HEADS * HEAD_DIM * jnp.dtype(KV_DTYPE).itemsize
    return {
        "grid": (1,),
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
