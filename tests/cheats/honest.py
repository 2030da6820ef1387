"""Honest but unusual kernels, which must pass."""

from tests.cheats import BOTH_STARTED, Case, whole_operands
from tests.cheats.precision import FINE
from tests.cheats.stale_memory import ALIAS

CASES = [
    Case(name="8 queries a block", sweeps=(("Q_BLOCK_TOKENS = 16", "Q_BLOCK_TOKENS = 8"),)),
    Case(name="64 queries a block", sweeps=(("Q_BLOCK_TOKENS = 16", "Q_BLOCK_TOKENS = 64"),)),
    Case(name="1 pages a block", sweeps=(("KV_BLOCK_PAGES = 2", "KV_BLOCK_PAGES = 1"),)),
    Case(name="8 pages a block", sweeps=(("KV_BLOCK_PAGES = 2", "KV_BLOCK_PAGES = 8"),)),
    Case(
        name="transposed scores",
        edits=(
            (
                "scores = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)",
                "scores = jax.lax.dot_general(k, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).T",
            ),
        ),
    ),
    Case(
        name="powers of two",
        edits=(("p = jnp.exp(scores - m_new)", "p = jnp.exp2((scores - m_new) * math.log2(math.e))"),),
    ),
    Case(
        name="fused scale",
        edits=(
            (
                "scores = jnp.where(visible, scores * sm_scale, mask_value)",
                "scores = jnp.where(visible, scores, mask_value)",
            ),
            ("p = jnp.exp(scores - m_new)", "p = jnp.exp((scores - m_new) * sm_scale)"),
            ("alpha = jnp.exp(m_old - m_new)", "alpha = jnp.exp((m_old - m_new) * sm_scale)"),
        ),
    ),
    Case(
        name="outputs in the queries' buffer",
        sweeps=(
            ("o_vmem[:, head * group", "q_vmem[:, head * group"),
            ("copy(o_vmem, o_hbm", "copy(q_vmem, o_hbm"),
            ("copy(o_vmem.at[row - window]", "copy(q_vmem.at[row - window]"),
        ),
    ),
    Case(
        name="another mask value",
        edits=(("DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)", "DEFAULT_MASK_VALUE = -1e30"),),
    ),
    Case(
        name="heads unrolled",
        edits=(
            (
                "                @pl.loop(0, num_kv_heads)\n                def _(head):\n",
                "                for head in range(num_kv_heads):\n",
            ),
        ),
    ),
    Case(
        name="no blocks past the diagonal",
        edits=(
            (
                "            @pl.loop(0, num_kv_blocks)\n            def _(block):\n",
                "            visible_end = jnp.minimum(kv_len, kv_len - q_len + row_end - q_start)\n            visible_blocks = pl.cdiv(visible_end, bkv)\n\n            @pl.loop(0, visible_blocks)\n            def _(block):\n",
            ),
            ("@pl.when(block + 1 < num_kv_blocks)", "@pl.when(block + 1 < visible_blocks)"),
        ),
    ),
    Case(
        name="a grid as large as the batch",
        edits=(
            ("grid=(max_num_seqs,)", "grid=(distribution[2],)"),
            ("@pl.when(seq == max_num_seqs - 1)", "@pl.when(seq == pl.num_programs(0) - 1)"),
        ),
    ),
    Case(
        name="no tunables",
        sweeps=(
            (
                'TUNABLES = {\n    "Q_BLOCK_TOKENS": (1, 2, 4, 8, 16, 32, 64, 128, 256),\n    "KV_BLOCK_PAGES": (1, 2, 4, 8, 16, 32),\n}\n',
                "",
            ),
        ),
    ),
    Case(
        name="a reciprocal",
        edits=(("out = acc_vmem[head] / l_vmem[head][:, :1]", "out = acc_vmem[head] * (1.0 / l_vmem[head][:, :1])"),),
    ),
    Case(
        name="waits for each new token at once",
        edits=(
            (
                "            new_token_copy(token).start()\n\n        @pl.loop(0, q_len)\n        def _(token):\n            new_token_copy(token).wait()",
                "            new_token_copy(token).start()\n            new_token_copy(token).wait()",
            ),
        ),
    ),
    Case(
        name="a helper class and a main block",
        edits=(
            ("import functools\n", "import dataclasses\nimport functools\n"),
            (
                "\nLANES = 128\n",
                "\nLANES = 128\n\n\n@dataclasses.dataclass(frozen=True)\nclass Tiles:\n    rows: int = 16\n\n    def __len__(self):\n        return self.rows\n",
            ),
            (
                "\ndef get_tiling_meta",
                '\nif __name__ == "__main__":\n    print(reference_fn.__name__)\n\n\ndef get_tiling_meta',
            ),
        ),
    ),
    Case(
        name="prints while tracing",
        edits=(
            (
                "    seq = pl.program_id(0)\n",
                "    print('tracing', getattr(q_hbm, 'dtype', None))\n    seq = pl.program_id(0)\n",
            ),
        ),
    ),
    Case(name="8 rows a step", base="add", edits=(("BLOCK = 32 ", "BLOCK = 8 "),)),
    Case(name="256 rows a step", base="add", edits=(("BLOCK = 32 ", "BLOCK = 256 "),)),
    Case(
        name="one step",
        base="add",
        edits=(
            (
                "pl.BlockSpec((BLOCK, COLUMNS), lambda i, a_ref: (i, 0))",
                "pl.BlockSpec((ROWS, COLUMNS), lambda i, a_ref: (0, 0))",
            ),
            ("grid=(ROWS // BLOCK,)", "grid=(1,)"),
        ),
    ),
    Case(
        name="steps backwards",
        base="add",
        edits=(("lambda i, a_ref: (i, 0)", "lambda i, a_ref: (ROWS // BLOCK - 1 - i, 0)"),),
    ),
    Case(
        name="one of two workloads",
        base="add",
        own_baseline=True,
        edits=(("def compute_flops", 'WORKLOADS = {"one": {}, "two": {}}\n\n\ndef compute_flops'),),
    ),
    Case(
        name="a tuple of outputs",
        base="add",
        own_baseline=True,
        edits=(("    )(a, x, y)", "    )(a, x, y), x"), ("    return a[0] * x + y", "    return a[0] * x + y, x")),
    ),
    Case(
        name="plain XLA, declared",
        base="add",
        own_baseline=True,
        edits=(
            (
                "def kernel_fn(a, x, y):",
                'NEEDS = ("no pallas",)\n\n\ndef kernel_fn(a, x, y):\n    return x + y\n\n\ndef unused(a, x, y):',
            ),
            ("    return a[0] * x + y", "    return x + y"),
        ),
    ),
    Case(
        name="another module, declared",
        base="add",
        own_baseline=True,
        edits=(
            ("import jax\nimport", "import collections\n\nimport jax\nimport"),
            ("\nROWS,", '\nNEEDS = ("collections",)\nNAMES = collections.OrderedDict(a=1)\nROWS,'),
        ),
    ),
    Case(
        name="bfloat16",
        base="add",
        own_baseline=True,
        edits=(
            (
                "jax.random.normal(of_x, (ROWS, COLUMNS)), jax.random.normal(of_y, (ROWS, COLUMNS))",
                "jax.random.normal(of_x, (ROWS, COLUMNS), jnp.bfloat16), jax.random.normal(of_y, (ROWS, COLUMNS), jnp.bfloat16)",
            ),
            (
                "    out_ref[...] = a.astype(jnp.float32) * x_ref[...] + y_ref[...]",
                "    out_ref[...] = a.astype(x_ref.dtype) * x_ref[...] + y_ref[...]",
            ),
            ("    return a[0] * x + y", "    return a[0].astype(x.dtype) * x + y"),
        ),
    ),
    Case(
        name="int8 values, a scale, float32 out",
        base="add",
        own_baseline=True,
        edits=(
            (
                "jax.random.normal(of_x, (ROWS, COLUMNS)),",
                "jax.random.randint(of_x, (ROWS, COLUMNS), -127, 127, jnp.int8),",
            ),
            ("* x_ref[...] +", "* x_ref[...].astype(jnp.float32) +"),
            ("jax.ShapeDtypeStruct(x.shape, x.dtype)", "jax.ShapeDtypeStruct(x.shape, y.dtype)"),
            ("    return a[0] * x + y", "    return a[0] * x.astype(y.dtype) + y"),
        ),
    ),
    Case(
        name="copies by hand",
        base="add",
        edits=(
            (
                "def kernel_fn(a, x, y):\n    rows = pl.BlockSpec((BLOCK, COLUMNS), lambda i, a_ref: (i, 0))",
                "def by_hand(a_ref, x_hbm, y_hbm, out_hbm, x_ref, y_ref, sem):\n    fetch_x = pltpu.make_async_copy(x_hbm, x_ref, sem.at[0])\n    fetch_y = pltpu.make_async_copy(y_hbm, y_ref, sem.at[1])\n    fetch_x.start()\n    fetch_y.start()\n    fetch_x.wait()\n    fetch_y.wait()\n    body(a_ref, x_ref, y_ref, y_ref)\n    store = pltpu.make_async_copy(y_ref, out_hbm, sem.at[0])\n    store.start()\n    store.wait()\n\n\ndef kernel_fn(a, x, y):\n    rows = pl.BlockSpec(memory_space=pltpu.HBM)",
            ),
            ("        body,\n", "        by_hand,\n"),
            (
                "grid=(ROWS // BLOCK,), in_specs=[rows, rows], out_specs=rows",
                "grid=(1,), in_specs=[rows, rows], out_specs=rows,\n            scratch_shapes=[pltpu.VMEM((ROWS, COLUMNS), jnp.float32), pltpu.VMEM((ROWS, COLUMNS), jnp.float32), pltpu.SemaphoreType.DMA((2,))]",
            ),
        ),
    ),
    Case(name="a matrix product", base="matmul", own_baseline=True),
    Case(name="a matrix product in full float32", base="matmul", base_edits=FINE, own_baseline=True),
    Case(
        name="rows and columns exchanged in the grid",
        base="matmul",
        edits=(
            ("grid=(M // BM, N // BN, K // BK)", "grid=(N // BN, M // BM, K // BK)"),
            ("lambda i, j, k: (i, k)", "lambda j, i, k: (i, k)"),
            ("lambda i, j, k: (k, j)", "lambda j, i, k: (k, j)"),
            ("lambda i, j, k: (i, j)", "lambda j, i, k: (i, j)"),
        ),
    ),
    Case(
        name="a cost estimate of its own",
        edits=(
            (
                "        name=KERNEL_NAME,\n",
                "        name=KERNEL_NAME,\n        cost_estimate=pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=1),\n",
            ),
        ),
    ),
    Case(
        name="copies in a class of their own, and a main block that times",
        edits=(
            ("import functools\n", "import enum\nimport functools\nimport itertools\n"),
            (
                "\nLANES = 128\n",
                "\nLANES = 128\n\n\nclass Slot(enum.IntEnum):\n    FIRST = 0\n\n\nclass PageCopies:\n    def __init__(self, make):\n        self._make = make\n        self.count = 0\n\n    def start(self, *where):\n        self.count += 1\n        self._make(*where).start()\n",
            ),
            (
                "        def start_fetch(block, slot):\n            for_each_page_copy(block, slot, lambda dma: dma.start())\n",
                "        copies = PageCopies(lambda block, slot: start_all(block, slot))\n\n        class start_all:\n            def __init__(self, block, slot):\n                self.where = (block, slot)\n\n            def start(self):\n                for_each_page_copy(*self.where, lambda dma: dma.start())\n\n        def start_fetch(block, slot):\n            copies.start(block, slot)\n",
            ),
            (
                "            start_fetch(0, 0)\n",
                "            start_fetch(0, int(Slot.FIRST))\n            assert list(itertools.repeat(1, 2)) == [1, 1]\n",
            ),
            (
                "\ndef get_tiling_meta",
                '\nif __name__ == "__main__":\n    import time\n\n    started = time.perf_counter()\n    jax.block_until_ready(reference_fn(*generate_inputs(jax.random.key(0))))\n    print(f"{time.perf_counter() - started:.3f} s on {jax.devices()[0]}")\n\n\ndef get_tiling_meta',
            ),
        ),
    ),
    Case(
        name="scoped memory, a branch with values and a loop with a carry",
        base="add",
        edits=(
            ("import jax\nimport", "import functools\nfrom typing import NamedTuple\n\nimport jax\nimport"),
            (
                "def body(a_ref, x_ref, y_ref, out_ref):\n",
                'class Rows(NamedTuple):\n    first: int = 0\n    count: int = 8\n\n\ndef body(a_ref, x_ref, y_ref, out_ref, *, rows):\n    if x_ref.shape[0] % rows.count:\n        raise ValueError(f"{x_ref.shape[0]} rows are no multiple of {rows.count}")\n    with jax.named_scope("scaled_add"):\n        pl.run_scoped(functools.partial(scaled, a_ref, x_ref, y_ref, out_ref), pltpu.VMEM(x_ref.shape, jnp.float32))\n\n\ndef scaled(a_ref, x_ref, y_ref, out_ref, sum_ref):\n    sum_ref[...] = y_ref[...]\n\n    def add_eight(i, done):\n        rows = pl.ds(pl.multiple_of(i * 8, 8), 8)\n        sum_ref[rows, :] += a_ref[0].astype(jnp.float32) * x_ref[rows, :]\n        return done + 1\n\n    done = jax.lax.fori_loop(0, x_ref.shape[0] // 8, add_eight, 0)\n    enough = jax.lax.cond(done > 0, lambda: 1, lambda: 0)\n\n    @pl.when(enough == 1)\n    def _():\n        out_ref[...] = sum_ref[...]\n\n\ndef unused(a_ref, x_ref, y_ref, out_ref):\n',
            ),
            ("        body,\n", "        functools.partial(body, rows=Rows()._replace(first=0)),\n"),
        ),
    ),
    Case(
        name="a pipeline in the kernel",
        base="add",
        edits=(
            (
                "def kernel_fn(a, x, y):\n    rows = pl.BlockSpec((BLOCK, COLUMNS), lambda i, a_ref: (i, 0))",
                "def outer(a_ref, x_hbm, y_hbm, out_hbm):\n    def step(x_ref, y_ref, out_ref):\n        out_ref[...] = a_ref[0].astype(jnp.float32) * x_ref[...] + y_ref[...]\n\n    block = pl.BlockSpec((BLOCK, COLUMNS), lambda i: (i, 0))\n    pltpu.emit_pipeline(step, grid=(ROWS // BLOCK,), in_specs=[block, block], out_specs=[block])(x_hbm, y_hbm, out_hbm)\n\n\ndef kernel_fn(a, x, y):\n    rows = pl.BlockSpec(memory_space=pltpu.HBM)",
            ),
            ("        body,\n", "        outer,\n"),
            (
                "grid=(ROWS // BLOCK,), in_specs=[rows, rows], out_specs=rows",
                "grid=(1,), in_specs=[rows, rows], out_specs=rows",
            ),
        ),
    ),
    Case(
        name="rolled, strided and back",
        base="add",
        edits=(
            (
                "    out_ref[...] = a.astype(jnp.float32) * x_ref[...] + y_ref[...]",
                "    rolled = pltpu.roll(a.astype(jnp.float32) * x_ref[...], 1, 0)\n    out_ref[...] = pltpu.roll(rolled, x_ref.shape[0] - 1, 0)\n    for first in range(2):\n        rows = pl.ds(first, x_ref.shape[0] // 2, stride=2)\n        bits = pltpu.bitcast(out_ref[rows, :], jnp.int32)\n        out_ref[rows, :] = pltpu.bitcast(bits, jnp.float32) + y_ref[rows, :]",
            ),
        ),
    ),
    Case(
        name="two copies on one semaphore, in the memory of the output",
        base="add",
        edits=whole_operands(
            BOTH_STARTED
            + """    for copy in copies:
        copy.wait()
    x_vmem[...] = jnp.broadcast_to(a_ref[0], x_vmem.shape).astype(jnp.float32) * x_vmem[...] + y_vmem[...]
    pltpu.sync_copy(x_vmem, out_hbm)
""",
            ALIAS,
        ),
    ),
    Case(
        name="blocks in the memory of the output",
        base="add",
        edits=(
            (
                "in_specs=[rows, rows], out_specs=rows\n        ),\n",
                "in_specs=[rows, rows], out_specs=rows\n        ),\n" + ALIAS,
            ),
        ),
    ),
]
