"""An explanation as text: a workload's share of one screen."""

from collections import Counter
from collections.abc import Iterable, Mapping

from judge.explanation import KERNEL_FILE, XLA_OPS, Buffer, Explanation, WaitCost, changes

WIDTH = 120
_ROWS = 16  # of one workload: three and the report's own two lines make a screen of 50
_LINES_SHOWN = (3, 10)  # of the source, at least and at most
_WAITS_SHOWN = 2
_CHANGES_SHOWN = 6


def render(name: str, one: Explanation, before: Explanation | None, rows: int = _ROWS) -> list[str]:
    """One workload's lines for a screen of 120 columns: at most `rows`, filled up with the dearest source lines."""
    title = [f"workload {name}: {one.cycles:,.0f} cycles, {one.seconds * 1e3:.4g} ms, {one.bound}"]
    spent = {cause: cycles for cause, cycles in one.cycles_by_cause.items() if cycles >= one.cycles / 1000}
    title += _row("cycles", ", ".join(f"{cause} {_percent(c, one.cycles)}" for cause, c in _largest(spent)))
    rest = _figure_rows(one) + (_change_rows(one, before) if before else [])
    fewest, most = _LINES_SHOWN
    return [*title, *_line_rows(one, max(fewest, min(most, rows - len(title) - len(rest)))), *rest]


def _line_rows(one: Explanation, count: int) -> list[str]:
    text = []
    for cost in one.lines[:count]:
        place = f"{KERNEL_FILE}:{cost.line}" if cost.line else "elsewhere"
        split = f"{cost.share_pct:5.1f} % (issue {cost.issue_cycles:,.0f}, stalls {cost.stall_cycles:,.0f})"
        text += _row("line", f"{place:<14} {split:<46} {cost.text}")
    return text


def _figure_rows(one: Explanation) -> list[str]:
    """Units, copies, memory; no row for spills or XLA ops where there are none."""
    text = _row("units", ", ".join(f"{unit} {p:.0f} %" for unit, p in _largest(one.occupancy_pct) if p >= 0.5))
    text += _dma_rows(one)
    ratio = f", {one.hbm_bytes / one.compulsory_bytes:.2f}x" if one.compulsory_bytes else ""
    text += _row("HBM", f"{_size(one.hbm_bytes)} moved, {_size(one.compulsory_bytes)} compulsory{ratio}")
    text += _row("VMEM", f"{_size(one.vmem_bytes)}: {', '.join(_buffers(one.vmem))}")
    if one.spills_executed or one.fills_executed:
        text += _row(
            "spills",
            f"executed: {one.spills_executed:,} stores, {one.fills_executed:,} refills; "
            f"{one.hot_fill_pct:.1f} % of the vector loads in the hot blocks are refills",
        )
    if not one.xla_ops:
        return text
    copies = sum(op.cycles for op in one.xla_ops if op.is_copy)
    share = f"{_percent(one.cycles_by_cause[XLA_OPS], one.cycles)} (copies {_percent(copies, one.cycles)})"
    ops = ", ".join(f"{op.name} {op.share_pct:.1f} %" for op in one.xla_ops[:4])
    return text + _row("XLA ops", f"{share}: {ops}")


def _buffers(buffers: Iterable[Buffer]) -> list[str]:
    """Buffers of the same size and tag as one, the largest first."""
    alike = Counter((buffer.size_bytes, buffer.tag.split(".")[0]) for buffer in buffers)
    return [
        f"{f'{count} x ' if count > 1 else ''}{_size(size_bytes)} {tag}"
        for (size_bytes, tag), count in sorted(alike.items(), key=lambda item: -item[0][0])
    ]


def _dma_rows(one: Explanation) -> list[str]:
    busy = "" if one.hbm_path_busy_pct is None else f", path to HBM busy {one.hbm_path_busy_pct:.0f} % of the kernel"
    text = _row(
        "DMA",
        f"{one.dma_count:,} copies of {_size(one.dma_mean_bytes)} on average; {one.hbm_gb_per_s:.1f} GB/s, "
        f"{one.hbm_peak_pct:.1f} % of peak{busy}",
    )
    for wait in [wait for wait in one.waits if wait.share_pct >= 0.05][:_WAITS_SHOWN]:
        place = f"{KERNEL_FILE}:{wait.line}" if wait.line else "the pipeline"
        each = f"{wait.count:,} x {wait.cycles / wait.count:,.0f} cycles"
        text += _row("wait", f"{place} {wait.share_pct:.1f} %, {each}: {_waited_for(wait)}")
    return text


def _waited_for(wait: WaitCost) -> str:
    """The buffers whose copies it waits for; the flags where no copy was recorded, as for a semaphore."""
    if not wait.copies:
        return f"flag {', '.join(map(str, wait.flags[:4]))}{', …' if len(wait.flags) > 4 else ''}, no copy recorded"
    into = " and ".join(wait.buffers[:2]) + (" and others" if len(wait.buffers) > 2 else "")
    return f"{into or 'no buffer'}, {' and '.join(wait.copy_kinds)} of {_size(wait.mean_copy_bytes)}"


def _change_rows(one: Explanation, before: Explanation) -> list[str]:
    """Figures that changed: the cycles, then by how large the change is against the larger of the two."""
    changed = changes(one, before)
    if not changed:
        return _row("changed", "nothing: the same figures as the champion's")
    order = sorted(changed, key=lambda name: (name != "cycles", -_relative(changed[name])))
    parts = [f"{name} {changed[name][0]:,.4g} → {changed[name][1]:,.4g}" for name in order[:_CHANGES_SHOWN]]
    return [line for i in range(0, len(parts), 3) for line in _row("" if i else "changed", ", ".join(parts[i : i + 3]))]


def _relative(pair: tuple[float, float]) -> float:
    return abs(pair[1] - pair[0]) / max(map(abs, pair))


def _row(label: str, text: str) -> list[str]:
    line = f"  {label:<8} {text}"
    return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"]


def _largest(values: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(values.items(), key=lambda item: -item[1])


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} GiB"
