"""benchmarks/peers.py: every kernel is judged on one problem; a peer's file is its wrapper and that problem alone."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.pallas import tpu

from judge import contract, pipeline, policy, roofline
from judge.chips import CHIPS, load_chip
from kernels import tables
from kernels.peers import worker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peers

PREFILL = next(shape for shape in peers.SHAPES if shape.batch == "prefill")


def defined(shape: peers.Shape) -> dict[str, object]:
    """What a peer's file of a shape defines."""
    lines = peers.with_peer(peers.problem(shape), "jax_rpa").splitlines()
    module: dict[str, object] = {}
    text = "\n".join(line for line in lines if "import ragged_paged_attention" not in line)  # here for its problem
    exec(compile(text, "problem", "exec"), module)
    return module


def source(text: str) -> contract.Source:
    return contract.check_source(text.encode(), "kernel.py")


@pytest.mark.parametrize("peer", ["rpa_v3", "jax_rpa"])
def test_a_peer_gets_the_problem_and_not_our_kernel(peer):
    base = peers.problem(PREFILL)
    text = peers.with_peer(base, peer)
    theirs, ours = source(text), source(f"{base}\nNEEDS = {source(text).needs!r}\n")
    assert contract.changed_symbols(theirs, ours) == []
    assert "pallas_call" not in text
    assert policy.violations(ast.parse(text), theirs.needs) == []


def test_a_shape_is_in_the_problem():
    shape = peers.Shape(name="s", batch="decode", context=1000, num_seqs=3, num_q_heads=8, num_kv_heads=4, page_size=16)
    module = defined(shape)
    arguments = module["WORKLOADS"]["decode"]
    assert (arguments["num_pages"], module["NUM_KV_HEADS"], module["MAX_CONTEXT"]) == (3 * 63, 4, 1000)
    q_lens, kv_lens, decodes = module["_lengths"](**arguments)
    assert (list(q_lens), decodes) == ([1, 1, 1], 3)
    assert kv_lens.min() >= 500 and kv_lens.max() <= 1000
    # QK^T and PV, two FLOPs a multiply-add, 8 heads of 128 channels.
    assert module["compute_flops"](**arguments) == 2 * 2 * 8 * 128 * kv_lens.sum()


@pytest.mark.parametrize(("kv_dtype", "num_kv_heads", "rows"), [("float8_e4m3fn", 4, 2), ("int8", 1, 1)])
def test_a_shape_says_what_the_cache_is_of(kv_dtype, num_kv_heads, rows):
    heads = {"num_q_heads": 8, "num_kv_heads": num_kv_heads, "page_size": 16}
    module = defined(peers.Shape(name="s", batch="decode", context=64, num_seqs=3, kv_dtype=kv_dtype, **heads))
    arguments = module["WORKLOADS"]["decode"]
    queries, keys, values, kv_cache, *_ = module["generate_inputs"](jax.random.key(0), **arguments)
    assert queries.dtype == "bfloat16"
    assert (keys.dtype, values.dtype, kv_cache.dtype) == (kv_dtype,) * 3
    assert kv_cache.shape == (3 * 4, 16, rows, 4, 128)
    _, kv_lens, _ = module["_lengths"](**arguments)
    # Queries in and output out, two bytes each; the new tokens in and into their slots, and the cached ones.
    assert module["compute_bytes"](**arguments) == 2 * 3 * 8 * 128 * 2 + 2 * num_kv_heads * 128 * (3 + kv_lens.sum())


@pytest.mark.parametrize("window", [1, 60, 5000])
def test_what_a_window_leaves_is_what_counts(window):
    heads = {"num_q_heads": 8, "num_kv_heads": 4, "page_size": 16}
    shape = peers.Shape(name="s", batch="mixed", context=4000, num_seqs=4, sliding_window=window, **heads)
    module = defined(shape)
    arguments = module["WORKLOADS"]["mixed"]
    q_lens, kv_lens, _ = module["_lengths"](**arguments)
    firsts = kv_lens - q_lens
    seen = [[min(i + 1, window) for i in range(first, last)] for first, last in zip(firsts, kv_lens, strict=True)]
    assert module["compute_flops"](**arguments) == 2 * 2 * 8 * 128 * sum(map(sum, seen))
    cached = sum(min(first, window - 1) for first in firsts)
    new = q_lens.sum()
    assert module["compute_bytes"](**arguments) == 2 * new * 8 * 128 * 2 + (2 * new + cached) * 2 * 4 * 128 * 2


def test_shapes_have_names_of_their_own():
    assert len({shape.name for shape in peers.SHAPES}) == len(peers.SHAPES)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_peer_is_told_the_chip_by_its_name_in_their_tables(chip, monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.devices)
    worker.tell_chip(load_chip(chip).topology)
    assert worker.get_device_name() == tables.DEVICES[chip]


def test_at_head_dim_64_keys_and_values_are_one_row_of_the_cache():
    module = defined(next(shape for shape in peers.SHAPES if shape.head_dim == 64))
    small = {"batch": "decode", "num_tokens": 2, "num_seqs": 2, "num_pages": 128, "page_size": 128}
    queries, keys, _, cache, *_ = module["generate_inputs"](jax.random.key(0), **small)
    assert (queries.shape, keys.shape, cache.shape) == ((2, 64, 64), (2, 8, 64), (128, 128, 4, 2, 128))
    with pytest.raises(NotImplementedError, match="no cache with keys and values beside each other"):
        module["kernel_fn"](queries, keys, keys, cache, None, None, None, None)


@pytest.mark.parametrize(("own", "pages"), [(128, 32), (16, 16)])
@pytest.mark.parametrize(("kv_dtype", "scale"), [("bfloat16", None), ("float8_e4m3fn", 1.0)])
def test_jaxs_kernel_has_its_packages_block_sizes_up_to_a_bound(own, pages, kv_dtype, scale, monkeypatch):
    heads = {"num_q_heads": 8, "num_kv_heads": 4, "page_size": 64, "kv_dtype": kv_dtype}
    module = defined(peers.Shape(name="s", batch="prefill", context=8192, num_seqs=1, **heads))
    asked, given = [], {}

    def kernel(queries, cache, kv_lens, page_indices, *_, **options):
        given.update(options, cache=cache.shape, page_indices=page_indices.shape)
        return queries

    def chosen(*problem):
        asked.append(problem)
        return own, 32

    tuned = {  # the new tokens are of the second: its heads and pages, and more tokens than the first has
        ("bfloat16", "bfloat16", 8, 4, 128, 64, 2048, 1024): (16, 16),
        ("bfloat16", "bfloat16", 8, 4, 128, 64, 4096, 512): (8, 48),
        ("bfloat16", "bfloat16", 8, 4, 128, 128, 8192, 8192): (4, 64),
        ("bfloat16", "bfloat16", 32, 8, 128, 64, 8192, 8192): (4, 128),
    }
    package = {"get_tuned_block_sizes": chosen, "TUNED_BLOCK_SIZES": {"TPU v6": tuned}}
    module["tuned_block_sizes"] = SimpleNamespace(get_device_name=lambda: "TPU7x", **package)
    module["jax_rpa"] = kernel
    monkeypatch.setattr(tpu, "get_tpu_info", lambda: SimpleNamespace(vmem_capacity_bytes=16 << 20))
    inputs = module["generate_inputs"](jax.random.key(0), **module["WORKLOADS"]["prefill"])
    out, cache = jax.eval_shape(module["kernel_fn"], *inputs)
    assert (out.shape, cache.shape) == (inputs[0].shape, inputs[3].shape)
    assert asked == [("bfloat16", kv_dtype, 8, 4, 128, 64, 8192, 128)]
    assert (given["num_kv_pages_per_block"], given["num_queries_per_block"]) == (pages, 48)
    assert (given["k_scale"], given["v_scale"]) == (scale, scale)
    assert (given["cache"], given["page_indices"]) == ((128, 64, 8, 128), (1, 128))


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ('{"sparse_core_config":{"offload":"OFFLOAD_DATA_FORMATTING"}}', True),
        ('{"sparse_core_config":{"offload":"OFFLOAD_GATHER"}}', False),
        ("{}", False),
    ],
)
def test_only_a_transposition_on_the_sparse_core_is_left_out_of_a_peers_time(config, known):
    hlo = f"""%sparse (p: bf16[8,8]) -> bf16[8,8] {{
  %inner = ((bf16[8,8]), bf16[8,8], u32[]) call-start(%p), async_execution_thread="sparsecore", to_apply=%copy
}}

ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {{
  %a = bf16[8,8]{{1,0}} parameter(0)
  %start = ((bf16[8,8]{{1,0}}, token[]), bf16[8,8]{{0,1}}) call-start(%a), to_apply=%sparse, backend_config={config}
  ROOT %done = bf16[8,8]{{0,1}} call-done(%start)
}}
"""
    assert peers.on_sparse_core(hlo) == known
    nothing_asynchronous = "\n".join(line for line in hlo.splitlines() if "%start" not in line)
    assert not peers.on_sparse_core(nothing_asynchronous)


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ({"ours": (1.0, False), "rpa_v3": (3.0, False), "jax_rpa": (2.0, True)}, "at least 2.00 times"),
        ({"ours": (2.0, False), "rpa_v3": (3.0, False), "jax_rpa": (4.0, True)}, "ours is 1.50 times"),
        ({"ours": (2.0, False), "rpa_v3": (3.0, True), "jax_rpa": (None, False)}, "at least 1.50 times"),
        ({"ours": (None, False), "rpa_v3": (3.0, False), "jax_rpa": (3.0, False)}, None),
    ],
)
def test_the_ratio_is_to_the_better_peer_and_a_bound_where_its_time_is_one(times, told, monkeypatch, capsys):
    def judged(text, name, chip, base):
        latency_ms, bound = times[name]
        verdict = pipeline.Verdict(status="PASS", mode="model", chip=chip)
        verdict.facts["prefill"] = {peers.AT_LEAST: 1} if bound else {}
        if latency_ms is not None:
            figures = roofline.figures(
                seconds=latency_ms / 1e3,
                flops=1e6,
                compulsory_bytes=1e3,
                moved_bytes=1e3,
                peak_flops=1e12,
                chip=load_chip(chip),
            )
            verdict.total, verdict.workloads["prefill"] = figures, figures
        return verdict

    monkeypatch.setattr(peers, "judged", judged)
    ratio = peers.row(PREFILL, "v5e", list(peers.NAMES), None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(times) + (told is not None)
    assert told is None if ratio is None else told in lines[-1] and f"{ratio:.2f}" in told
    assert sum("at least" in line for line in lines[: len(times)]) == sum(bound for _, bound in times.values())
