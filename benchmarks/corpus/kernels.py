"""Kernels that validate and calibrate the cycle model: `MICRO` against libtpu's profile, `PUBLISHED` against figures.

`MICRO[name]` and `PUBLISHED[id]` give a `Kernel`; `Kernel.build()` gives the function to jit, the shapes of its
arguments and the values of its integer arguments. Operands of the micro kernels are larger than VMEM, so that XLA
leaves them in HBM and the kernel's own copies are the ones that are timed. jax is imported by the builders alone.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[tuple[int, ...], str]

BITS = {"bfloat16": 16, "float32": 32, "int32": 32, "int8": 8, "float8_e4m3fn": 8, "int16": 16}
LARGE_BYTES = 160 << 20  # more than any chip's VMEM


class Case(NamedTuple):
    """What to compile: `scalars` maps the index of an integer argument to its values; `donated`: reused arguments."""

    function: Callable[..., Any]
    shapes: list[Shape]
    scalars: dict[int, np.ndarray] = {}  # noqa: RUF012
    donated: tuple[int, ...] = ()


class Kernel(NamedTuple):
    """`profiled`: libtpu can unroll it; `chips`: those that it is made for, where not all."""

    kind: str
    build: Callable[[], Case]
    profiled: bool = True
    chips: tuple[str, ...] = ("v5e", "v6e", "v5p", "tpu7x")


class Block(NamedTuple):
    """One operand of a pipeline, cut into blocks; `at` maps the grid's indices to the block's."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    at: Callable[..., tuple[Any, ...]] = lambda *i: (i[0], 0)


MICRO: dict[str, Kernel] = {}


def micro(name: str, kind: str, build: Callable[[str], Case], **options: Any) -> None:
    """Registers one micro kernel; the builder is given its name, which the Pallas call bears too."""
    if name in MICRO:
        raise ValueError(f"two micro kernels are called {name}")
    MICRO[name] = Kernel(kind, functools.partial(build, name), **options)


def large(block: Block, grid: Sequence[int], at_least: int = LARGE_BYTES) -> Shape:
    """The array behind a block: all that the grid visits, then longer until it cannot lie in VMEM."""
    last = block.at(*(n - 1 for n in grid))
    dims = [(i + 1) * size for i, size in zip(last, block.shape, strict=True)]
    row_bytes = int(np.prod(dims[1:])) * BITS[block.dtype] // 8
    steps = -(-at_least // (row_bytes * block.shape[0]))
    return (max(dims[0], steps * block.shape[0]), *dims[1:]), block.dtype


def pipelined(
    name: str,
    body: Callable[..., None],
    ins: Sequence[Block],
    outs: Sequence[Block],
    grid: tuple[int, ...] = (4,),
    scratch: Sequence[tuple[tuple[int, ...], str]] = (),
    exact: bool = False,
) -> Case:
    """A Pallas pipeline over large arrays; `body` is given the refs of inputs, outputs and scratch.

    `exact`: arrays no larger than what the grid visits, the compiler's own limit of VMEM, and outer dimensions
    that are declared parallel, as a user would write it.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    shape_of = functools.partial(large, grid=grid, at_least=0 if exact else LARGE_BYTES)
    parameters = pltpu.CompilerParams(vmem_limit_bytes=48 << 20)
    if exact:
        semantics = [pltpu.PARALLEL] * (len(grid) - 1) + [pltpu.ARBITRARY]
        parameters = pltpu.CompilerParams(dimension_semantics=semantics)
    call = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[pl.BlockSpec(block.shape, block.at) for block in ins],
        out_specs=[pl.BlockSpec(block.shape, block.at) for block in outs],
        out_shape=[jax.ShapeDtypeStruct(*shape_of(block)) for block in outs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.dtype(dtype)) for shape, dtype in scratch],
        compiler_params=parameters,
        name=name,
    )
    return Case(call, [shape_of(block) for block in ins])


def mapped(
    function: Callable[..., Any],
    ins: Sequence[Block],
    outs: Sequence[Block],
    grid: tuple[int, ...] = (4,),
    rows: int | None = None,
    repeat: int = 12,
) -> Callable[[str], Case]:
    """A pipeline whose step is function(blocks), `repeat` times, lest the copies hide it.

    With `rows`, a step is a loop over chunks of so many rows of the blocks instead.
    """

    def body(*refs: Any) -> None:
        from jax.experimental import pallas as pl

        sources, targets = refs[: len(ins)], refs[len(ins) :]

        def step(where: Any) -> None:
            results = function(*(source[where] for source in sources))
            for target, result in zip(targets, results if isinstance(results, tuple) else (results,), strict=True):
                target[where] = result.astype(target.dtype)

        if rows is None and repeat == 1:
            step(...)
        elif rows is None:

            @pl.loop(0, repeat)
            def _(_: Any) -> None:
                step(...)

        else:

            @pl.loop(0, ins[0].shape[0] // rows)
            def _(i: Any) -> None:
                step(pl.ds(pl.multiple_of(i * rows, rows), rows))

    return lambda name: pipelined(name, body, ins, outs, grid)


def unary(
    function: Callable[[Any], Any],
    shape: tuple[int, int] = (256, 512),
    dtype: str = "float32",
    out: str | None = None,
    out_shape: tuple[int, int] | None = None,
    grid: tuple[int, ...] = (4,),
    rows: int | None = None,
    repeat: int = 12,
) -> Callable[[str], Case]:
    """One input, one output."""
    return mapped(function, [Block(shape, dtype)], [Block(out_shape or shape, out or dtype)], grid, rows, repeat)


# --- element by element ---------------------------------------------------------------------------------------------


def _polynomial(x: Any) -> Any:
    total = x
    for k in range(12):
        total = total * x + (0.5 + k)
    return total


def _integer_mix(x: Any) -> Any:
    for shift in (7, 9, 13):
        x = (x ^ (x << shift)) * 1664525 + 1013904223
    return x


def _register_elementwise() -> None:
    import jax.numpy as jnp

    add = mapped(lambda a, b: a + b, [Block((256, 512))] * 2, [Block((256, 512))])
    micro("add_f32", "elementwise", add)
    half = Block((256, 512), "bfloat16")
    micro("add_bf16", "elementwise", mapped(lambda a, b: a + b, [half] * 2, [half]))
    micro("multiply_add_f32", "elementwise", unary(lambda x: x * 1.5 + 2.0))
    micro("polynomial_f32", "elementwise", unary(_polynomial))
    micro("polynomial_f32_chunked", "elementwise", unary(_polynomial, (512, 512), rows=32))
    micro("polynomial_bf16", "elementwise", unary(_polynomial, dtype="bfloat16"))
    micro("clamp_f32", "elementwise", unary(lambda x: jnp.minimum(jnp.maximum(jnp.abs(x), 0.25), 4.0)))
    micro("integer_mix", "elementwise", unary(_integer_mix, dtype="int32"))
    micro("divide_f32", "elementwise", mapped(lambda a, b: a / b, [Block((128, 512))] * 2, [Block((128, 512))]))
    micro("round_f32", "elementwise", unary(lambda x: jnp.floor(x) + jnp.round(x * 3.0)))


# --- transcendental -------------------------------------------------------------------------------------------------


def _register_transcendental() -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    functions: dict[str, Callable[[Any], Any]] = {
        "exp": lambda x: jnp.exp(jnp.exp(x)),
        "exp2": jnp.exp2,
        "log": lambda x: jnp.log(jnp.log(x)),
        "rsqrt": lambda x: jax.lax.rsqrt(jax.lax.rsqrt(x)),
        "sqrt": jnp.sqrt,
        "tanh": lambda x: jnp.tanh(jnp.tanh(x)),
        "sigmoid": jax.nn.sigmoid,
        "silu": jax.nn.silu,
        "erf": jax.lax.erf,
        "gelu_tanh": jax.nn.gelu,
        "reciprocal": lambda x: pl.reciprocal(x, approx=False),
        "reciprocal_approx": lambda x: pl.reciprocal(pl.reciprocal(x, approx=True), approx=True),
        "sine": jnp.sin,
        "softplus": jax.nn.softplus,
    }
    for name, function in functions.items():
        shape = (64, 512) if name in ("sine", "erf", "softplus") else (256, 512)
        micro(f"{name}_f32", "transcendental", unary(function, shape))
    micro("exp_bf16", "transcendental", unary(jnp.exp, dtype="bfloat16"))
    micro("tanh_bf16", "transcendental", unary(jnp.tanh, dtype="bfloat16"))
    micro("exp_f32_chunked", "transcendental", unary(lambda x: jnp.exp(jnp.exp(x)), (1024, 512), rows=16))


# --- reductions -----------------------------------------------------------------------------------------------------


def _register_reductions() -> None:
    import jax.numpy as jnp

    def along(function: Callable[..., Any], axis: int) -> Callable[[Any], Any]:
        return lambda x: jnp.broadcast_to(function(x, axis=axis, keepdims=True), x.shape)

    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        for function, label in ((jnp.sum, "sum"), (jnp.max, "max")):
            micro(f"{label}_lanes_{short}", "reduction", unary(along(function, 1), dtype=dtype))
            micro(f"{label}_sublanes_{short}", "reduction", unary(along(function, 0), dtype=dtype))
    micro("sum_lanes_chunked", "reduction", unary(along(jnp.sum, 1), (512, 512), rows=16))
    micro("sum_lanes_long", "reduction", unary(along(jnp.sum, 1), (64, 4096)))
    micro("max_sum_lanes", "reduction", unary(lambda x: x - along(jnp.max, 1)(x) + along(jnp.sum, 1)(x)))
    micro("argmax_lanes", "reduction", unary(lambda x: x + jnp.argmax(x, axis=1, keepdims=True).astype(x.dtype)))

    def total(x: Any, o: Any) -> None:
        o[...] = jnp.broadcast_to(jnp.sum(x[...], axis=(0, 1), keepdims=True), o.shape)

    micro("sum_all", "reduction", lambda name: pipelined(name, total, [Block((256, 512))], [Block((8, 128))]))


# --- movement between lanes and sublanes ----------------------------------------------------------------------------


def _register_permutes() -> None:
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu

    micro("roll_lanes", "permute", unary(lambda x: pltpu.roll(x, 5, 1)))
    micro("roll_lanes_whole", "permute", unary(lambda x: pltpu.roll(x, 37, 1) + x, (512, 128)))
    micro("roll_sublanes", "permute", unary(lambda x: pltpu.roll(x, 3, 0)))
    micro("roll_lanes_chunked", "permute", unary(lambda x: pltpu.roll(x, 64, 1) * x, (512, 256), rows=32))
    micro("tile_lanes", "permute", unary(lambda x: jnp.concatenate([x, x], 1), (256, 256), out_shape=(256, 512)))
    micro(
        "repeat_sublanes",
        "permute",
        unary(lambda x: jnp.repeat(x, 4, axis=0), (64, 512), out_shape=(256, 512)),
    )
    micro("slice_lane_offset", "permute", unary(lambda x: x[:, 64:320], (256, 512), out_shape=(256, 256)))
    micro("slice_sublane_offset", "permute", unary(lambda x: x[3:131], (256, 512), out_shape=(128, 512)))
    micro("rotate_half", "permute", unary(lambda x: jnp.concatenate([-x[:, 64:], x[:, :64]], 1), (512, 128)))
    micro("broadcast_column", "permute", unary(lambda x: x * x[:, 7:8]))
    micro("broadcast_row", "permute", unary(lambda x: x * x[5:6]))
    micro("concatenate_sublanes", "permute", unary(lambda x: jnp.concatenate([x[128:], x[:128]], 0)))
    micro("split_heads", "permute", unary(lambda x: x.reshape(256, 4, 128).sum(1), out_shape=(256, 128)))


def _register_transposes() -> None:
    import jax.numpy as jnp

    def swapped(rows: int, columns: int, dtype: str) -> Callable[[str], Case]:
        return unary(lambda x: x.T, (rows, columns), dtype, out_shape=(columns, rows))

    micro("transpose_f32_128", "transpose", swapped(128, 128, "float32"))
    micro("transpose_f32_256", "transpose", swapped(256, 256, "float32"))
    micro("transpose_f32_wide", "transpose", swapped(128, 512, "float32"))
    micro("transpose_f32_tall", "transpose", swapped(512, 128, "float32"))
    micro("transpose_bf16_128", "transpose", swapped(128, 128, "bfloat16"))
    micro("transpose_bf16_256", "transpose", swapped(256, 256, "bfloat16"))
    micro("transpose_bf16_wide", "transpose", swapped(128, 512, "bfloat16"))
    micro("transpose_int32", "transpose", swapped(256, 256, "int32"))
    micro(
        "transpose_add",
        "transpose",
        mapped(lambda a, b: a.T + b, [Block((256, 256))] * 2, [Block((256, 256))]),
    )
    middle = lambda i: (i, 0, 0)  # noqa: E731
    micro(
        "swap_major",
        "transpose",
        mapped(
            lambda x: jnp.swapaxes(x, 0, 1),
            [Block((16, 8, 128), at=middle)],
            [Block((8, 16, 128), at=middle)],
        ),
    )


# --- matmul ---------------------------------------------------------------------------------------------------------


def _dot(a: Any, b: Any, transposed: bool, accumulate: str, precision: Any = None) -> Any:
    import jax

    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=np.dtype(accumulate))


def dot(
    m: int, k: int, n: int, dtype: str = "bfloat16", transposed: bool = False, precision: Any = None, steps: int = 4
) -> Callable[[str], Case]:
    """A new left-hand side each step, the same right-hand side."""
    accumulate = "int32" if dtype == "int8" else "float32"
    right = Block((n, k) if transposed else (k, n), dtype, lambda i: (0, 0))

    def function(a: Any, b: Any) -> Any:
        return _dot(a, b, transposed, accumulate, precision)

    def body(a: Any, b: Any, o: Any) -> None:
        o[...] = function(a[...], b[...])

    return lambda name: pipelined(name, body, [Block((m, k), dtype), right], [Block((m, n), accumulate)], (steps,))


def grid_matmul(
    steps: tuple[int, int, int],
    block: tuple[int, int, int],
    dtype: str = "bfloat16",
    transposed: bool = False,
    activation: Callable[[Any], Any] | None = None,
    out: str | None = None,
    exact: bool = False,
) -> Callable[[str], Case]:
    """The usual three-dimensional pipeline: an accumulator in scratch, k innermost; block is (bm, bk, bn)."""
    accumulate = "int32" if dtype == "int8" else "float32"
    (bm, bk, bn), last = block, steps[2] - 1

    def body(a: Any, b: Any, o: Any, total: Any) -> None:
        import jax.numpy as jnp
        from jax.experimental import pallas as pl

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        total[...] += _dot(a[...], b[...], transposed, accumulate)

        @pl.when(pl.program_id(2) == last)
        def _() -> None:
            o[...] = (activation(total[...]) if activation else total[...]).astype(o.dtype)

    left = Block((bm, bk), dtype, lambda i, j, k: (i, k))
    right = (
        Block((bn, bk), dtype, lambda i, j, k: (j, k)) if transposed else Block((bk, bn), dtype, lambda i, j, k: (k, j))
    )
    result = Block((bm, bn), out or accumulate, lambda i, j, k: (i, j))
    return lambda name: pipelined(name, body, [left, right], [result], steps, [((bm, bn), accumulate)], exact)


def _narrow_dot(name: str) -> Case:
    """64 columns out of 128: an array of 64 lanes would be given another layout, and copied."""

    def body(a: Any, b: Any, o: Any) -> None:
        o[:, :64] = _dot(a[...], b[:, :64], False, "float32")

    ins = [Block((512, 256), "bfloat16"), Block((256, 128), "bfloat16", lambda i: (0, 0))]
    return pipelined(name, body, ins, [Block((512, 128))])


def _register_matmuls() -> None:
    import jax

    for size in (128, 256, 512):
        micro(f"dot_bf16_{size}", "matmul", dot(size, size, size))
        micro(f"dot_f32_{size}", "matmul", dot(size, size, size, "float32"))
    micro("dot_f32_highest", "matmul", dot(256, 256, 256, "float32", precision=jax.lax.Precision.HIGHEST))
    micro("dot_bf16_n128", "matmul", dot(512, 512, 128))
    micro("dot_bf16_k128", "matmul", dot(512, 128, 512))
    micro("dot_bf16_n64", "matmul", _narrow_dot)
    micro("dot_bf16_m8", "matmul", dot(16, 512, 512))
    micro("dot_bf16_transposed", "matmul", dot(256, 256, 256, transposed=True))
    micro("dot_bf16_scores", "matmul", dot(512, 128, 512, transposed=True))
    micro("dot_f32_transposed", "matmul", dot(256, 256, 256, "float32", transposed=True))
    micro("dot_bf16_1024", "matmul", dot(1024, 1024, 1024))
    # v5p and tpu7x have no integer MXU mode of their own everywhere; the compiler says so where it cannot.
    micro("dot_int8_256", "matmul", dot(256, 256, 256, "int8"))
    micro("dot_int8_512", "matmul", dot(512, 512, 512, "int8"))
    micro("dot_int8_transposed", "matmul", dot(256, 256, 256, "int8", transposed=True))
    micro("dot_fp8_256", "matmul", dot(256, 256, 256, "float8_e4m3fn"))
    micro("dot_fp8_512", "matmul", dot(512, 512, 512, "float8_e4m3fn"))
    sizes = {"128": (128, 128, 128), "256": (256, 256, 256), "512": (512, 512, 512), "wide": (256, 512, 1024)}
    for label, block in sizes.items():
        micro(f"grid_matmul_bf16_{label}", "grid matmul", grid_matmul((2, 2, 4), block))
    micro("grid_matmul_f32_256", "grid matmul", grid_matmul((2, 2, 4), (256, 256, 256), "float32"))
    micro("grid_matmul_bf16_docs", "grid matmul", grid_matmul((2, 1, 4), (512, 1024, 1024), out="bfloat16"))
    micro("grid_matmul_bf16_transposed", "grid matmul", grid_matmul((2, 2, 4), (256, 512, 512), transposed=True))
    micro("grid_matmul_int8", "grid matmul", grid_matmul((2, 2, 4), (256, 512, 512), "int8"))
    micro("grid_matmul_bf16_thin", "grid matmul", grid_matmul((1, 8, 4), (16, 512, 512)))
    relu = lambda x: jax.nn.relu(x)  # noqa: E731
    micro("grid_matmul_relu", "fused", grid_matmul((2, 2, 4), (256, 512, 512), activation=relu, out="bfloat16"))
    gelu = lambda x: jax.nn.gelu(x.astype("float32") * 0.01)  # noqa: E731
    micro("int8_matmul_gelu", "fused", grid_matmul((4, 2, 2), (256, 512, 512), "int8", activation=gelu, out="bfloat16"))
    micro("matmul_silu", "fused", grid_matmul((2, 2, 2), (256, 512, 256), activation=jax.nn.silu, out="bfloat16"))


# --- normalisation --------------------------------------------------------------------------------------------------


def _softmax(x: Any) -> Any:
    import jax.numpy as jnp

    x = x.astype(jnp.float32)
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _layernorm(x: Any) -> Any:
    import jax

    x = x.astype("float32")
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-6)


def _rmsnorm(x: Any) -> Any:
    import jax

    x = x.astype("float32")
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def _register_normalisations() -> None:
    micro("softmax_f32", "normalisation", unary(_softmax, (128, 1024)))
    micro("softmax_f32_chunked", "normalisation", unary(_softmax, (512, 1024), rows=16))
    micro("softmax_bf16", "normalisation", unary(_softmax, (256, 512), "bfloat16"))
    micro("layernorm_f32", "normalisation", unary(_layernorm, (128, 1024)))
    micro("layernorm_bf16", "normalisation", unary(_layernorm, (256, 2048), "bfloat16", grid=(8,)))
    micro("layernorm_chunked", "normalisation", unary(_layernorm, (512, 1024), rows=32))
    micro("rmsnorm_bf16", "normalisation", unary(_rmsnorm, (256, 1024), "bfloat16", grid=(8,)))


# --- streaming from and to HBM --------------------------------------------------------------------------------------


def _register_streams() -> None:
    for rows, lanes in ((8, 128), (8, 1024), (64, 512), (256, 512), (512, 1024), (1024, 1024)):
        steps = (16,) if rows * lanes <= 256 * 512 else (6,)
        micro(f"stream_{rows}x{lanes}_f32", "stream", unary(lambda x: x * 2.0, (rows, lanes), grid=steps, repeat=1))
    micro("stream_512x1024_bf16", "stream", unary(lambda x: x + x, (512, 1024), "bfloat16", grid=(8,), repeat=1))
    wide = Block((256, 512), at=lambda i: (0, i))
    micro("stream_columns", "stream", mapped(lambda x: x + 1.0, [wide], [wide], (16,), repeat=1))
    narrow = Block((512, 128), at=lambda i: (0, i))
    micro("stream_narrow_columns", "stream", mapped(lambda x: x + 1.0, [narrow], [narrow], (16,), repeat=1))
    tile = Block((128, 256), at=lambda i, j: (i, j))
    micro("stream_tiles", "stream", mapped(lambda x: x + 1.0, [tile], [tile], (4, 4), repeat=1))
    three = [Block((256, 512))] * 3
    micro(
        "stream_three_inputs", "stream", mapped(lambda a, b, c: a * b + c, three, [Block((256, 512))], (8,), repeat=1)
    )
    micro(
        "stream_two_outputs", "stream", mapped(lambda x: (x + 1, x * 2), [Block((256, 512))], three[:2], (8,), repeat=1)
    )

    def read(x: Any, o: Any) -> None:
        o[...] = x[:8, :128] + x[248:, 384:]

    micro("stream_read", "stream", lambda name: pipelined(name, read, [Block((256, 512))], [Block((8, 128))], (16,)))

    def write(x: Any, o: Any) -> None:
        import jax.numpy as jnp

        o[...] = jnp.broadcast_to(x[:1, :1], o.shape)

    micro("stream_write", "stream", lambda name: pipelined(name, write, [Block((8, 128))], [Block((256, 512))], (16,)))


# --- flash attention ------------------------------------------------------------------------------------------------


class Flash(NamedTuple):
    """Tiling of an attention of `steps` = (heads, query blocks, key blocks); `stats` is the shape of m and l.

    `wide`: m and l have `dim` equal lanes and are used as they are, without taking a column out and spreading it.
    """

    steps: tuple[int, int, int]
    queries: int
    keys: int
    dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = False
    skip: bool = False
    stats: tuple[int, ...] | None = None
    wide: bool = False


def _column(f: Flash, ref: Any) -> Any:
    """What is kept of each row, as it is used: one column, or all lanes alike."""
    if f.wide:
        return ref[...]
    return ref[...][:, None] if len(ref.shape) == 1 else ref[:, :1]


def _attend(f: Flash, q: Any, k: Any, v: Any, m: Any, total: Any, acc: Any, masked: Any) -> None:
    """One block of keys: the running maximum m, sum and accumulator of the online softmax."""
    import jax.numpy as jnp

    def keep(ref: Any, value: Any) -> None:
        ref[...] = value[:, 0] if len(ref.shape) == 1 else jnp.broadcast_to(value, ref.shape)

    scores = masked(_dot(q[0], k[0], True, "float32") * (f.dim**-0.5))
    before = _column(f, m)
    now = jnp.maximum(before, scores.max(1, keepdims=True))
    p = jnp.exp(scores - (jnp.concatenate([now] * (f.keys // f.dim), 1) if f.wide else now))
    alpha = jnp.exp(before - now)
    keep(total, alpha * _column(f, total) + p.sum(1, keepdims=True))
    keep(m, now)
    acc[...] = alpha * acc[...] + _dot(p.astype(v.dtype), v[0], False, "float32")


def flash(f: Flash, exact: bool = False) -> Callable[[str], Case]:
    """Attention by online softmax, key blocks innermost."""
    last = f.steps[2] - 1
    stats = f.stats or (f.queries, 128)

    def body(q: Any, k: Any, v: Any, o: Any, m: Any, total: Any, acc: Any) -> None:
        import jax
        import jax.numpy as jnp
        from jax.experimental import pallas as pl

        i, j = pl.program_id(1), pl.program_id(2)

        @pl.when(j == 0)
        def _() -> None:
            m[...] = jnp.full_like(m, -1e30)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        def masked(scores: Any) -> Any:
            if not f.causal:
                return scores
            row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) + i * f.queries
            column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) + j * f.keys
            return jnp.where(column <= row, scores, -1e30)

        @pl.when(j * f.keys < (i + 1) * f.queries if f.skip else j >= 0)
        def _() -> None:
            _attend(f, q, k, v, m, total, acc, masked)

        @pl.when(j == last)
        def _() -> None:
            o[0] = (acc[...] / _column(f, total)).astype(o.dtype)

    rows = Block((1, f.queries, f.dim), f.dtype, lambda h, i, j: (h, i, 0))
    keys = Block((1, f.keys, f.dim), f.dtype, functools.partial(_key_block, f))
    scratch = [(stats, "float32"), (stats, "float32"), ((f.queries, f.dim), "float32")]
    return lambda name: pipelined(name, body, [rows, keys, keys], [rows], f.steps, scratch, exact)


def _key_block(f: Flash, h: Any, i: Any, j: Any) -> tuple[Any, Any, int]:
    """A skipped block of keys is not fetched: the index stays at the last one that the queries see."""
    if not f.skip:
        return h, j, 0
    import jax.numpy as jnp

    if isinstance(j, int):
        return h, j, 0
    return h, jnp.minimum(j, ((i + 1) * f.queries - 1) // f.keys), 0


def _register_flash() -> None:
    micro("flash_128_256", "flash", flash(Flash((1, 2, 8), 128, 256)))
    micro("flash_256_512", "flash", flash(Flash((1, 2, 4), 256, 512)))
    micro("flash_512_512", "flash", flash(Flash((1, 2, 4), 512, 512)))
    micro("flash_512_1024", "flash", flash(Flash((1, 2, 4), 512, 1024)))
    micro("flash_1024_512", "flash", flash(Flash((1, 2, 4), 1024, 512)))
    micro("flash_f32_256_256", "flash", flash(Flash((1, 2, 4), 256, 256, dtype="float32")))
    micro("flash_dim64", "flash", flash(Flash((1, 2, 4), 256, 256, dim=64), exact=True))
    micro("flash_dim256", "flash", flash(Flash((1, 2, 4), 256, 256, dim=256)))
    micro("flash_causal_256", "flash", flash(Flash((1, 4, 4), 256, 256, causal=True)))
    micro("flash_causal_skip_256", "flash", flash(Flash((1, 4, 4), 256, 256, causal=True, skip=True)))
    micro("flash_causal_skip_512", "flash", flash(Flash((1, 4, 4), 512, 512, causal=True, skip=True)))
    micro("flash_heads", "flash", flash(Flash((4, 2, 2), 256, 256)))
    micro("flash_wide_512_512", "flash", flash(Flash((1, 2, 4), 512, 512, stats=(512, 128), wide=True)))
    micro("flash_wide_256_256", "flash", flash(Flash((1, 4, 4), 256, 256, stats=(256, 128), wide=True)))
    micro("flash_narrow_stats", "flash", flash(Flash((1, 2, 4), 256, 256, stats=(256, 1))))


# --- copies by hand -------------------------------------------------------------------------------------------------


def manual(
    kernel: Callable[..., None], scratch: Callable[[Any, Any], Sequence[Any]], out: Shape | None = None
) -> Callable[[str], Case]:
    """A kernel of one program whose operands stay in HBM; `scratch` is given jnp and pltpu."""

    def build(name: str) -> Case:
        import jax
        import jax.numpy as jnp
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        shape: Shape = ((131072, 512), "float32")
        hbm = pl.BlockSpec(memory_space=pltpu.HBM)
        call = pl.pallas_call(
            kernel,
            in_specs=[hbm],
            out_specs=hbm,
            out_shape=jax.ShapeDtypeStruct(*(out or shape)),
            scratch_shapes=list(scratch(jnp, pltpu)),
            name=name,
        )
        return Case(call, [shape])

    return build


def ring(rows: int, slots: int, steps: int, stride: int = 1) -> Callable[[str], Case]:
    """Chunks fetched `slots` − 1 ahead, doubled and written back; with `stride`, every so manieth chunk."""

    def kernel(x: Any, o: Any, buffer: Any, result: Any, fetched: Any, stored: Any) -> None:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        def chunk(ref: Any, i: Any) -> Any:
            return ref.at[pl.ds(pl.multiple_of(i * rows * stride, rows), rows)]

        def fetch(i: Any) -> Any:
            return pltpu.make_async_copy(chunk(x, i), buffer.at[i % slots], fetched.at[i % slots])

        def store(i: Any) -> Any:
            return pltpu.make_async_copy(result.at[i % slots], chunk(o, i), stored.at[i % slots])

        def step(i: Any, first: bool, last: bool) -> None:
            if not last:
                fetch(i + slots - 1).start()
            fetch(i).wait()
            if not first:
                store(i - slots).wait()
            result[i % slots] = buffer[i % slots] * 2.0
            store(i).start()

        # No copy and no wait is predicated: libtpu's profile takes a predicated wait for one that happens.
        for i in range(slots - 1):
            fetch(i).start()
        for i in range(slots):
            step(i, first=True, last=False)
        pl.loop(slots, steps - slots + 1)(functools.partial(step, first=False, last=False))
        for i in range(steps - slots + 1, steps):
            step(i, first=False, last=True)
        for i in range(steps - slots, steps):
            store(i).wait()

    def scratch(jnp: Any, pltpu: Any) -> Sequence[Any]:
        buffers = [pltpu.VMEM((slots, rows, 512), jnp.float32)] * 2
        return [*buffers, *[pltpu.SemaphoreType.DMA((slots,))] * 2]

    return manual(kernel, scratch)


def burst(rows: int, count: int, flags: int) -> Callable[[str], Case]:
    """`count` copies started at once on `flags` semaphores, then all awaited."""

    def kernel(x: Any, o: Any, buffer: Any, sems: Any, sem: Any) -> None:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        def fetch(i: int) -> Any:
            return pltpu.make_async_copy(x.at[pl.ds(i * rows, rows)], buffer.at[i], sems.at[i % flags])

        for i in range(count):
            fetch(i).start()
        for i in range(count):
            fetch(i).wait()
        back = pltpu.make_async_copy(buffer.at[0], o.at[pl.ds(0, rows)], sem)
        back.start()
        back.wait()

    def scratch(jnp: Any, pltpu: Any) -> Sequence[Any]:
        return [
            pltpu.VMEM((count, rows, 512), jnp.float32),
            pltpu.SemaphoreType.DMA((flags,)),
            pltpu.SemaphoreType.DMA,
        ]

    return manual(kernel, scratch)


def serial(rows: int, steps: int, columns: int = 512) -> Callable[[str], Case]:
    """Each copy awaited before the next begins: latency; fewer columns make the copy a strided one."""

    def kernel(x: Any, o: Any, buffer: Any, sem: Any) -> None:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        def copy(source: Any, target: Any) -> None:
            dma = pltpu.make_async_copy(source, target, sem)
            dma.start()
            dma.wait()

        @pl.loop(0, steps)
        def _(i: Any) -> None:
            where = (pl.ds(pl.multiple_of(i * rows, rows), rows), pl.ds(0, columns))
            copy(x.at[where], buffer)
            copy(buffer, o.at[where])

    return manual(kernel, lambda jnp, pltpu: [pltpu.VMEM((rows, columns), jnp.float32), pltpu.SemaphoreType.DMA])


def _register_copies() -> None:
    micro("ring_2_slots", "manual copies", ring(64, 2, 16))
    micro("ring_4_slots", "manual copies", ring(64, 4, 16))
    micro("ring_8_slots_small", "manual copies", ring(8, 8, 32))
    micro("ring_2_slots_large", "manual copies", ring(512, 2, 8))
    micro("ring_scattered", "manual copies", ring(16, 4, 16, stride=7))
    micro("burst_small", "manual copies", burst(8, 32, 32))
    micro("burst_one_flag", "manual copies", burst(8, 32, 1))
    micro("burst_large", "manual copies", burst(256, 8, 8))
    micro("serial_small", "manual copies", serial(8, 16))
    micro("serial_large", "manual copies", serial(512, 4))
    micro("serial_strided", "manual copies", serial(256, 8, columns=128))

    def within(x: Any, o: Any, sem: Any) -> None:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        dma = pltpu.make_async_copy(x.at[pl.ds(0, 1024)], o.at[pl.ds(0, 1024)], sem)
        dma.start()
        dma.wait()

    micro("hbm_to_hbm", "manual copies", manual(within, lambda _, pltpu: [pltpu.SemaphoreType.DMA]))


# --- conversions ----------------------------------------------------------------------------------------------------


def _register_conversions() -> None:
    pairs = {
        "bf16_to_f32": ("bfloat16", "float32"),
        "f32_to_bf16": ("float32", "bfloat16"),
        "int8_to_f32": ("int8", "float32"),
        "int8_to_bf16": ("int8", "bfloat16"),
        "int8_to_int32": ("int8", "int32"),
        "int32_to_f32": ("int32", "float32"),
        "f32_to_int32": ("float32", "int32"),
        "f32_to_int8": ("float32", "int8"),
        "bf16_to_int8": ("bfloat16", "int8"),
        "fp8_to_f32": ("float8_e4m3fn", "float32"),
        "f32_to_fp8": ("float32", "float8_e4m3fn"),
    }
    for name, (source, target) in pairs.items():
        convert = functools.partial(lambda x, dtype: x.astype(dtype), dtype=target)
        micro(f"convert_{name}", "conversion", unary(convert, (256, 512), source, target))
    quantise = unary(lambda x: (x * 0.25).astype("int8"), (512, 512), "float32", "int8", rows=64)
    micro("quantise_chunked", "conversion", quantise)
    dequantise = unary(lambda x: x.astype("float32") * 0.125, (512, 512), "int8", "float32", rows=64)
    micro("dequantise_chunked", "conversion", dequantise)


# --- masks ----------------------------------------------------------------------------------------------------------


def _register_masks() -> None:
    import jax
    import jax.numpy as jnp

    def iotas(x: Any) -> tuple[Any, Any]:
        return tuple(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))  # type: ignore[return-value]

    def causal(x: Any) -> Any:
        row, column = iotas(x)
        return jnp.where(column <= row, x, -1e30)

    def checkerboard(x: Any) -> Any:
        row, column = iotas(x)
        return jnp.where(((row // 8 + column // 16) & 1) == 0, x, -x)

    def ladder(x: Any) -> Any:
        result = x
        for threshold in (-2.0, -1.0, 0.0, 1.0, 2.0):
            result = jnp.where(x > threshold, result * 0.5, result + threshold)
        return result

    def one_hot(x: Any) -> Any:
        return (iotas(x)[1] == x[:, :1]).astype(jnp.float32)

    def logic(x: Any) -> Any:
        row, column = iotas(x)
        inside = (x > 0.0) & ((row > 3) | (column < 100)) & ~(x > 5.0)
        return jnp.where(inside, x, 0.0)

    micro("mask_causal", "mask", unary(causal))
    micro("mask_checkerboard", "mask", unary(checkerboard))
    micro("mask_ladder", "mask", unary(ladder))
    micro("mask_logic", "mask", unary(logic))
    micro("mask_one_hot", "mask", unary(one_hot, dtype="int32", out="float32"))
    micro("mask_causal_chunked", "mask", unary(causal, (512, 512), rows=32))
    micro("mask_ladder_bf16", "mask", unary(ladder, dtype="bfloat16"))


# --- dynamic slices of VMEM -----------------------------------------------------------------------------------------


def _register_gathers() -> None:
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def one_row(x: Any, o: Any) -> None:
        @pl.loop(0, 128)
        def _(i: Any) -> None:
            o[pl.ds(i, 1)] = x[pl.ds(255 - i, 1)] * 2.0

    def row_group(x: Any, o: Any) -> None:
        @pl.loop(0, 32)
        def _(i: Any) -> None:
            start = pl.multiple_of(((i * 5) % 32) * 8, 8)
            o[pl.ds(pl.multiple_of(i * 8, 8), 8)] = x[pl.ds(start, 8)] + 1.0

    def spread(x: Any, o: Any) -> None:
        @pl.loop(0, 32)
        def _(i: Any) -> None:
            row = x[pl.ds(i * 7, 1)]
            o[pl.ds(pl.multiple_of(i * 8, 8), 8)] = jnp.broadcast_to(row, (8, row.shape[1]))

    def carried(x: Any, o: Any) -> None:
        import jax

        def step(i: Any, total: Any) -> Any:
            return total * 0.5 + x[pl.ds(i, 1)]

        o[...] = jnp.broadcast_to(jax.lax.fori_loop(0, 64, step, jnp.zeros((1, 512))), o.shape)

    def unrolled(x: Any, o: Any) -> None:
        @pl.loop(0, 128, unroll=8)
        def _(i: Any) -> None:
            o[pl.ds(i, 1)] = x[pl.ds(255 - i, 1)]

    bodies = {
        "row": one_row,
        "row_group": row_group,
        "spread": spread,
        "carried": carried,
        "row_unrolled": unrolled,
    }
    for label, body in bodies.items():

        def build(name: str, body: Callable[..., None] = body) -> Case:
            return pipelined(name, body, [Block((256, 512))], [Block((256, 512))], (2,))

        micro(f"gather_{label}", "gather", build)
    micro("gather_table", "gather", _table_gather)

    def strided(x: Any, o: Any) -> None:
        for start in range(4):
            o[pl.ds(start * 64, 64)] = x[pl.ds(start, 64, stride=4)]

    block = [Block((256, 128))]
    micro("gather_strided", "gather", lambda name: pipelined(name, strided, block, block))


def _table_gather(name: str) -> Case:
    """Rows of a block in the order that a prefetched table gives: the time does not depend on its values."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def body(table: Any, x: Any, o: Any) -> None:
        @pl.loop(0, 128)
        def _(i: Any) -> None:
            o[pl.ds(i, 1)] = x[pl.ds(table[i], 1)]

    block = Block((256, 512))
    shape = large(block, (2,))
    spec = pl.BlockSpec(block.shape, lambda i, table: (i, 0))
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(2,), in_specs=[spec], out_specs=spec),
        out_shape=jax.ShapeDtypeStruct(shape[0], jnp.float32),
        name=name,
    )
    table = np.random.default_rng(0).permutation(256)[:128].astype(np.int32)
    return Case(call, [((128,), "int32"), shape], {0: table})


# --- JAX's own kernels ----------------------------------------------------------------------------------------------


def jax_flash(dtype: str, causal: bool, keys: int, name: str) -> Case:
    """jax.experimental.pallas.ops.tpu.flash_attention, one head of 1,024 rows among many that are not visited."""
    import jax
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    sizes = BlockSizes(block_q=256, block_k_major=keys, block_k=256, block_b=1)

    def call(q: Any, k: Any, v: Any) -> Any:
        with jax.named_scope(name):
            return flash_attention(q, k, v, causal=causal, sm_scale=0.088, block_sizes=sizes)

    return Case(call, [((1, 4, 1024, 128), dtype)] * 3)


def _register_jax() -> None:
    micro("jax_flash_f32", "jax flash", functools.partial(jax_flash, "float32", False, 512))
    micro("jax_flash_f32_causal", "jax flash", functools.partial(jax_flash, "float32", True, 256))
    micro("jax_flash_bf16_causal", "jax flash", functools.partial(jax_flash, "bfloat16", True, 512))
    micro("jax_flash_bf16_one_step", "jax flash", functools.partial(jax_flash, "bfloat16", False, 1024))


def _register_all() -> None:
    for register in (
        _register_elementwise,
        _register_transcendental,
        _register_reductions,
        _register_permutes,
        _register_transposes,
        _register_matmuls,
        _register_normalisations,
        _register_streams,
        _register_flash,
        _register_copies,
        _register_conversions,
        _register_masks,
        _register_gathers,
        _register_jax,
    ):
        register()


# --- kernels with published figures ---------------------------------------------------------------------------------


def docs_matmul(size: int, block: tuple[int, int, int], **options: Any) -> Callable[[str], Case]:
    """The matmul that JAX's Pallas notebook times: bf16 in and out, f32 accumulator; block is (bm, bk, bn)."""
    bm, bk, bn = block
    return grid_matmul((size // bm, size // bn, size // bk), block, out="bfloat16", exact=True, **options)


def xla_matmul(size: int) -> Callable[[str], Case]:
    """XLA's own."""

    def build(_: str) -> Case:
        import jax.numpy as jnp

        return Case(lambda a, b: jnp.matmul(a, b), [((size, size), "bfloat16")] * 2)

    return build


def article_flash(queries: int, keys: int, stats: str, causal: bool = False) -> Callable[[str], Case]:
    """Single-head attention, 16,384 × 128, as the article describes it.

    `stats`, how m and l are kept: `full` (queries, 128) of which one column is used, `wide` all of it, `flat`
    (queries,), `column` (queries, 1). The article's source is not public, so that several are worth a look.
    """
    steps = (1, 16384 // queries, 16384 // keys)
    shape = {"flat": (queries,), "column": (queries, 1)}.get(stats, (queries, 128))
    tiling = Flash(steps, queries, keys, causal=causal, skip=causal, stats=shape, wide=stats == "wide")
    return flash(tiling, exact=True)


def paged(pages_per_block: int) -> Callable[[str], Case]:
    """jax.experimental.pallas.ops.tpu.paged_attention, decoding 64 sequences of 4,096 tokens in pages of 16.

    The page table is given flat, as the kernel wants it, so that it is an operand of the kernel as it stands.
    """
    sequences, pages, page, heads = 64, 256, 16, 8

    def build(_: str) -> Case:
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

        def call(q: Any, k: Any, v: Any, lengths: Any, table: Any) -> Any:
            table = table.reshape(sequences, pages)
            return paged_attention(q, k, v, lengths, table, pages_per_compute_block=pages_per_block)

        cache: Shape = ((heads, sequences * pages, page, 128), "bfloat16")
        shapes: list[Shape] = [((sequences, 64, 128), "bfloat16"), cache, cache]
        shapes += [((sequences,), "int32"), ((sequences * pages,), "int32")]
        lengths = np.full(sequences, pages * page, np.int32)
        return Case(call, shapes, {3: lengths, 4: np.arange(sequences * pages, dtype=np.int32)})

    return build


def grouped(tiling: tuple[int, int, int]) -> Callable[[str], Case]:
    """megablox's grouped matmul, 128 groups of 256 rows.

    It computes its metadata from the group sizes by XLA ops. Here they are computed beforehand and passed in, so
    that what steers the kernel has known values: the prediction is of the kernel alone.
    """
    m, k, n, groups = 32768, 4096, 1536, 128

    def build(_: str) -> Case:
        (offsets, ids, tiles), active = _group_metadata(np.full(groups, m // groups, np.int32), m, tiling[0])

        def call(lhs: Any, rhs: Any, offsets: Any, ids: Any, tiles: Any, active: Any) -> Any:
            import jax.numpy as jnp

            gmm = _megablox()
            with _metadata(gmm, ((offsets, ids, tiles), active)):
                return gmm.gmm.__wrapped__(
                    lhs, rhs, jnp.zeros(groups, jnp.int32), preferred_element_type=jnp.bfloat16, tiling=tiling
                )

        integers = [offsets, ids, tiles, active]
        shapes: list[Shape] = [((m, k), "bfloat16"), ((groups, k, n), "bfloat16")]
        shapes += [(array.shape, "int32") for array in integers]
        return Case(call, shapes, dict(enumerate(integers, 2)))

    return build


def _megablox() -> Any:
    """The module, which the package hides behind its function of the same name."""
    import importlib

    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _group_metadata(sizes: np.ndarray, m: int, tile: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    import jax.numpy as jnp

    metadata, active = _megablox().make_group_metadata(
        group_sizes=jnp.asarray(sizes),
        m=m,
        tm=tile,
        start_group=jnp.array(0, jnp.int32),
        num_nonzero_groups=len(sizes),
        visit_empty_groups=False,
    )
    return tuple(np.asarray(array, np.int32) for array in metadata), np.asarray(active, np.int32)


@contextmanager
def _metadata(gmm: Any, known: Any) -> Iterator[None]:
    """Within, the grouped matmul takes the metadata that are given for those it would compute."""
    original = gmm.make_group_metadata
    gmm.make_group_metadata = lambda **_: known
    try:
        yield
    finally:
        gmm.make_group_metadata = original


def jax_matmul(_: str) -> Case:
    """jax.experimental.pallas.ops.tpu.matmul."""
    from jax.experimental.pallas.ops.tpu.matmul import matmul

    call = functools.partial(matmul, block_shape=(1024, 2048), block_k=1024)
    return Case(call, [((8192, 8192), "bfloat16"), ((8192, 28672), "bfloat16")])


def _published() -> dict[str, Kernel]:
    import jax

    docs = (512, 1024, 1024)
    tiles = (128, 128, 128)
    builders: dict[str, tuple[str, str, Callable[[str], Case]]] = {}
    for size in (1024, 4096, 8192):
        builders[f"mm-128-{size}"] = ("matmul", "v5e", docs_matmul(size, tiles))
        builders[f"mm-512-{size}"] = ("matmul", "v5e", docs_matmul(size, docs))
    builders["mm-t-128-4096"] = ("matmul", "v5e", docs_matmul(4096, tiles, transposed=True))
    builders["mm-t-512-4096"] = ("matmul", "v5e", docs_matmul(4096, docs, transposed=True))
    builders["mm-act-512-4096"] = ("matmul", "v5e", docs_matmul(4096, docs, activation=jax.nn.relu))
    builders["xla-mm-4096"] = ("xla matmul", "v5e", xla_matmul(4096))
    builders["xla-mm-8192"] = ("xla matmul", "v5e", xla_matmul(8192))
    article = {
        "fa-0": (128, 256, "full", False),
        "fa-1": (128, 256, "flat", False),
        "fa-2": (2048, 256, "flat", False),
        "fa-3": (2048, 1024, "flat", False),
        "fa-4": (2048, 1024, "flat", True),
        # The same experiments with m and l kept otherwise: compare with the figure of the name without its suffix.
        "fa-0-wide": (128, 256, "wide", False),
        "fa-1-column": (128, 256, "column", False),
        "fa-2-column": (2048, 256, "column", False),
        "fa-2-wide": (2048, 256, "wide", False),
        "fa-3-wide": (2048, 1024, "wide", False),
        "fa-4-wide": (2048, 1024, "wide", True),
    }
    for name, (queries, keys, stats, causal) in article.items():
        builders[name] = ("flash", "v5e", article_flash(queries, keys, stats, causal))
    builders["paged-64"] = ("paged attention", "v6e", paged(64))
    builders["paged-128"] = ("paged attention", "v6e", paged(128))
    builders["gmm-128-512-512"] = ("grouped matmul", "v6e", grouped((128, 512, 512)))
    builders["gmm-256-1024-1024"] = ("grouped matmul", "v6e", grouped((256, 1024, 1024)))
    builders["mm-v6e"] = ("matmul", "v6e", jax_matmul)
    short = {"mm-512-1024", "mm-512-4096", "mm-t-512-4096", "mm-act-512-4096", "fa-3", "fa-4", "fa-3-wide", "fa-4-wide"}
    return {
        name: Kernel(kind, functools.partial(build, name.replace("-", "_")), profiled=name in short, chips=(chip,))
        for name, (kind, chip, build) in builders.items()
    }


def ragged(q_lens: Sequence[int], kv_lens: Sequence[int], decodes: int) -> Callable[[str], Case]:
    """This project's kernel.py at Llama-3-8B's heads, on full pages in a random order."""
    page, heads = 32, 8
    pages_a_sequence = max(kv_lens) // page
    sequences, tokens, pages = len(q_lens), sum(q_lens), len(q_lens) * pages_a_sequence

    def build(_: str) -> Case:
        import kernel

        integers = [
            np.array(kv_lens, np.int32),
            np.random.default_rng(0).permutation(pages).astype(np.int32),
            np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
            np.array([decodes, decodes, sequences], np.int32),
        ]
        shapes: list[Shape] = [((tokens, 4 * heads, 128), "bfloat16")]
        shapes += [((tokens, heads, 128), "bfloat16")] * 2 + [((pages, page, heads, 2, 128), "bfloat16")]
        shapes += [(array.shape, "int32") for array in integers]
        return Case(kernel.kernel_fn, shapes, dict(enumerate(integers, 4)), donated=(3,))

    return build


def _speed() -> dict[str, Kernel]:
    """What the executor's own speed is measured on."""
    cases = {
        "rpa-decode": ragged([1] * 128, [8192] * 128, 128),
        "rpa-prefill": ragged([8192], [8192], 0),
        "fa-grid": article_flash(128, 256, "full", False),
    }
    return {name: Kernel("speed", functools.partial(build, name), profiled=False) for name, build in cases.items()}


_register_all()
PUBLISHED = _published()
SPEED = _speed()
