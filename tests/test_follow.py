"""Kernels followed on their scalars alone: what is in order, and each way to be out of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from judge.copies import Broken
from judge.follow import Unfollowable, follow

ROWS, COLUMNS = 64, 128
LENGTHS = np.array([3, 0, 5, 2], np.int32)
SCRATCH = [pltpu.VMEM((2, 8, COLUMNS), jnp.float32), pltpu.SMEM((4,), jnp.int32), pltpu.SemaphoreType.DMA((2,))]

pytestmark = pytest.mark.usefixtures("on_v5e")


def followed(body, lengths=LENGTHS, grid=(4,), aliases=None, **options):
    """Follows a kernel body(lengths, x, out, buffer, numbers, semaphores) with x and out in HBM."""
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    specs = {"in_specs": [hbm], "out_specs": hbm, "scratch_shapes": SCRATCH} | options
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=grid, **specs),
        out_shape=jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32),
        input_output_aliases=aliases or {},
    )
    x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
    follow(jax.make_jaxpr(call)(jax.ShapeDtypeStruct(lengths.shape, jnp.int32), x), {0: lengths})


def copy(x, buffer, semaphores, first, slot):
    return pltpu.make_async_copy(x.at[pl.ds(first, 8)], buffer.at[slot], semaphores.at[slot])


def pipelined(lengths, x, out, buffer, numbers, semaphores, *, wait_early):
    """Double buffering by hand over as many blocks as the lengths say; right where each block is waited for first."""
    blocks = lengths[pl.program_id(0)]
    pl.when(blocks > 0)(lambda: copy(x, buffer, semaphores, 0, 0).start())

    @pl.loop(0, blocks)
    def _(block):
        slot = jax.lax.rem(block, 2)
        pl.when(block + 1 < blocks)(lambda: copy(x, buffer, semaphores, (block + 1) * 8, 1 - slot).start())
        fetch = copy(x, buffer, semaphores, block * 8, slot)
        early = wait_early(blocks)
        pl.when(early)(fetch.wait)
        buffer[slot] = buffer[slot] * 2
        pl.when(jnp.logical_not(early))(fetch.wait)


def test_double_buffering():
    followed(functools.partial(pipelined, wait_early=lambda blocks: blocks >= 0))


def test_a_wait_that_one_length_lacks():
    with pytest.raises(Broken, match=r"py:\d+ reads vmem.*, which the copy of test_follow.py:\d+, not waited for"):
        followed(functools.partial(pipelined, wait_early=lambda blocks: blocks != 2))
    lengths = np.where(LENGTHS == 2, 3, LENGTHS)
    followed(functools.partial(pipelined, wait_early=lambda blocks: blocks != 2), lengths)


def test_scalars_out_of_bounds():
    def body(lengths, x, out, buffer, numbers, semaphores):
        numbers[0] = lengths[jnp.where(lengths[0] == 3, 4, 0)]

    with pytest.raises(Broken, match=r"element 4 of an axis of 4 in smem\[4\]"):
        followed(body)
    followed(body, LENGTHS + 1)


def test_a_copy_out_of_bounds():
    def body(lengths, x, out, buffer, numbers, semaphores):
        pltpu.sync_copy(x.at[pl.ds(lengths[2] * 12, 8)], buffer.at[0])

    with pytest.raises(Broken, match="element 67 of an axis of 64"):
        followed(body)


def test_a_copy_that_nobody_waits_for():
    def body(lengths, x, out, buffer, numbers, semaphores):
        copy(x, buffer, semaphores, 0, 0).start()

    with pytest.raises(Broken, match="nobody waits for the copy"):
        followed(body, grid=(1,))


def test_a_wait_without_a_copy():
    def body(lengths, x, out, buffer, numbers, semaphores):
        copy(x, buffer, semaphores, 0, 0).wait()

    with pytest.raises(Broken, match="waits for a copy that was not started"):
        followed(body)


def test_writing_over_what_a_copy_takes():
    def body(lengths, x, out, buffer, numbers, semaphores):
        store = pltpu.make_async_copy(buffer.at[0], out.at[pl.ds(0, 8)], semaphores.at[0])
        store.start()
        buffer[0, 3] = jnp.zeros(COLUMNS)
        store.wait()

    with pytest.raises(Broken, match=r"writes vmem.*, which the copy of"):
        followed(body)


def test_one_wait_for_two_copies():
    def body(lengths, x, out, buffer, numbers, semaphores):
        for half in range(2):
            pltpu.make_async_copy(x.at[pl.ds(4 * half, 4)], buffer.at[0, pl.ds(4 * half, 4)], semaphores.at[0]).start()
        copy(x, buffer, semaphores, 0, 0).wait()
        buffer[1] = buffer[0]

    followed(body)


def in_turn(lengths, x, out, buffer, numbers, semaphores, *, sizes, waits):
    """Copies of so many rows into one buffer, one semaphore; then waits for so many rows, and the first row is read."""
    place = 0
    for rows in sizes:
        part = pl.ds(place, rows)
        pltpu.make_async_copy(x.at[part], buffer.at[0, part], semaphores.at[0]).start()
        place += rows
    for rows in waits:
        pltpu.make_async_copy(x.at[pl.ds(0, rows)], buffer.at[0, pl.ds(0, rows)], semaphores.at[0]).wait()
    numbers[0] = lengths[0]
    buffer[0, 0] = buffer[0, 0] + 1
    left = sum(sizes) - sum(waits)
    if left:
        pltpu.make_async_copy(x.at[pl.ds(0, left)], buffer.at[0, pl.ds(0, left)], semaphores.at[0]).wait()


@pytest.mark.parametrize(
    ("sizes", "waits", "is_over"),
    [
        ((4, 4), (4,), False),  # the second may have come first
        ((4, 4), (4, 4), True),
        ((4, 4), (4, 2), True),  # neither can be missing
        ((6, 2), (4,), True),  # the second has no more than 2
        ((2, 6), (6,), False),
        ((2, 6), (6, 2), True),
    ],
)
def test_copies_on_one_semaphore_end_in_any_order(sizes, waits, is_over):
    body = functools.partial(in_turn, sizes=sizes, waits=waits)
    if is_over:
        followed(body, grid=(2,))
        return
    with pytest.raises(Broken, match="not waited for, touches"):
        followed(body, grid=(2,))


def test_bytes_that_nobody_waits_for():
    def body(lengths, x, out, buffer, numbers, semaphores):
        pltpu.make_async_copy(x.at[pl.ds(0, 8)], buffer.at[0], semaphores.at[0]).start()
        pltpu.make_async_copy(x.at[pl.ds(0, 4)], buffer.at[0, pl.ds(0, 4)], semaphores.at[0]).wait()

    with pytest.raises(Broken, match="nobody waits for the copy"):
        followed(body, grid=(1,))


def test_scalars_through_smem_and_loops():
    def body(lengths, x, out, buffer, numbers, semaphores):
        numbers[1] = 0

        @pl.loop(0, 4)
        def _(i):
            numbers[1] += lengths[i] // 2

        total = jax.lax.fori_loop(0, 2, lambda i, t: t + numbers[1], 0)
        pltpu.sync_copy(x.at[pl.ds(total * 8 - 8, 8)], buffer.at[0])  # (1 + 0 + 2 + 1) × 2 = 8 blocks

    followed(body)


def test_scoped_memory_and_a_pipeline():
    def body(lengths, x, out, buffer, numbers, semaphores):
        def with_more(more, semaphore):
            pltpu.async_copy(x.at[pl.ds(0, 8)], more, semaphore).wait()
            more[...] += 1

        pl.run_scoped(with_more, pltpu.VMEM((8, COLUMNS), jnp.float32), pltpu.SemaphoreType.DMA)

        def step(x_ref, out_ref):
            out_ref[...] = x_ref[...]

        block = pl.BlockSpec((8, COLUMNS), lambda i: (i, 0))
        pltpu.emit_pipeline(step, grid=(8,), in_specs=[block], out_specs=[block])(x, out)

    followed(body, grid=(1,))


def blockwise(lengths, x, out, buffer, numbers, semaphores):
    out[...] = x[...]


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (lambda i, lengths: (i, 0), ""),
        (lambda i, lengths: (i % 2, 0), "is visited again"),
        (lambda i, lengths: (lengths[i] + 4, 0), "lies outside"),
    ],
)
def test_blocks(index, told):
    spec = pl.BlockSpec((8, COLUMNS), index)
    run = functools.partial(followed, blockwise, in_specs=[spec], out_specs=spec)
    if not told:
        run()
        return
    with pytest.raises(Broken, match=told):
        run()


def from_whole(lengths, x, out, buffer, numbers, semaphores):
    pltpu.sync_copy(x.at[pl.ds(0, 8)], buffer.at[0])
    out[...] = buffer[0]


@pytest.mark.parametrize(
    ("inward", "outward", "body", "error", "told"),
    [
        (lambda i, n: (i, 0), lambda i, n: (i, 0), blockwise, None, ""),
        (lambda i, n: (i + 1, 0), lambda i, n: (i, 0), blockwise, None, ""),
        (lambda i, n: (i - i // 2, 0), lambda i, n: (i, 0), blockwise, Broken, "put before"),
        (lambda i, n: (jnp.where(n[i] == 2, 0, i), 0), lambda i, n: (i, 0), blockwise, Broken, "put before"),
        (None, lambda i, n: (i + 1, 0), from_whole, None, ""),
        (None, lambda i, n: (i, 0), from_whole, Broken, "a block's own copy, not waited for"),
        (lambda i, n: (i, 0), None, lambda *_: None, Unfollowable, "by blocks"),
    ],
)
def test_blocks_of_one_memory(inward, outward, body, error, told):
    """An operand that is the output's memory too: fetched or read where a block of the output has been put."""
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    inward, outward = (whole if index is None else pl.BlockSpec((8, COLUMNS), index) for index in (inward, outward))
    run = functools.partial(followed, body, in_specs=[inward], out_specs=outward, aliases={1: 0})
    if error is None:
        run()
        return
    with pytest.raises(error, match=told):
        run()


def test_steering_by_what_was_computed():
    def body(lengths, x, out, buffer, numbers, semaphores):
        fetch = copy(x, buffer, semaphores, 0, 0)
        pl.when(jnp.sum(buffer[0]) > 0)(fetch.start)

    with pytest.raises(Unfollowable, match="no scalar gives"):
        followed(body)


def rows(lengths, x, out, buffer, numbers, semaphores, *, apart):
    """Two copies under way to rows of a buffer that is seen as one list of rows, the same row or not."""
    seen = buffer.reshape(16, COLUMNS)
    copies = [
        pltpu.make_async_copy(x.at[pl.ds(row, 1)], seen.at[pl.ds(7 + row * apart * lengths[0], 1)], semaphores.at[0])
        for row in range(2)
    ]
    for one in copies:
        one.start()
    for one in copies:
        one.wait()


def test_rows_of_a_buffer_seen_as_another_shape():
    followed(functools.partial(rows, apart=1))
    with pytest.raises(Broken, match="not waited for, touches"):
        followed(functools.partial(rows, apart=0))


def test_out_of_bounds_of_what_is_seen():
    with pytest.raises(Broken, match="out of bounds: element 19"):
        followed(functools.partial(rows, apart=4))
