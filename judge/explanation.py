"""Why a kernel costs what it costs: where its cycles go, by cause, source line, unit, copy and buffer.

Covers what the executor counts: bundles issued, stalls, waits for copies, the XLA ops beside the kernel. A bundle's
cycles are shared evenly among its slots that come from a source line; a stall is charged to the bundle that waited.
"""

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from judge.chips import Chip
from judge.compile import op_of_dump
from judge.llo.dma import DmaRecord
from judge.llo.execute import Execution
from judge.llo.issue import CAUSES
from judge.llo.module import ModuleCost, OpCost
from judge.llo.parse import Dump, ParseError, parse_allocations, parse_dump, parse_utilization
from judge.roofline import Figures

NO_SOURCE = "no source line (pipeline, compiler)"
XLA_OPS = "XLA ops"
KERNEL_FILE = "kernel.py"  # name of the traced copy
_HOT = 0.8  # share of a kernel's issued bundles that its hot blocks make up


@dataclass(frozen=True, kw_only=True)
class LineCost:
    """One line of the kernel file, or a group of what is not in it."""

    line: int | None
    text: str
    issue_cycles: float
    stall_cycles: float  # DMA waits included
    share_pct: float  # of the workload's cycles


@dataclass(frozen=True, kw_only=True)
class WaitCost:
    """One wait of the schedule: who waits, on which flags, for which copies into or out of which buffers."""

    line: int | None
    flags: tuple[int, ...]
    count: int
    cycles: int
    share_pct: float
    copies: int  # recorded, on these flags
    copy_kinds: tuple[str, ...]
    mean_copy_bytes: float
    buffers: tuple[str, ...]  # in VMEM, the one with the most copies first


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One buffer in VMEM."""

    name: str
    tag: str
    shape: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class OpShare:
    """One XLA op beside the kernel."""

    name: str
    opcode: str
    cycles: float
    share_pct: float
    hbm_bytes: int
    is_copy: bool


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One workload's run. `cycles_by_cause` sums to `cycles`."""

    cycles: float
    seconds: float
    bound: str  # DMA-bound, issue-bound, stall-bound
    cycles_by_cause: dict[str, float]
    lines: list[LineCost]
    occupancy_pct: dict[str, float]  # slots used ÷ (cycles of the kernel × slots of the unit)
    dma_count: int
    dma_mean_bytes: float
    hbm_gb_per_s: float
    hbm_peak_pct: float
    hbm_path_busy_pct: float | None  # of the kernel's cycles; None where not every copy was recorded
    waits: list[WaitCost]
    hbm_bytes: int
    compulsory_bytes: float
    vmem_bytes: int
    vmem: list[Buffer]
    spills_executed: int
    fills_executed: int
    hot_fill_pct: float  # refills ÷ vector loads in the hot blocks
    xla_ops: list[OpShare]


@dataclass(frozen=True, kw_only=True)
class _Kernel:
    """A Mosaic kernel of the module: what it cost, and its schedule."""

    cost: OpCost
    execution: Execution
    dump: Dump
    capacity: dict[str, int]
    vmem: list[Buffer]


def explain(folder: Path, cost: ModuleCost, figures: Figures, chip: Chip, source: str) -> Explanation:
    """The explanation of one executed module.

    `folder`: the HLO and dumps that it was executed from; `figures`: its time against the roofline; `source`: the
    kernel file's text. Raises ParseError where a dump cannot be read again.
    """
    kernels = [
        _kernel(folder, op, execution) for op in cost.ops if op.is_kernel and (execution := op.execution) is not None
    ]
    causes = _cycles_by_cause(cost, kernels)
    executions = [op.execution for op in cost.ops if op.execution]
    sizes = [dma.size_bytes for execution in executions for dma in execution.dmas]
    return Explanation(
        cycles=cost.cycles,
        seconds=cost.seconds,
        bound=_bound(causes),
        cycles_by_cause=causes,
        lines=_lines(kernels, cost.cycles, source.splitlines()),
        occupancy_pct=_occupancy(kernels),
        dma_count=sum(execution.dma_count for execution in executions),
        dma_mean_bytes=sum(sizes) / len(sizes) if sizes else 0.0,
        hbm_gb_per_s=cost.hbm_bytes / cost.seconds / 1e9,
        hbm_peak_pct=100 * cost.hbm_bytes / cost.seconds / chip.hbm_bytes_per_second,
        hbm_path_busy_pct=_path_busy(kernels),
        waits=_waits(kernels, cost.cycles),
        hbm_bytes=cost.hbm_bytes,
        compulsory_bytes=figures.mbu_pct / 100 * figures.latency_ms / 1e3 * chip.hbm_bytes_per_second,
        vmem_bytes=cost.vmem_bytes,
        vmem=sorted((buffer for kernel in kernels for buffer in kernel.vmem), key=lambda buffer: -buffer.size_bytes),
        spills_executed=sum(kernel.cost.slot_uses.get("VSTORE:SPILL", 0) for kernel in kernels),
        fills_executed=sum(kernel.cost.slot_uses.get("VLOAD:FILL", 0) for kernel in kernels),
        hot_fill_pct=_hot_fills(kernels),
        xla_ops=_xla_ops(cost),
    )


def _kernel(folder: Path, op: OpCost, execution: Execution) -> _Kernel:
    path = next((p for p in folder.glob("*-final_bundles.txt") if op_of_dump(p) == op.op.name), None)
    if path is None:
        raise ParseError(f"{op.op.name}: its dump is gone")
    stem = glob.escape(re.sub(r"-\d+-final_bundles\.txt$", "", path.name))
    (table,) = folder.glob(f"{stem}-[0-9][0-9]-*per-bundle-utilization.txt")
    (registers,) = folder.glob(f"{stem}-[0-9][0-9]-*registers-and-allocations.txt")
    allocations = parse_allocations(registers).values()
    return _Kernel(
        cost=op,
        execution=execution,
        dump=parse_dump(path),
        capacity=parse_utilization(table)[0],
        vmem=[
            Buffer(name=a.name, tag=a.tag, shape=a.shape, size_bytes=a.size_bytes)
            for a in allocations
            if a.space == "vmem" and not a.fixed
        ],
    )


def _cycles_by_cause(cost: ModuleCost, kernels: Iterable[_Kernel]) -> dict[str, float]:
    """Cycles of the kernels by cause, and those of all other ops as one: they sum to the module's."""
    causes: dict[str, float] = dict.fromkeys(("issue", *CAUSES, XLA_OPS), 0.0)
    for kernel in kernels:
        execution = kernel.execution
        for (_, cause), cycles in execution.stalls.items():
            causes[cause] += cycles
        causes["DMA wait"] += execution.dma_wait_cycles
        # An empty bundle in a branch's delay is a stall, no issue.
        causes["issue"] += kernel.cost.cycles - sum(execution.stalls.values()) - execution.dma_wait_cycles
    causes[XLA_OPS] = cost.cycles - sum(causes.values())
    return causes


def _bound(causes: Mapping[str, float]) -> str:
    """By the largest of waits for copies, issue, and all other stalls: `stall-bound` names the worst of these."""
    stalls = {cause: causes[cause] for cause in CAUSES if cause != "DMA wait"}
    worst = max(stalls, key=stalls.__getitem__)
    totals = {
        "DMA-bound": causes["DMA wait"],
        "issue-bound": causes["issue"],
        f"stall-bound ({worst})": sum(stalls.values()),
        "bound by XLA ops": causes[XLA_OPS],
    }
    return max(totals, key=totals.__getitem__)


def bundle_cycles(dump: Dump, execution: Execution) -> dict[int, tuple[float, float]]:
    """Bundle → (cycles issued, cycles lost before or behind it), over the whole run; together, the run's cycles."""
    runs: Counter[int] = Counter()
    for block, count in execution.bundle_runs.items():
        for address in execution.block_bundles[block]:
            runs[address] += count
    lost: Counter[int] = Counter()
    for (address, cause), cycles in execution.stalls.items():
        lost[address] += cycles
        if cause == "branch" and not dump.bundles[address].slots:
            runs[address] -= cycles  # an empty bundle in a branch's delay
    for address, wait in execution.waits.items():
        lost[address] += wait.cycles
    return {address: (count, lost[address]) for address, count in runs.items()}


def _lines(kernels: Iterable[_Kernel], total: float, text: list[str]) -> list[LineCost]:
    """Every line that costs anything, the dearest first."""
    issued: defaultdict[tuple[str, int] | None, float] = defaultdict(float)
    stalled: defaultdict[tuple[str, int] | None, float] = defaultdict(float)
    for kernel in kernels:
        for address, (issue, stall) in bundle_cycles(kernel.dump, kernel.execution).items():
            slots = kernel.dump.bundles[address].slots
            sources: list[tuple[str, int] | None] = [_place(slot.source) for slot in slots if slot.source]
            sources = sources or [None]
            for source in sources:
                issued[source] += issue / len(sources)
                stalled[source] += stall / len(sources)
    costs = [
        LineCost(
            line=source[1] if source and source[0] == KERNEL_FILE else None,
            text=_text(source, text),
            issue_cycles=cycles,
            stall_cycles=stalled[source],
            share_pct=100 * (cycles + stalled[source]) / total,
        )
        for source, cycles in issued.items()
    ]
    return sorted((cost for cost in costs if cost.share_pct > 0), key=lambda cost: -cost.share_pct)


def _place(source: tuple[str, int]) -> tuple[str, int]:
    """A line of the kernel file; any other file as a whole."""
    return source if source[0] == KERNEL_FILE else (source[0], 0)


def _text(source: tuple[str, int] | None, text: list[str]) -> str:
    if source is None:
        return NO_SOURCE
    file, line = source
    if file != KERNEL_FILE:
        return f"in {file}"
    return text[line - 1].strip() if line <= len(text) else ""


def _occupancy(kernels: list[_Kernel]) -> dict[str, float]:
    used: Counter[str] = Counter()
    available: Counter[str] = Counter()
    for kernel in kernels:
        for unit, slots in kernel.capacity.items():
            used[unit] += kernel.cost.slot_uses[unit]
            available[unit] += round(slots * kernel.cost.cycles)
    return {unit: 100 * used[unit] / available[unit] for unit in available if available[unit]}


def _waits(kernels: Iterable[_Kernel], total: float) -> list[WaitCost]:
    """Every wait that ran, the longest first."""
    found = []
    for kernel in kernels:
        for address, wait in kernel.execution.waits.items():
            copies = [dma for dma in kernel.execution.dmas if dma.flag in wait.flags]
            sources = [slot.source for slot in kernel.dump.bundles[address].slots if "wait" in slot.opcode]
            line = next((s[1] for s in sources if s and s[0] == KERNEL_FILE), None)
            found.append(
                WaitCost(
                    line=line,
                    flags=tuple(sorted(wait.flags)),
                    count=wait.count,
                    cycles=wait.cycles,
                    share_pct=100 * wait.cycles / total,
                    copies=len(copies),
                    copy_kinds=tuple(sorted({dma.kind for dma in copies})),
                    mean_copy_bytes=sum(dma.size_bytes for dma in copies) / len(copies) if copies else 0.0,
                    buffers=_buffers_of(kernel, copies),
                )
            )
    return sorted(found, key=lambda wait: -wait.cycles)


def _buffers_of(kernel: _Kernel, copies: Iterable[DmaRecord]) -> tuple[str, ...]:
    """What the copies fill or empty: `bf16[2,128] scratch operand`, or `operand 3` where XLA put it into VMEM."""
    labels = {buffer.name: f"{buffer.shape} {buffer.tag.split('.')[0]}" for buffer in kernel.vmem}
    placed = kernel.execution.vmem_rows.items()
    starts = Counter(dma.vmem_row for dma in copies if dma.vmem_row is not None)
    found: Counter[str] = Counter()
    for row, count in starts.items():
        found.update({labels.get(name, name): count for name, rows in placed if row in rows})
    return tuple(name for name, _ in found.most_common())


def _path_busy(kernels: list[_Kernel]) -> float | None:
    """How much of the kernels' time the path to HBM moves data; None where copies went unrecorded."""
    cycles = sum(kernel.cost.cycles for kernel in kernels)
    if not cycles or any(len(k.execution.dmas) < k.execution.dma_count for k in kernels):
        return None
    busy = sum(dma.transferred_cycle - dma.transfer_cycle for k in kernels for dma in k.execution.dmas)
    return 100 * busy / cycles


def _hot_fills(kernels: Iterable[_Kernel]) -> float:
    """Refills ÷ vector loads, executed, in the blocks that make up most of the bundles issued."""
    loads = fills = 0
    for kernel in kernels:
        execution = kernel.execution
        issued = {block: count * len(execution.block_bundles[block]) for block, count in execution.bundle_runs.items()}
        left = _HOT * sum(issued.values())
        for block in sorted(issued, key=lambda block: -issued[block]):
            slots, runs = kernel.cost.block_slots[block], execution.bundle_runs[block]
            loads += runs * slots.get("VLOAD", 0)  # refills included
            fills += runs * slots.get("VLOAD:FILL", 0)
            left -= issued[block]
            if left <= 0:
                break
    return 100 * fills / loads if loads else 0.0


def _xla_ops(cost: ModuleCost) -> list[OpShare]:
    ops = [
        OpShare(
            name=op.op.name,
            opcode=op.op.opcode,
            cycles=op.cycles,
            share_pct=100 * op.cycles / cost.cycles,
            hbm_bytes=op.hbm_read_bytes + op.hbm_written_bytes,
            is_copy=op.op.opcode.startswith("copy") and op.op.opcode != "copy-done",
        )
        for op in cost.ops
        if not op.is_kernel
    ]
    return sorted(ops, key=lambda op: -op.cycles)


def changes(now: Explanation, before: Explanation) -> dict[str, tuple[float, float]]:
    """Figure → (before, now), for those that differ."""
    pairs = {
        f"{cause} cycles": (before.cycles_by_cause[cause], cycles) for cause, cycles in now.cycles_by_cause.items()
    }
    for name in ("cycles", "hbm_bytes", "dma_count", "hbm_gb_per_s", "vmem_bytes", "spills_executed", "fills_executed"):
        pairs[name] = getattr(before, name), getattr(now, name)
    for unit, percent in now.occupancy_pct.items():
        pairs[f"{unit} occupancy_pct"] = before.occupancy_pct.get(unit, 0.0), percent
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
