"""kernel.py: ragged paged attention, interpreted on small shapes, against a float64 oracle of this file's own."""

import dataclasses
import functools
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import jaxpr_as_fun

import kernel
from judge import jax_shims

jax.config.update("jax_platforms", "cpu")  # whatever the machine has

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
INT8 = np.dtype(np.int8)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
# Of the float64 result, in units of its largest element: rounding of the output and of the weights.
TOLERANCE = {BF16: 1.5e-2, F32: 2e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What is compiled once; cases that share it share the program."""

    tokens: int = 40
    seqs: int = 6
    pages: int = 24
    page: int = 16
    pages_per_seq: int = 4
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 128
    dtype: Any = F32  # of queries, and of the output unless told
    out_dtype: Any = None
    mask_value: float | None = None
    cache_dtype: Any = None  # of keys, values and cache; that of the queries if None
    q_block: int = 8
    kv_pages: int | None = 1  # pages a KV block; None: blocks are the kernel's own
    vmem_limit_bytes: int | None = None
    sm_scale: float = 0.25
    sliding_window: int | None = None
    soft_cap: float | None = None
    sink: bool = False
    q_scale: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None
    use_causal_mask: bool = True
    update_kv_cache: bool = True
    merged_kv: bool = False

    @property
    def kv_dtype(self) -> Any:
        return self.cache_dtype or self.dtype

    @property
    def options(self) -> dict[str, Any]:
        names = ("out_dtype", "mask_value", "sliding_window", "soft_cap", "q_scale", "k_scale", "v_scale")
        names += ("use_causal_mask", "update_kv_cache", "merged_kv", "vmem_limit_bytes")
        blocks = self.kv_pages and (self.q_block, self.kv_pages * self.page)
        given = {name: getattr(self, name) for name in names} | {"d_block_sizes": blocks, "p_block_sizes": blocks}
        return given | {"sm_scale": self.sm_scale, "attention_sink": self.sinks}

    @property
    def sinks(self) -> Any:
        """Some count as much as all keys together, some hardly."""
        return np.linspace(-2, 6, self.kv_heads * self.group, dtype=F32) if self.sink else None

    @property
    def pack(self) -> int:
        return 4 // self.kv_dtype.itemsize

    def first_seen(self, position: int) -> int:
        return max(0, position - self.sliding_window + 1) if self.sliding_window else 0

    @property
    def rows_per_head(self) -> int:
        return 1 if self.merged_kv else 2

    @property
    def rows(self) -> int:
        return -(-self.rows_per_head * self.kv_heads // self.pack)

    def of_head(self, tokens: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a head in ``[…, rows * pack, padded_dim]``."""
        if self.merged_kv:
            return tokens[..., head, : self.head_dim], tokens[..., head, self.head_dim :]
        return tokens[..., 2 * head, : self.head_dim], tokens[..., 2 * head + 1, : self.head_dim]

    @property
    def padded_dim(self) -> int:
        return -(-self.head_dim // 128) * 128


def make_inputs(shape: Shape, q_lens: list[int], kv_lens: list[int], seed: int = 0, poison: bool = True) -> list[Any]:
    """Arguments of the kernel; `poison` puts NaN in all that belongs to no sequence. Metadata past the end: garbage."""
    rng = np.random.default_rng(seed)
    total, used = len(q_lens), sum(q_lens)
    assert used <= shape.tokens and total <= shape.seqs

    def normal(*dims: int, dtype: Any = shape.kv_dtype) -> np.ndarray:
        drawn = rng.standard_normal(dims)
        return (drawn * 40).round().clip(-128, 127).astype(INT8) if dtype == INT8 else drawn.astype(dtype)

    queries = normal(shape.tokens, shape.kv_heads * shape.group, shape.head_dim, dtype=shape.dtype)
    keys = normal(shape.tokens, shape.kv_heads, shape.head_dim)
    values = normal(shape.tokens, shape.kv_heads, shape.head_dim)
    cache = normal(shape.pages, shape.page, shape.rows, shape.pack, shape.padded_dim)
    if not shape.merged_kv:
        cache[..., shape.head_dim :] = 0
    nothing = 127 if shape.kv_dtype == INT8 else np.nan
    free = rng.permutation(shape.pages)
    table = rng.integers(2**20, 2**30, (shape.seqs, shape.pages_per_seq))
    tokens_in_page = np.zeros(shape.pages, int)
    taken = 0
    for seq, kv_len in enumerate(kv_lens):
        count = -(-kv_len // shape.page)
        table[seq, :count] = free[taken : taken + count]
        tokens_in_page[table[seq, :count]] = np.minimum(shape.page, kv_len - shape.page * np.arange(count))
        left_behind = shape.first_seen(kv_len - q_lens[seq]) // shape.page  # pages that an engine may have freed
        tokens_in_page[table[seq, :left_behind]] = 0
        if poison:
            table[seq, :left_behind] = 2**20
        taken += count
    if poison:
        for page, count in enumerate(tokens_in_page):
            cache[page, count:] = nothing
        queries[used:] = np.nan
        for array in (keys, values):
            array[used:] = nothing
    padded_kv_lens = rng.integers(2**20, 2**30, shape.seqs)
    padded_kv_lens[:total] = kv_lens
    cu_q_lens = rng.integers(2**20, 2**30, shape.seqs + 1)
    cu_q_lens[: total + 1] = np.concatenate([[0], np.cumsum(q_lens)])
    distribution = np.array([0, 0, total])
    metadata = (padded_kv_lens, table.reshape(-1), cu_q_lens, distribution)
    return [queries, keys, values, cache, *(array.astype(np.int32) for array in metadata)]


def expected(shape: Shape, inputs: list[Any], *, shift: int = 0, drop_last: bool = False) -> tuple[Any, Any]:
    """(float64 output, cache to the bit), token by token. `shift` and `drop_last` are mistakes to be noticed."""
    queries, keys, values, given, kv_lens, table, cu_q_lens, distribution = inputs
    cache = given.copy()
    table = table.reshape(shape.seqs, shape.pages_per_seq)
    flat = cache.reshape(shape.pages * shape.page, shape.rows * shape.pack, shape.padded_dim)
    out = np.zeros(queries.shape)
    if shape.q_scale:
        queries = (queries.astype(F32) / shape.q_scale).astype(shape.kv_dtype)
    scale = shape.sm_scale * (shape.q_scale or 1) * (shape.k_scale or 1)
    for seq in range(distribution[2]):
        start, end, kv_len = int(cu_q_lens[seq]), int(cu_q_lens[seq + 1]), int(kv_lens[seq])
        slots = [int(table[seq, i // shape.page]) * shape.page + i % shape.page for i in range(kv_len)]
        for row in range(start, end):
            slot = flat[slots[kv_len - (end - row)]]
            slot[shape.rows_per_head * shape.kv_heads :] = 0
            for head in range(shape.kv_heads):
                k, v = shape.of_head(slot, head)
                k[:], v[:] = keys[row, head], values[row, head]
        for row in range(start, end):
            position = kv_len - (end - row)
            last = position if shape.use_causal_mask else kv_len - 1
            first = min(shape.first_seen(position + shift), last)
            chosen = flat[slots[first : min(last + 1 + shift, kv_len)]].astype(np.float64)
            for q_head in range(shape.kv_heads * shape.group):
                head = q_head // shape.group
                k, v = shape.of_head(chosen, head)
                scores = k @ queries[row, q_head].astype(np.float64) * scale
                if shape.soft_cap:
                    scores = shape.soft_cap * np.tanh(scores / shape.soft_cap)
                if drop_last and len(scores) > 1:
                    scores[-1] = -np.inf
                sink = np.array([shape.sinks[q_head]] if shape.sink else [], np.float64)
                top = np.concatenate([scores, sink]).max()
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sink - top).sum()
                out[row, q_head] = weights @ v / total * (shape.v_scale or 1)
    return out, cache if shape.update_kv_cache else given


@pytest.fixture(params=["rows", "columns"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How scores lie: as for chips of a 128-wide MXU, and for the others."""
    monkeypatch.setattr(kernel, "_generation", lambda: 6 if request.param == "columns" else 5)
    return str(request.param)


@functools.lru_cache(maxsize=16)  # a program has some 1,050 mappings, and XLA crashes where 65,530 are used up
def program(shape: Shape, generation: int, block_scores: int) -> Any:
    """The kernel compiled, every pallas_call interpreted; it reads the generation and BLOCK_SCORES itself."""
    jax_shims.patch_interpreter()
    avals = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in make_inputs(shape, [], [])]

    def call(*arrays: Any) -> Any:
        return kernel.ragged_paged_attention(*arrays, **shape.options)

    lowered = jax.jit(jaxpr_as_fun(jax_shims.interpreted(jax.make_jaxpr(call)(*avals)))).lower(*avals)
    quick = {"xla_cpu_use_fusion_emitters": False}  # a third of the time to compile less
    return lowered.compile(compiler_options=jax_shims.CPU_COMPILER_OPTIONS | jax_shims.in_haste(avals) | quick)


def run(shape: Shape, inputs: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's output and cache."""
    compiled = program(shape, kernel._generation(), kernel.BLOCK_SCORES)
    out, cache = compiled(*(jnp.array(array, copy=True) for array in inputs))
    return np.asarray(out), np.asarray(cache)


def error_of(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error in units of the largest expected element; infinite where a value is not finite."""
    difference = np.abs(got.astype(np.float64) - want)
    return float("inf") if not np.isfinite(difference).all() else float(difference.max() / max(1.0, np.abs(want).max()))


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    """Equal to the bit; where both are NaN any bits do, since the CPU moves 8-bit ones through wider types."""
    differ = (got.view(f"u{got.itemsize}") != want.view(f"u{got.itemsize}")).nonzero()
    return bool(np.isnan(got[differ].astype(F32)).all() and np.isnan(want[differ].astype(F32)).all())


def check(shape: Shape, q_lens: list[int], kv_lens: list[int], seed: int = 0) -> None:
    inputs = make_inputs(shape, q_lens, kv_lens, seed)
    before = [array.copy() for array in inputs]
    out, cache = run(shape, inputs)
    want, want_cache = expected(shape, inputs)
    out_dtype = shape.out_dtype or shape.dtype
    assert out.shape == inputs[0].shape and out.dtype == out_dtype and cache.dtype == shape.kv_dtype
    assert error_of(out, want) < TOLERANCE[out_dtype]
    assert same_bits(cache, want_cache)
    assert not out[sum(q_lens) :].astype(np.float32).any()
    assert all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(inputs, before, strict=True))


BASE = Shape()
MERGED = dataclasses.replace(BASE, head_dim=64, merged_kv=True)
# (tokens of each sequence that are new, tokens of each sequence in all): page 16, at most 64 tokens a sequence.
RAGGED = {
    "one decode": ([1], [1]),
    "one decode with context": ([1], [50]),
    "one prefill": ([23], [23]),
    "one chunk": ([9], [40]),
    "decodes": ([1] * 6, [1, 2, 15, 16, 17, 64]),
    "prefills": ([7, 16, 17], [7, 16, 17]),
    "all rows": ([40], [40]),
    "all rows in two": ([17, 23], [64, 23]),
    "a page exactly": ([16], [16]),
    "a page and one": ([1], [17]),
    "less one than a page": ([15], [15]),
    "two pages exactly, chunk": ([16], [32]),
    "the longest": ([8], [64]),
    "new tokens across a page": ([5], [18]),
    "a query block exactly": ([8], [8]),
    "a query block and one": ([9], [9]),
    "mixed": ([1, 1, 12, 5, 1], [33, 64, 12, 37, 1]),
    "mixed the other way": ([12, 1, 5, 1, 1], [44, 20, 5, 1, 16]),
    "empty first": ([0, 3, 1], [0, 19, 8]),
    "empty in the middle": ([3, 0, 0, 5], [3, 0, 0, 30]),
    "empty last": ([3, 5, 0], [16, 5, 0]),
    "empty everywhere": ([0, 2, 0, 2, 0], [0, 2, 0, 18, 0]),
    "all empty": ([0, 0, 0], [0, 0, 0]),
    "no sequence": ([], []),
    "no new tokens but a context": ([2, 0, 2], [2, 33, 20]),
    "every slot of the batch": ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
    "window shifted back": ([35, 5], [35, 64]),
    "last rows one by one": ([37, 1, 1, 1], [37, 9, 10, 11]),
}


@pytest.mark.parametrize("case", RAGGED)
def test_ragged_batches(case):
    check(BASE, *RAGGED[case])


def test_values_do_not_leak_between_sequences():
    """Another context in one sequence changes no bit of the others."""
    first = make_inputs(BASE, [3, 4, 5], [20, 30, 40])
    second = [array.copy() for array in first]
    page = int(first[5].reshape(BASE.seqs, -1)[1, 0])
    second[3][page] += 1
    out_first, _ = run(BASE, first)
    out_second, _ = run(BASE, second)
    same = (out_first == out_second).reshape(BASE.tokens, -1).all(axis=1)
    assert same[:3].all() and not same[3:7].any() and same[7:].all()


@pytest.mark.parametrize("seed", range(8))
def test_drawn_batches(seed):
    rng = np.random.default_rng(seed)
    q_lens, kv_lens, pages = [], [], BASE.pages
    for _ in range(rng.integers(1, BASE.seqs + 1)):
        new = int(rng.integers(0, min(14, BASE.tokens - sum(q_lens)) + 1))
        kv_len = new + int(rng.integers(0, 50))
        if -(-kv_len // BASE.page) <= pages:
            pages -= -(-kv_len // BASE.page)
            q_lens.append(new)
            kv_lens.append(kv_len)
    check(dataclasses.replace(BASE, dtype=(BF16, F32)[seed % 2]), q_lens, kv_lens, seed=seed)


MISTAKES: list[dict[str, Any]] = [{"shift": 1}, {"drop_last": True}]


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_tolerance_notices_an_off_by_one(dtype):
    shape = dataclasses.replace(BASE, dtype=dtype)
    inputs = make_inputs(shape, [6, 1, 9], [20, 33, 9])
    out, _ = run(shape, inputs)
    assert error_of(out, expected(shape, inputs)[0]) < TOLERANCE[dtype] / 2
    for mistake in MISTAKES:
        wrong, _ = expected(shape, inputs, **mistake)
        assert error_of(out, wrong) > 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_decode_s_nan_stays_its_own(kv_heads):
    """One sequence's part is weighed while another's is scored, in the same buffers."""
    shape = dataclasses.replace(BASE, dtype=BF16, kv_heads=kv_heads)
    sound = make_inputs(shape, [1] * 5, [20, 30, 64, 17, 3])
    spoilt = [array.copy() for array in sound]
    for page in sound[5].reshape(shape.seqs, -1)[1, :2]:
        spoilt[3][page] = np.nan
    (out, _), (out_spoilt, _) = run(shape, sound), run(shape, spoilt)
    assert np.isnan(out_spoilt[1].astype(F32)).all()
    others = [0, 2, 3, 4]
    assert same_bits(out_spoilt[others], out[others]) and not np.isnan(out[others].astype(F32)).any()


MIXED = ([1, 0, 12, 5, 1], [33, 0, 12, 37, 17])
SHAPES = {
    "bfloat16": dataclasses.replace(BASE, dtype=BF16),
    "head_dim 64 bfloat16": dataclasses.replace(BASE, head_dim=64, dtype=BF16),
    "merged": MERGED,
    "merged bfloat16": dataclasses.replace(MERGED, dtype=BF16),
    "merged bfloat16, one KV head": dataclasses.replace(MERGED, dtype=BF16, kv_heads=1, group=8),
    "merged bfloat16, three KV heads": dataclasses.replace(MERGED, dtype=BF16, kv_heads=3, kv_pages=2),
    "merged bfloat16, eight KV heads": dataclasses.replace(MERGED, dtype=BF16, kv_heads=8),
    "merged int8": dataclasses.replace(
        MERGED, dtype=BF16, cache_dtype=INT8, kv_heads=6, k_scale=1 / 40, v_scale=1 / 20
    ),
    "merged float8_e4m3fn": dataclasses.replace(
        MERGED, dtype=BF16, cache_dtype=E4M3, q_scale=0.5, k_scale=2.0, v_scale=3.0
    ),
    "merged, not causal": dataclasses.replace(MERGED, use_causal_mask=False, kv_pages=2),
    "head_dim 256 bfloat16": dataclasses.replace(BASE, head_dim=256, dtype=BF16),
    "group 1": dataclasses.replace(BASE, group=1),
    "group 8": dataclasses.replace(BASE, group=8, kv_heads=1),
    "group 1 bfloat16": dataclasses.replace(BASE, group=1, dtype=BF16),
    "group 4 bfloat16": dataclasses.replace(BASE, group=4, dtype=BF16),
    "group 8 bfloat16": dataclasses.replace(BASE, group=8, kv_heads=1, dtype=BF16),
    "one KV head, int8": dataclasses.replace(
        BASE, dtype=BF16, cache_dtype=INT8, kv_heads=1, group=4, k_scale=1 / 40, v_scale=1 / 20
    ),
    "one KV head, head_dim 256": dataclasses.replace(BASE, head_dim=256, dtype=BF16, kv_heads=1, group=4),
    "one KV head, head_dim 256, int8": dataclasses.replace(
        BASE, head_dim=256, dtype=BF16, cache_dtype=INT8, kv_heads=1, k_scale=1 / 40, v_scale=1 / 20
    ),
    "one KV head, head_dim 64": dataclasses.replace(BASE, head_dim=64, dtype=BF16, kv_heads=1, group=4),
    "20 query heads": dataclasses.replace(BASE, group=5, kv_heads=4, dtype=BF16),  # padded to 24
    "40 query heads": dataclasses.replace(BASE, group=5, kv_heads=8, dtype=BF16),
    "three KV heads": dataclasses.replace(BASE, kv_heads=3, dtype=BF16),
    "page 32": dataclasses.replace(BASE, page=32, pages=12, pages_per_seq=2),
    "page 8": dataclasses.replace(BASE, page=8, pages=48, pages_per_seq=8),
    "one token a block": dataclasses.replace(BASE, q_block=1),
    "all tokens a block": dataclasses.replace(BASE, q_block=256),
    "4 tokens, 4 pages a block": dataclasses.replace(BASE, q_block=4, kv_pages=4),
    "more pages a block than a sequence has": dataclasses.replace(BASE, kv_pages=8),
    "2 pages a block, bfloat16": dataclasses.replace(BASE, kv_pages=2, dtype=BF16),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_types_and_tiles(name):
    for seed in (1, 2):  # in one case, so that the program is compiled once
        check(SHAPES[name], *MIXED, seed=seed)


FEATURES = {
    "sliding window": dataclasses.replace(BASE, sliding_window=20),
    "sliding window, two pages a block": dataclasses.replace(BASE, sliding_window=11, kv_pages=2, dtype=BF16),
    "soft cap and sinks": dataclasses.replace(BASE, soft_cap=2.0, sink=True),
    "int8": dataclasses.replace(BASE, dtype=BF16, cache_dtype=INT8, k_scale=1 / 40, v_scale=1 / 20),
    "float8_e4m3fn, all options": dataclasses.replace(
        BASE, dtype=BF16, cache_dtype=E4M3, sliding_window=24, sink=True, soft_cap=3.0, q_scale=0.5, k_scale=2.0
    ),
    "float8_e5m2, group 4": dataclasses.replace(BASE, dtype=BF16, cache_dtype=E5M2, group=4, kv_heads=3, v_scale=3.0),
    "not causal": dataclasses.replace(BASE, use_causal_mask=False, kv_pages=2),
    "not causal, window": dataclasses.replace(BASE, use_causal_mask=False, sliding_window=9, dtype=BF16),
    "merged, all options": dataclasses.replace(
        MERGED, dtype=BF16, sliding_window=24, sink=True, soft_cap=3.0, kv_heads=4
    ),
    "cache as it came": dataclasses.replace(BASE, update_kv_cache=False, v_scale=0.5),
}


@pytest.mark.parametrize("case", RAGGED)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, case):
    check(FEATURES[name], *RAGGED[case])


@pytest.mark.parametrize(
    "name",
    ["sliding window", "int8", "float8_e4m3fn, all options", "merged, all options", "not causal, window"],
)
def test_the_tolerance_notices_an_off_by_one_of_a_feature(name):
    shape = FEATURES[name]
    inputs = make_inputs(shape, [6, 1, 9], [20, 33, 9], poison=False)
    out, _ = run(shape, inputs)
    assert error_of(out, expected(shape, inputs)[0]) < TOLERANCE[shape.dtype]
    for mistake in MISTAKES:
        assert error_of(out, expected(shape, inputs, **mistake)[0]) > 5 * TOLERANCE[shape.dtype]


@pytest.mark.parametrize(
    ("dtype", "window", "kv_heads", "merged_kv", "steps"),
    [(BF16, None, 2, False, 4), (BF16, 21, 4, False, 2), (INT8, 70, 4, False, 2), (BF16, None, 8, True, 2)],
)
def test_a_decode_s_last_block_in_parts(dtype, window, kv_heads, merged_kv, steps, monkeypatch):
    """Two parts a block: some whole, some seen in part, in all steps of it or fewer, some not at all."""
    shape = Shape(tokens=17, seqs=17, pages=60, pages_per_seq=8, kv_pages=4, dtype=BF16, cache_dtype=dtype)
    shape = dataclasses.replace(shape, kv_heads=kv_heads, merged_kv=merged_kv, head_dim=64 if merged_kv else 128)
    shape = dataclasses.replace(shape, sm_scale=0.2, sliding_window=window, k_scale=None if dtype == BF16 else 0.01)
    part_words = 32 * shape.rows
    sizes = {"PART_WORDS": part_words, "STEP_WORDS": part_words // steps, "CHUNK_WORDS": part_words // steps}
    for name, value in sizes.items():
        monkeypatch.setattr(kernel, name, value)
    check(shape, [1] * 17, [1, 7, 8, 9, 16, 17, 24, 25, 31, 32, 33, 64, 65, 95, 96, 97, 128])


@pytest.mark.parametrize(
    ("tokens", "rows", "head_dim", "steps"),
    [
        (1024, 8, 128, 4),
        (512, 8, 128, 2),
        (128, 8, 128, 2),
        (64, 8, 128, 1),  # one chunk
        (1024, 4, 256, 4),
        (768, 10, 128, 3),  # four are not whole chunks
        (1600, 10, 128, 1),
    ],
)
def test_a_masked_part_takes_the_steps_that_it_needs(tokens, rows, head_dim, steps):
    sizes, step = kernel._steps(tokens, rows, head_dim // 128), tokens // steps
    assert sizes == list(range(step, tokens + 1, step))
    for end in sorted({-1, 0, *(i * step + j for i in range(steps + 1) for j in (-1, 0, 1)), 3 * tokens}):
        chosen = []
        with jax.disable_jit():  # else both branches of a condition are traced
            kernel._by_size(end, sizes, chosen.append)
        assert chosen == [min(max(-(-end // step), 1), steps) * step]


@pytest.mark.parametrize("window", [1, 8, 21])
def test_a_decode_begins_where_its_window_does(window, monkeypatch):
    """With a part of a page of 32; its blocks are one or two, seen in part or not at all before the window."""
    sizes = {"WINDOW_PAGE_TOKENS": 8, "CHUNK_WORDS": 16, "PART_WORDS": 32, "KV_BLOCK_PAGES": 2, "Q_BLOCK_TOKENS": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(kernel, name, value)
    shape = Shape(tokens=16, seqs=10, pages=30, page=32, dtype=BF16, kv_pages=None, sliding_window=window)
    check(shape, [1, 1, 1, 1, 1, 1, 1, 1, 4, 1], [1, 7, 8, 9, 28, 29, 65, 96, 100, 128])


@pytest.mark.parametrize(
    ("window", "page_size", "kv_rows", "tokens"),
    [
        (128, 64, 8, 192),  # a page and all of the window but one token, in chunks of 64 tokens
        (128, 256, 8, 192),  # a quarter of a page
        (128, 16, 8, 192),
        (128, 64, 1, 512),  # a chunk
        (1024, 64, 8, 384),  # three blocks, since two of 512 have too few
        (4096, 64, 8, 512),
    ],
)
def test_a_decode_s_block_is_as_large_as_its_window(window, page_size, kv_rows, tokens):
    assert kernel._window_block_tokens(window, 4096 // kv_rows, page_size, kv_rows, 1) == tokens


def test_a_decode_s_block_has_as_many_bytes_whatever_a_token_has(monkeypatch):
    assert kernel._decode_block_tokens(4096, 32, 8) == 512
    assert kernel._decode_block_tokens(512, 64, 1) == 4096
    assert kernel._decode_block_tokens(1 << 24, 128, 8) == 128  # never less than a page
    assert kernel._decode_block_tokens(5120, 64, 10) == 256  # in chunks of 256 tokens
    monkeypatch.setattr(kernel, "_generation", lambda: 7)
    assert kernel._decode_block_tokens(4096, 32, 8) == 2048
    assert kernel._decode_block_tokens(5120, 64, 10) == 1536


@pytest.mark.parametrize(
    ("block", "rows", "tiles", "tokens"),
    [
        (512, 8, 1, 512),
        (2048, 8, 1, 1024),
        (2048, 4, 2, 1024),
        (1536, 10, 1, 768),
        (1920, 8, 1, 960),
        (1280, 12, 1, 640),
        (1600, 10, 1, 1600),  # no whole chunks
        (3072, 8, 1, 1024),
    ],
)
def test_a_part_is_a_share_of_a_decode_s_block(block, rows, tiles, tokens):
    assert kernel._part_tokens(block, rows, tiles) == tokens


class EndOfCall(Exception):
    pass


OWN_BLOCKS = Shape(tokens=64, seqs=3, pages=96, pages_per_seq=32, kv_pages=None)


def blocks_and_vmem_bytes(monkeypatch, shape, limit=None):
    """(decode_buffers, decode_bkv, bkv, bq) of a call, the own ones it began with, and the bytes of its buffers.

    The call ends where they are known: the rest of the trace takes ten seconds.
    """
    seen = []
    fitting = kernel._fitting

    def watched(scratch, limit, own, given, page_size):
        sizes = fitting(scratch, limit, own, given, page_size)
        seen.append((sizes, (kernel.DECODE_BUFFERS, *own), kernel._vmem_bytes(scratch(*sizes))))
        raise EndOfCall

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_fitting", watched)
        options = shape.options | {"vmem_limit_bytes": limit}
        inputs = make_inputs(dataclasses.replace(shape, tokens=8), [1], [1])
        queries, keys, values = (jax.ShapeDtypeStruct((shape.tokens, *x.shape[1:]), x.dtype) for x in inputs[:3])
        call = jax.make_jaxpr(lambda *arrays: kernel.ragged_paged_attention(*arrays, **options))
        with pytest.raises(EndOfCall):
            call(queries, keys, values, *inputs[3:])
    return seen[0]


COLUMNS_ALONE = pytest.mark.parametrize("form", ["columns"], indirect=True)
CHIPS = {  # generation and VMEM
    "v5e": (5, 128 << 20),
    "v6e": (6, 128 << 20),
    "tpu7x": (7, 64 << 20),
}


@COLUMNS_ALONE
@pytest.mark.parametrize(
    ("chip", "heads", "sizes"),
    [
        ("tpu7x", {"kv_heads": 8, "group": 4}, (4, 2048, 512, 256)),
        ("tpu7x", {"kv_heads": 4, "group": 4, "head_dim": 256}, (4, 1024, 1024, 256)),
        ("tpu7x", {"kv_heads": 4, "group": 4, "head_dim": 256, "cache_dtype": E5M2}, (4, 4096, 512, 256)),
        ("tpu7x", {"kv_heads": 32, "group": 1}, (4, 256, 512, 256)),  # halved, as are some of the others
        ("tpu7x", {"kv_heads": 4, "group": 16, "head_dim": 256}, (4, 512, 512, 128)),
        ("tpu7x", {"kv_heads": 8, "group": 4, "dtype": F32}, (4, 512, 512, 256)),
        ("tpu7x", {"kv_heads": 64, "group": 1, "dtype": F32}, (4, 128, 128, 8)),
        ("v6e", {"kv_heads": 8, "group": 12}, (5, 512, 512, 128)),
        ("v6e", {"kv_heads": 32, "group": 1, "dtype": F32}, (5, 64, 512, 256)),
        ("v6e", {"kv_heads": 1, "group": 8}, (5, 4096, 1024, 256)),  # few KV heads: blocks of several segments
        ("v6e", {"kv_heads": 4, "group": 7}, (5, 1024, 512, 256)),
        ("v5e", {"kv_heads": 1, "group": 8}, (5, 4096, 1024, 128)),
        ("v5e", {"kv_heads": 8, "group": 8}, (5, 512, 512, 128)),
        ("v5e", {"kv_heads": 8, "group": 12}, (5, 512, 512, 64)),
    ],
)
def test_blocks_are_what_the_chip_has_room_for(chip, heads, sizes, monkeypatch):
    generation, vmem_bytes = CHIPS[chip]
    monkeypatch.setattr(kernel, "_generation", lambda: generation)
    monkeypatch.setattr(kernel, "_chip", lambda: types.SimpleNamespace(vmem_capacity_bytes=vmem_bytes))
    limit = min(vmem_bytes, 96 << 20) - kernel.COMPILERS_OWN_BYTES
    shape = Shape(tokens=2048, seqs=1, pages=1, pages_per_seq=256, kv_pages=None, **{"dtype": BF16} | heads)
    got, own, used = blocks_and_vmem_bytes(monkeypatch, shape)
    assert got == sizes and used <= limit
    if got != own:  # and no smaller than need be
        *_, more = blocks_and_vmem_bytes(monkeypatch, shape, limit=1 << 40)
        assert more > limit


@pytest.mark.parametrize(
    ("generation", "kv_heads", "scores", "count"),
    [
        (6, 1, 2**19, 4),
        (6, 1, 2**20, 2),  # one of four would be more than the compiler is quick with
        (6, 2, 2**21, 2),
        (6, 4, 2**22, 1),
        (6, 8, 2**18, 1),
        (5, 1, 2**19, 2),
        (5, 2, 2**19, 1),  # two heads are in work already
    ],
)
def test_few_kv_heads_have_kv_blocks_of_several_segments(generation, kv_heads, scores, count, monkeypatch):
    monkeypatch.setattr(kernel, "_generation", lambda: generation)
    assert kernel._num_segments(kv_heads, scores) == count


@pytest.mark.parametrize("window", [None, 600])
def test_segments_of_a_kv_block(window, monkeypatch):
    """Blocks of two segments or four, whole, seen in part and not at all; the last one cut short."""
    monkeypatch.setattr(kernel, "KV_BLOCK_PAGES", 4)
    shape = Shape(kv_heads=1, group=2, tokens=140, seqs=3, pages=120, pages_per_seq=64, kv_pages=None, dtype=BF16)
    check(dataclasses.replace(shape, sliding_window=window), [1, 100, 39], [700, 900, 39])


@COLUMNS_ALONE
def test_basic_blocks_end_anywhere(monkeypatch):
    """Even between the two tiles of a head."""
    shape = Shape(kv_heads=2, group=4, tokens=140, seqs=3, pages=40, pages_per_seq=12, q_block=128, kv_pages=4)
    cuts = []
    monkeypatch.setattr(kernel, "_in_a_basic_block", lambda call, do: (cuts.append(do), do()))
    monkeypatch.setattr(kernel, "BLOCK_SCORES", 3 * 64 * kernel.TILE_COLUMNS)
    check(shape, [1, 128, 11], [100, 190, 11])
    assert cuts


def test_blocks_that_are_given_stay(monkeypatch):
    shape = dataclasses.replace(OWN_BLOCKS, kv_pages=4, q_block=64)
    assert blocks_and_vmem_bytes(monkeypatch, shape, limit=1 << 20)[0] == (4, 64, 64, 64)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_little_vmem_changes_the_blocks_and_nothing_else(dtype, form, monkeypatch):
    shape = dataclasses.replace(OWN_BLOCKS, dtype=dtype)
    sizes, own, _ = blocks_and_vmem_bytes(monkeypatch, shape, limit=1 << 20)
    assert own == (5, 512, 2048 if form == "columns" else 512, 64) and sizes == (4, 128, 128, 8)
    check(dataclasses.replace(shape, vmem_limit_bytes=1 << 20), [1, 37, 26], [300, 500, 26])


def test_heads_are_padded_to_whole_tiles_of_8_rows():
    heads = {BF16: (1, 3, 8, 10, 20, 32, 40, 64), F32: (1, 3, 4, 8, 12, 40)}
    padded = {dtype: tuple(kernel._padded_heads(n, jnp.dtype(dtype)) for n in heads[dtype]) for dtype in heads}
    assert padded == {BF16: (2, 4, 8, 16, 24, 32, 40, 64), F32: (1, 4, 4, 8, 16, 40)}


def test_out_dtype_and_mask_value():
    check(dataclasses.replace(BASE, out_dtype=BF16, mask_value=-1e30), [3, 2], [20, 2])


# --- arguments ---

NAMES = ("queries", "keys", "values", "kv_cache", "kv_lens", "page_indices", "cu_q_lens", "distribution")


def structs() -> dict[str, jax.ShapeDtypeStruct]:
    arrays = make_inputs(BASE, [1], [1])
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in zip(NAMES, arrays, strict=True)}


def changed(name: str, *, shape: Any = None, dtype: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    arrays = structs()
    arrays[name] = jax.ShapeDtypeStruct(shape or arrays[name].shape, dtype or arrays[name].dtype)
    return arrays


def refused(arrays: dict[str, Any], error: type[Exception], match: str, **options: Any) -> None:
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda *a: kernel.ragged_paged_attention(*a, **options), *arrays.values())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("queries", {"shape": (40, 512)}, r"queries must be \[T, Hq, D\]"),
        ("queries", {"dtype": jnp.float16}, "queries must be bfloat16 or float32, got float16"),
        ("queries", {"shape": (40, 3, 128)}, "3 query heads are not a multiple of 2 KV heads"),
        ("queries", {"shape": (39, 4, 128)}, "keys have 40 tokens, queries 39"),
        ("queries", {"shape": (40, 4, 64)}, "keys have head_dim 128, queries 64"),
        ("keys", {"shape": (40, 256)}, r"keys must be \[T, Hkv, D\]"),
        ("keys", {"shape": (40, 1, 128)}, r"values \(40, 2, 128\) must have the shape of keys"),
        ("keys", {"dtype": jnp.bfloat16}, "keys are bfloat16, kv_cache float32"),
        ("values", {"dtype": jnp.bfloat16}, "values are bfloat16, kv_cache float32"),
        ("values", {"shape": (41, 2, 128)}, "values"),
        ("kv_cache", {"shape": (24, 16, 4, 128)}, r"kv_cache must be \[P, page, rows, pack, D\]"),
        ("kv_cache", {"shape": (24, 16, 4, 2, 128)}, r"kv_cache .* must end in \(4, 1, 128\)"),
        ("kv_cache", {"shape": (24, 16, 3, 1, 128)}, r"kv_cache .* must end in \(4, 1, 128\)"),
        ("kv_cache", {"dtype": jnp.bfloat16}, "bfloat16"),
        ("kv_lens", {"dtype": jnp.int16}, r"kv_lens must be i32\[n\], got int16"),
        ("kv_lens", {"shape": (6, 1)}, r"kv_lens must be i32\[n\]"),
        ("kv_lens", {"shape": (5,)}, "cu_q_lens must have 6 entries"),
        ("page_indices", {"dtype": jnp.float32}, r"page_indices must be i32\[n\], got float32"),
        ("page_indices", {"shape": (6, 4)}, r"page_indices must be i32\[n\]"),
        ("page_indices", {"shape": (25,)}, "page_indices has 25 entries, not a positive multiple of 6"),
        ("page_indices", {"shape": (0,)}, "page_indices has 0 entries"),
        ("cu_q_lens", {"dtype": jnp.uint32}, r"cu_q_lens must be i32\[n\]"),
        ("cu_q_lens", {"shape": (6,)}, "cu_q_lens must have 7 entries"),
        ("distribution", {"shape": (2,)}, "distribution must have 3 entries, got 2"),
        ("distribution", {"dtype": jnp.int8}, r"distribution must be i32\[n\]"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name, change, message):
    refused(changed(name, **change), ValueError, f"ragged_paged_attention: .*{message}")


def test_a_batch_of_nothing_is_refused():
    empty = {name: jax.ShapeDtypeStruct((0, *a.shape[1:]), a.dtype) for name, a in list(structs().items())[:3]}
    refused(structs() | empty, ValueError, "queries must have at least one row")
    refused(
        structs() | {"kv_lens": jax.ShapeDtypeStruct((0,), jnp.int32)}, ValueError, "kv_lens must have at least one"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_value": float("inf")}, "mask_value must be finite, got inf"),
        ({"mask_value": float("nan")}, "mask_value must be finite, got nan"),
        ({"sm_scale": float("nan")}, "sm_scale must be finite, got nan"),
        ({"merged_kv": True}, "merged_kv needs head_dim 64, got 128"),
        ({"sliding_window": 0}, "sliding_window must be a whole number of at least 1, got 0"),
        ({"sliding_window": 2.5}, "sliding_window must be a whole number of at least 1, got 2.5"),
        ({"soft_cap": 0.0}, "soft_cap must be positive, got 0.0"),
        ({"soft_cap": "30"}, "soft_cap must be finite, got '30'"),
        ({"q_scale": -1.0}, "q_scale must be positive, got -1.0"),
        ({"k_scale": 0}, "k_scale must be positive, got 0"),
        ({"v_scale": float("inf")}, "v_scale must be finite, got inf"),
        ({"attention_sink": 1.0}, r"attention_sink must be f32\[4\], one a query head, got 1.0"),
        ({"attention_sink": np.zeros(3, F32)}, r"attention_sink must be f32\[4\], one a query head, got float32\(3,\)"),
        ({"attention_sink": np.zeros(4, BF16)}, r"attention_sink must be f32\[4\], one a query head, got bfloat16"),
        ({"chunk_prefill_size": 0}, "chunk_prefill_size must be a whole number of at least 1, got 0"),
        ({"d_block_sizes": (1,)}, r"d_block_sizes must be \(queries, KV tokens, …\), got \(1,\)"),
        ({"p_block_sizes": (0, 16)}, r"p_block_sizes must be \(queries, KV tokens, …\), got \(0, 16\)"),
        ({"m_block_sizes": (8, 24, 8, 24)}, "m_block_sizes: 24 KV tokens are not whole pages of 16"),
        ({"skip_kv_mask": True}, "skip_kv_mask needs use_causal_mask=False"),
        ({"out_dtype": jnp.int8}, "out_dtype must be bfloat16 or float32"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options, message):
    refused(structs(), ValueError, f"ragged_paged_attention: {message}", **options)


@pytest.mark.parametrize("dtype", [jnp.int16, jnp.float16, jnp.float8_e4m3b11fnuz])
def test_a_cache_type_that_is_not_there_is_named(dtype):
    refused(
        changed("kv_cache", dtype=dtype), ValueError, "kv_cache must be one of bfloat16, float32, int8, float8_e4m3fn"
    )


@pytest.mark.parametrize("generation", [0, 7])  # before TPU7x float8_e4m3fn is read as float8_e4m3b11fnuz
@pytest.mark.parametrize("dtype", [INT8, E4M3, E5M2], ids=str)
def test_every_value_of_a_byte_is_read_as_its_type_says(dtype, generation, monkeypatch):
    monkeypatch.setattr(kernel, "_generation", lambda: generation)
    rows = np.arange(1 << 14, dtype=np.uint16).astype(np.uint8).reshape(128, 128).view(dtype)
    call = pl.pallas_call(
        lambda ref, out: out.__setitem__(..., kernel._for_lhs(ref[...])),
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.bfloat16),
        interpret=True,
    )
    want = rows.astype(F32)
    if dtype == E4M3 and generation < 7:
        want = np.where(np.isnan(want), np.copysign(np.float32(480.0), want), want)
    np.testing.assert_array_equal(np.asarray(call(rows)).astype(F32), want)


# --- the problem ---


def check_sets() -> list[tuple[str, dict[str, Any]]]:
    """Every workload, plain and with each check's changes."""
    pairs = itertools.product(kernel.WORKLOADS.items(), [("timed", {}), *kernel.CHECKS.items()])
    drawn = {"draw": 17}  # where the judge draws a number of its own
    return [
        (f"{name}/{check}", workload | changes | (drawn if changes.get("draw", 0) is None else {}))
        for (name, workload), (check, changes) in pairs
    ]


@pytest.fixture
def small_caches(monkeypatch):
    """The cache's values do not matter here, and are most of the bytes."""
    monkeypatch.setattr(kernel, "HEAD_DIM", 8)


@pytest.mark.parametrize("label", [label for label, _ in check_sets()])
def test_inputs_of_every_workload_and_check(label, small_caches):
    """Shapes and types are those of the timed inputs; the table is never the identity; nobody shares a page."""
    workload = dict(check_sets())[label]
    timed = kernel.WORKLOADS[label.split("/")[0]]
    arrays = kernel.generate_inputs(jax.random.key(3), **workload)
    assert [(a.shape, a.dtype) for a in arrays] == [
        ((timed["num_tokens"], kernel.NUM_Q_HEADS, 8), BF16),
        ((timed["num_tokens"], kernel.NUM_KV_HEADS, 8), BF16),
        ((timed["num_tokens"], kernel.NUM_KV_HEADS, 8), BF16),
        ((timed["num_pages"], timed["page_size"], kernel.NUM_KV_HEADS, 2, 8), BF16),
        ((timed["num_seqs"],), np.int32),
        ((timed["num_seqs"] * (kernel.MAX_CONTEXT // timed["page_size"]),), np.int32),
        ((timed["num_seqs"] + 1,), np.int32),
        ((3,), np.int32),
    ]
    queries, _, _, cache, kv_lens, table, cu_q_lens, distribution = arrays
    total = int(distribution[2])
    assert 0 <= distribution[0] <= distribution[1] <= total <= timed["num_seqs"]
    assert cu_q_lens[0] == 0 and (np.diff(cu_q_lens[: total + 1]) >= 0).all()
    assert (kv_lens[:total] >= np.diff(cu_q_lens[: total + 1])).all()
    table = table.reshape(timed["num_seqs"], -1)
    owned = [table[seq, : -(-int(kv_lens[seq]) // timed["page_size"])] for seq in range(total)]
    pages = np.concatenate(owned)
    assert len(set(pages.tolist())) == len(pages) > 3 and pages.min() >= 0 and pages.max() < timed["num_pages"]
    assert not np.array_equal(pages, np.sort(pages))
    unowned = np.setdiff1d(np.arange(timed["num_pages"]), pages)
    padding = queries[cu_q_lens[total] :]
    poisoned = workload.get("poison", False)
    assert np.isnan(cache[unowned].astype(np.float32)).all() == poisoned or not len(unowned)
    assert np.isnan(padding.astype(np.float32)).all() == poisoned or not len(padding)
    assert (kv_lens[total:] >= 2**20).all() and (table[total:] >= 2**20).all()
    again = kernel.generate_inputs(jax.random.key(4), **workload)
    assert np.array_equal(again[4][:total], kv_lens[:total])  # lengths are the workload's
    assert not np.array_equal(again[5].reshape(table.shape)[:total], table[:total])  # pages are the key's


def test_edges_have_what_their_name_says():
    workload = kernel.WORKLOADS["mixed"] | kernel.CHECKS["edges"]
    q_lens, kv_lens, _ = kernel._lengths(**workload)
    page = workload["page_size"]
    assert 0 in q_lens[1:-1] and 1 in q_lens
    assert any((kv_lens % page == 0) & (kv_lens > 0)) and any((kv_lens % page == 1) & (kv_lens > page))


BATCHES = {
    "decode": {"batch": "decode", "num_tokens": 5, "num_seqs": 5, "num_pages": 500, "page_size": 128},
    "edges": {"batch": "edges", "num_tokens": 200, "num_seqs": 9, "num_pages": 64, "page_size": 16},
    "short": {"batch": "short", "num_tokens": 200, "num_seqs": 9, "num_pages": 200, "page_size": 16},
}


@pytest.mark.parametrize("name", BATCHES)
def test_flops_and_bytes_by_brute_force(name):
    workload = BATCHES[name]
    q_lens, kv_lens, _ = kernel._lengths(**workload)
    pairs = moved = 0
    element, width = 2, kernel.HEAD_DIM
    for q_len, kv_len in zip(q_lens.tolist(), kv_lens.tolist(), strict=True):
        for row in range(q_len):
            pairs += sum(token <= kv_len - q_len + row for token in range(kv_len))
            moved += 2 * kernel.NUM_Q_HEADS * width * element  # query in, output out
            moved += 2 * 2 * kernel.NUM_KV_HEADS * width * element  # key and value in, and into their slots
        if q_len:
            moved += (kv_len - q_len) * 2 * kernel.NUM_KV_HEADS * width * element
    assert pairs > 0
    multiply_adds = pairs * kernel.NUM_Q_HEADS * width * 2  # scores and weighted sum
    assert kernel.compute_flops(**workload) == 2 * multiply_adds
    assert kernel.compute_bytes(**workload) == moved


def test_flops_are_of_visible_pairs_alone():
    """Half of the square for a prefill: a masked score is no work."""
    workload = kernel.WORKLOADS["prefill"]
    q_lens, _, _ = kernel._lengths(**workload)
    square = int(4 * kernel.HEAD_DIM * kernel.NUM_Q_HEADS * (q_lens**2).sum())
    assert 0.5 < kernel.compute_flops(**workload) / square < 0.501


def test_the_kernels_own_reference_agrees_with_this_one(monkeypatch):
    """Two oracles that share no line."""
    monkeypatch.setattr(kernel, "NUM_Q_HEADS", 4)
    monkeypatch.setattr(kernel, "NUM_KV_HEADS", 2)
    shape = dataclasses.replace(BASE, dtype=BF16, sm_scale=kernel.SM_SCALE)
    inputs = make_inputs(shape, *MIXED)
    out, cache = kernel.reference_fn(*inputs)
    want, want_cache = expected(shape, inputs)
    assert error_of(out, want) < TOLERANCE[BF16]
    assert np.array_equal(cache.view(np.uint16), want_cache.view(np.uint16))


def test_tunables_are_module_constants_with_their_own_value_among_the_choices():
    assert {"Q_BLOCK_TOKENS", "KV_BLOCK_PAGES", "DECODE_BLOCK_PAGES"} <= set(kernel.TUNABLES)
    for name, choices in kernel.TUNABLES.items():
        assert getattr(kernel, name) in choices


@pytest.mark.parametrize("name", kernel.WORKLOADS)
def test_tiling_meta_declares_sizes(name):
    meta = kernel.get_tiling_meta(**kernel.WORKLOADS[name])
    assert all(size > 0 for size in meta["grid"])
    assert sum(buffer["size_bytes"] * (2 if buffer["double_buffered"] else 1) for buffer in meta["buffers"]) < 2**27
