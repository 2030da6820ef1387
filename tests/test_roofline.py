"""judge/roofline.py: the formulas, and the article's mistakes with them."""

import dataclasses
import math

import pytest

from judge.chips import Chip
from judge.roofline import bounds_seconds, combine, figures, peak_flops_per_second

CHIP = Chip(
    name="made up",
    topology="",
    device_kind="",
    tensor_cores=1,
    peak_flops_per_second={"bf16": 200e12, "int8": 400e12},
    hbm_bytes_per_second=1e12,
    hbm_bytes=1,
    vmem_bytes_per_core=1,
)


def made(seconds=1e-3, flops=1e11, compulsory_bytes=1e8, moved_bytes=2e8):
    return figures(
        seconds=seconds,
        flops=flops,
        compulsory_bytes=compulsory_bytes,
        moved_bytes=moved_bytes,
        peak_flops=200e12,
        chip=CHIP,
    )


def test_figures_of_a_compute_bound_kernel():
    one = made()
    assert one.latency_ms == pytest.approx(1.0)
    assert one.util_pct == pytest.approx(50.0)  # 0.5 ms of FLOPs
    assert one.mfu_pct == pytest.approx(50.0)
    assert one.mbu_pct == pytest.approx(10.0)
    assert one.bw_util_pct == pytest.approx(20.0)
    assert one.tflops == pytest.approx(100.0)
    assert one.score == pytest.approx(5000.0)
    assert one.regime == "COMPUTE-BOUND"


def test_figures_of_a_memory_bound_kernel():
    one = made(flops=1e9, compulsory_bytes=8e8)
    assert one.util_pct == one.mbu_pct == pytest.approx(80.0)
    assert one.mfu_pct == pytest.approx(0.5)
    assert one.regime == "MEMORY-BOUND"


def test_the_articles_score():
    """RESULT: score=7142.89 latency=0.99ms util=70.94% tflops=139.74"""
    one = figures(
        seconds=0.9931e-3,
        flops=139.74e12 * 0.9931e-3,
        compulsory_bytes=0,
        moved_bytes=None,
        peak_flops=197e12,
        chip=CHIP,
    )
    assert one.util_pct == pytest.approx(70.94, abs=0.01)
    assert one.score == pytest.approx(7142.89, rel=1e-3)
    assert one.tflops == pytest.approx(139.74)


@pytest.mark.parametrize("blocks", [8, 64, 1024])
def test_a_causal_kernel_is_not_credited_with_masked_flops(blocks):
    """Crediting the whole square doubles the figure: 99.43 % claimed is about half of the peak in truth."""
    square = 4 * 128 * (blocks * 128) ** 2
    visible = 4 * 128 * (blocks * 128) * (blocks * 128 + 1) // 2
    seconds = square / 200e12 / 0.9943
    claimed, true = made(seconds=seconds, flops=square), made(seconds=seconds, flops=visible)
    assert claimed.mfu_pct == pytest.approx(99.43)
    assert true.mfu_pct == pytest.approx(99.43 / 2, rel=1e-2)
    assert true.mfu_pct < 50.0


def test_bounds():
    assert bounds_seconds(4e12, 3e9, 200e12, CHIP) == (pytest.approx(0.02), pytest.approx(0.003))


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 3.0])
def test_the_score_falls_with_the_square_of_time(factor):
    assert made(seconds=1e-3 * factor).score == pytest.approx(made().score / factor**2)


def test_combination_is_geometric_and_keeps_the_formula():
    each = [made(), made(seconds=4e-3, flops=3e11), made(seconds=2e-5, flops=1e9, compulsory_bytes=1.5e7)]
    total = combine(each)
    assert total.latency_ms == pytest.approx((1.0 * 4.0 * 0.02) ** (1 / 3))
    assert total.util_pct == pytest.approx(math.prod(one.util_pct for one in each) ** (1 / 3))
    assert total.score == pytest.approx(math.prod(one.score for one in each) ** (1 / 3))
    assert total.score == pytest.approx(total.util_pct * 100 / total.latency_ms)
    assert total.regime == "COMPUTE-BOUND"
    assert combine(reversed(each)).score == pytest.approx(total.score)


def test_combining_one_changes_nothing():
    one, total = made(), combine([made()])
    assert total.score == pytest.approx(one.score) and total.regime == one.regime


def test_traffic_that_nobody_counted_is_absent():
    assert made(moved_bytes=None).bw_util_pct is None
    assert combine([made(), made(moved_bytes=None)]).bw_util_pct is None
    assert combine([made(), made()]).bw_util_pct == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("dtypes", "peak"),
    [
        (["bfloat16"], 200e12),
        (["float32", "int32"], 200e12),
        (["bfloat16", "int8"], 400e12),
        (["uint8"], 400e12),
        (["float8_e4m3fn"], 200e12),  # the chip has no fp8: it runs as bf16
        ([], 200e12),
    ],
)
def test_peak_by_dtype(dtypes, peak):
    assert peak_flops_per_second(CHIP, dtypes) == peak


def test_peak_of_a_chip_with_fp8():
    chip = dataclasses.replace(CHIP, peak_flops_per_second={"bf16": 1e15, "fp8": 2e15})
    assert peak_flops_per_second(chip, ["float8_e5m2", "bfloat16"]) == 2e15
    assert peak_flops_per_second(chip, ["int8"]) == 1e15


@pytest.mark.parametrize("field", ["score", "latency_ms", "util_pct", "mfu_pct", "mbu_pct", "tflops"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite(field, value):
    assert made().finite()
    assert not dataclasses.replace(made(), **{field: value}).finite()


@pytest.mark.parametrize("field", ["score", "latency_ms"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_time_or_score_that_cannot_be(field, value):
    assert not dataclasses.replace(made(), **{field: value}).finite()
