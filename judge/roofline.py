"""Closed-form bounds and the figures that follow from a time. All pure functions; times in seconds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from judge.chips import Chip


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One workload's figures, or several workloads' geometric means; percentages of the device's peak."""

    score: float  # util_pct × 100 ÷ latency_ms
    latency_ms: float
    util_pct: float  # roofline time ÷ time
    mfu_pct: float  # FLOPs ÷ (time × peak FLOP/s)
    mbu_pct: float  # compulsory HBM bytes ÷ (time × peak bandwidth)
    bw_util_pct: float | None  # HBM bytes that moved ÷ (time × peak bandwidth); None where nobody counted
    tflops: float
    regime: str  # COMPUTE-BOUND or MEMORY-BOUND: the larger bound

    def finite(self) -> bool:
        numbers = (self.score, self.latency_ms, self.util_pct, self.mfu_pct, self.mbu_pct, self.tflops)
        return all(math.isfinite(x) for x in numbers) and self.latency_ms > 0 and self.score > 0


def peak_flops_per_second(chip: Chip, input_dtypes: Iterable[str]) -> float:
    """Peak of the fastest matmul that the inputs allow: int8 or fp8 where an input has it, else bf16.

    An upper bound on what a kernel may reach, so that the roofline time is a true lower bound.
    """
    kinds = {"bf16"}
    for dtype in input_dtypes:
        kinds |= {"int8"} if dtype in ("int8", "uint8") else {"fp8"} if dtype.startswith("float8") else set()
    return max(chip.peak_flops_per_second.get(kind, 0.0) for kind in kinds)


def bounds_seconds(flops: float, compulsory_bytes: float, peak_flops: float, chip: Chip) -> tuple[float, float]:
    """(FLOPs ÷ peak, compulsory bytes ÷ bandwidth): no kernel is faster than the larger."""
    return flops / peak_flops, compulsory_bytes / chip.hbm_bytes_per_second


def figures(
    *, seconds: float, flops: float, compulsory_bytes: float, moved_bytes: float | None, peak_flops: float, chip: Chip
) -> Figures:
    """Figures of one workload that took `seconds`."""
    compute, memory = bounds_seconds(flops, compulsory_bytes, peak_flops, chip)
    util_pct = 100 * max(compute, memory) / seconds
    latency_ms = seconds * 1e3
    moved = None if moved_bytes is None else 100 * moved_bytes / (seconds * chip.hbm_bytes_per_second)
    return Figures(
        score=util_pct * 100 / latency_ms,
        latency_ms=latency_ms,
        util_pct=util_pct,
        mfu_pct=100 * compute / seconds,
        mbu_pct=100 * memory / seconds,
        bw_util_pct=moved,
        tflops=flops / seconds / 1e12,
        regime="COMPUTE-BOUND" if compute >= memory else "MEMORY-BOUND",
    )


def combine(workloads: Iterable[Figures]) -> Figures:
    """Geometric means over workloads, so that score = util_pct × 100 ÷ latency_ms holds for the combination too."""
    each = list(workloads)
    if len(each) == 1:
        return each[0]

    def mean(values: Iterable[float]) -> float:
        logs = [math.log(max(value, 1e-12)) for value in values]
        return math.exp(math.fsum(logs) / len(logs))

    moved = [one.bw_util_pct for one in each if one.bw_util_pct is not None]
    mfu_pct, mbu_pct = mean(one.mfu_pct for one in each), mean(one.mbu_pct for one in each)
    return Figures(
        score=mean(one.score for one in each),
        latency_ms=mean(one.latency_ms for one in each),
        util_pct=mean(one.util_pct for one in each),
        mfu_pct=mfu_pct,
        mbu_pct=mbu_pct,
        bw_util_pct=mean(moved) if len(moved) == len(each) else None,
        tflops=mean(one.tflops for one in each),
        regime="COMPUTE-BOUND" if mfu_pct >= mbu_pct else "MEMORY-BOUND",
    )
