"""The lines that people and agents read and grep: RESULT, REGIME, then `key: value`, units as in the ledger."""

from judge import ledger
from judge.pipeline import Verdict
from judge.roofline import Figures


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.3g}"


def result_lines(total: Figures) -> list[str]:
    moved = "" if total.bw_util_pct is None else f" BW={total.bw_util_pct:.1f}%"
    return [
        f"RESULT: score={_short(total.score)} latency={_short(total.latency_ms)}ms util={total.util_pct:.2f}% "
        f"tflops={_short(total.tflops)}",
        f"REGIME: {total.regime}{moved}",
    ]


def summary(verdict: Verdict) -> list[str]:
    """What a judging found, without a ledger row."""
    lines = result_lines(verdict.total) if verdict.total else []
    lines += [f"status: {verdict.status}", f"mode: {verdict.mode}", f"chip: {verdict.chip}"]
    if verdict.reason:
        lines.append(f"reason: {ledger.escape(verdict.reason)}")
    if verdict.total:
        total = verdict.total
        for name in ("score", "util_pct", "tflops", "bw_util_pct", "mfu_pct", "mbu_pct"):
            value = getattr(total, name)
            lines += [] if value is None else [f"{name}: {value:.9g}"]
        lines.append(f"median_ms: {total.latency_ms:.9g}")
    for name, one in verdict.workloads.items():
        lines.append(
            f"workload {name}: median_ms={one.latency_ms:.6g} util_pct={one.util_pct:.4g} mfu_pct={one.mfu_pct:.4g} "
            f"mbu_pct={one.mbu_pct:.4g} {one.regime}"
        )
    if verdict.vmem_bytes is not None:
        lines.append(f"vmem_mib: {verdict.vmem_bytes / 2**20:.9g}")
    for key in ("spill_count", "copy_count"):
        value = getattr(verdict, key)
        lines += [] if value is None else [f"{key}: {value}"]
    lines.append(f"seconds: {verdict.seconds:.1f}")
    return lines
