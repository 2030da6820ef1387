"""Why a kernel costs what it costs: where its cycles go, by cause, source line, unit, copy and buffer.

Covers what the executor counts: bundles issued, stalls, waits for copies, the XLA ops beside the kernel. A bundle's
cycles are shared evenly among its slots that come from a source line; a stall is charged to the bundle that waited.
"""

import glob
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from judge import contract, decide, ledger, pipeline
from judge.archive import unpack
from judge.chips import Chip
from judge.compile import op_of_dump
from judge.llo.execute import Execution
from judge.llo.issue import CAUSES
from judge.llo.module import ModuleCost, OpCost
from judge.llo.parse import Dump, ParseError, parse_allocations, parse_dump, parse_utilization
from judge.lock import Refused
from judge.repository import KERNEL, LEDGER, Repository
from judge.roofline import Figures
from judge.transaction import Transaction

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
    """One wait of the schedule: who waits, on which flags, for which copies."""

    line: int | None
    flags: tuple[int, ...]
    count: int
    cycles: int
    share_pct: float
    copies: int  # recorded, on these flags
    copy_kinds: tuple[str, ...]
    mean_copy_bytes: float


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One buffer in VMEM."""

    name: str
    tag: str
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
            Buffer(name=a.name, tag=a.tag, size_bytes=a.size_bytes)
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
                )
            )
    return sorted(found, key=lambda wait: -wait.cycles)


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


# --- as text ---

_LINES_SHOWN = 5
_WAITS_SHOWN = 2
_WIDTH = 120


def render(name: str, one: Explanation, before: Explanation | None) -> list[str]:
    """One workload's lines for a screen of 120 columns."""
    text = [f"workload {name}: {one.cycles:,.0f} cycles, {one.seconds * 1e3:.4g} ms, {one.bound}"]
    spent = {cause: cycles for cause, cycles in one.cycles_by_cause.items() if cycles >= one.cycles / 1000}
    text += _row("cycles", ", ".join(f"{cause} {_percent(c, one.cycles)}" for cause, c in _largest(spent)))
    for cost in one.lines[:_LINES_SHOWN]:
        place = f"{KERNEL_FILE}:{cost.line}" if cost.line else "elsewhere"
        split = f"{cost.share_pct:5.1f} % (issue {cost.issue_cycles:,.0f}, stalls {cost.stall_cycles:,.0f})"
        text += _row("line", f"{place:<14} {split:<46} {cost.text}")
    text += _row("units", ", ".join(f"{unit} {p:.0f} %" for unit, p in _largest(one.occupancy_pct) if p >= 0.5))
    text += _dma_rows(one)
    ratio = f", {one.hbm_bytes / one.compulsory_bytes:.2f}x" if one.compulsory_bytes else ""
    text += _row("HBM", f"{_size(one.hbm_bytes)} moved, {_size(one.compulsory_bytes)} compulsory{ratio}")
    text += _row("VMEM", f"{_size(one.vmem_bytes)}: {', '.join(_buffers(one.vmem))}")
    text += _row(
        "spills",
        f"executed: {one.spills_executed:,} stores, {one.fills_executed:,} refills; "
        f"{one.hot_fill_pct:.1f} % of the vector loads in the hot blocks are refills",
    )
    copies = sum(op.cycles for op in one.xla_ops if op.is_copy)
    share = f"{_percent(one.cycles_by_cause[XLA_OPS], one.cycles)} (copies {_percent(copies, one.cycles)})"
    text += _row("XLA ops", f"{share}: {', '.join(f'{op.name} {op.share_pct:.1f} %' for op in one.xla_ops[:4])}")
    return text + (_change_rows(one, before) if before else [])


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
        flags = ", ".join(map(str, wait.flags[:4])) + (", …" if len(wait.flags) > 4 else "")
        what = (
            f"{' and '.join(wait.copy_kinds)} of {_size(wait.mean_copy_bytes)}" if wait.copies else "no copy recorded"
        )
        mean = f"{wait.cycles / wait.count:,.0f} cycles each"
        text += _row("wait", f"{place} {wait.count:,} times, {mean}, {wait.share_pct:.1f} %, flag {flags} ({what})")
    return text


def _change_rows(one: Explanation, before: Explanation) -> list[str]:
    """Figures that changed: the cycles, then by how large the change is against the larger of the two."""
    changed = changes(one, before)
    if not changed:
        return _row("changed", "nothing: the same figures as the champion's")
    order = sorted(changed, key=lambda name: (name != "cycles", -_relative(changed[name])))
    parts = [f"{name} {changed[name][0]:,.4g} → {changed[name][1]:,.4g}" for name in order[:9]]
    return [line for i in range(0, len(parts), 3) for line in _row("" if i else "changed", ", ".join(parts[i : i + 3]))]


def _relative(pair: tuple[float, float]) -> float:
    return abs(pair[1] - pair[0]) / max(map(abs, pair))


def _row(label: str, text: str) -> list[str]:
    line = f"  {label:<8} {text}"
    return [line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"]


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


# --- what to explain ---


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What to explain, held to the problem `sealed`, and what to compare it with."""

    name: str
    source: contract.Source
    sealed: contract.Source
    champion_name: str = ""
    champion: contract.Source | None = None
    note: str = ""  # why nothing is compared


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is printed: `workloads` is empty where the candidate did not get as far as cycles."""

    subject: Subject
    chip: str
    status: str
    reason: str = ""
    note: str = ""
    workloads: dict[str, Explanation] = field(default_factory=dict)
    champion: dict[str, Explanation] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report on a screen."""
        title = f"{self.subject.name} on {self.chip} (predicted)"
        if self.champion:
            title += f", against {self.subject.champion_name}"
        text = [ledger.escape(title)]
        text += [f"note: {ledger.escape(self.note)}"] if self.note else []
        if not self.workloads:
            return [*text, f"status: {self.status}", f"reason: {ledger.escape(self.reason)}"]
        for name, one in self.workloads.items():
            shown = map(ledger.escape, render(name, one, self.champion.get(name)))
            text += [line.replace('\\"', '"') for line in shown]  # quotes of source lines harm no screen
        return text

    def as_json(self) -> str:
        """One object on one line."""
        compared = {
            name: {figure: {"champion": pair[0], "candidate": pair[1]} for figure, pair in changes(one, before).items()}
            for name, one in self.workloads.items()
            if (before := self.champion.get(name)) is not None
        }
        found: dict[str, Any] = {
            "status": self.status,
            "mode": "model",
            "chip": self.chip,
            "subject": self.subject.name,
        }
        found |= {"reason": self.reason} if self.reason else {}
        found |= {"note": self.note} if self.note else {}
        found["champion"] = self.subject.champion_name if self.champion else None
        found["workloads"] = {name: asdict(one) for name, one in self.workloads.items()}
        return json.dumps(found | {"changes": compared})


def last_experiment(folder: Path, chip: str) -> Subject:
    """The newest row on this chip in model mode, against the champion that it met. Raises Refused or LedgerError."""
    repository = Repository(folder)
    rows = ledger.read(folder / LEDGER)
    row = next((row for row in reversed(rows) if (row.chip, row.mode) == (chip, "model")), None)
    if row is None:
        raise Refused(f"{LEDGER} has no experiment in model mode on {chip}: run ./ratchet.sh first, or name a --kernel")
    if not repository.has_commit(row.commit):
        with repository.exclusive("explain"):
            unpack(Transaction(repository))
    before = [other for other in ledger.kept(rows, row.lineage) if other.number < row.number]
    champion = next((other for other in reversed(before) if other.commit != row.commit), None)
    data = repository.file_at(row.commit, KERNEL)
    if data is None:
        raise Refused(f"the commit of row {row.number}, {row.commit}, is not here: name a --kernel")
    source = contract.check_source(data, f"{KERNEL} of {row.commit[:12]}")
    return Subject(
        name=f"experiment {row.number} ({row.commit[:12]}, {row.status}): {row.note}"[:_WIDTH],
        source=source,
        sealed=repository.source_at(before[0].commit) if before else source,
        champion_name=f"row {champion.number} ({champion.commit[:12]})" if champion else "",
        champion=repository.source_at(champion.commit) if champion else None,
        note="" if champion else "no other champion before it: nothing to compare with",
    )


def _newest_lineage(rows: list[ledger.Row], chip: str) -> int | None:
    """The newest on this chip in model mode that has a baseline."""
    mine = [row.lineage for row in rows if (row.chip, row.mode, row.status) == (chip, "model", "PASS")]
    return max(mine, default=None)


def kernel_file(folder: Path, path: Path, chip: str) -> Subject:
    """The file at `path`, against the newest champion of the same problem on this chip. Raises ContractError."""
    source = contract.read_source(path)
    alone = Subject(name=str(path), source=source, sealed=source)
    try:
        repository, rows = Repository(folder), ledger.read(folder / LEDGER)
        newest = max((row.lineage for row in rows if (row.chip, row.mode) == (chip, "model")), default=None)
        row = next(reversed(ledger.kept(rows, newest)), None)
        champion = repository.source_at(row.commit) if row else None
    except (Refused, ledger.LedgerError) as error:
        return replace(alone, note=f"not compared: {error}")
    if row is None or champion is None:
        return alone
    if champion.text == source.text:
        return replace(alone, note=f"it is the champion of row {row.number} itself: nothing to compare with")
    if any(champion.definitions.get(name) != source.definitions.get(name) for name in ("KERNEL_NAME", "WORKLOADS")):
        return replace(alone, note=f"not compared: row {row.number}'s champion solves another problem")
    name = f"row {row.number} ({row.commit[:12]})"
    return replace(alone, champion_name=name, champion=champion)


def run(subject: Subject, chip: Chip, workloads: tuple[str, ...], limits: pipeline.Limits) -> Report:
    """Executes the subject's schedule, and its champion's. Raises CannotJudge where the fault is nobody's."""
    pipeline.print_progress(f"explaining {ledger.escape(subject.name)}")
    verdict, found = _executed(subject.source, subject.sealed, chip, workloads, limits)
    if not found:
        return Report(subject=subject, chip=chip.name, status=verdict.status, reason=verdict.reason)
    before: dict[str, Explanation] = {}
    note = subject.note
    if subject.champion is not None:
        pipeline.print_progress(f"the champion to compare with: {subject.champion_name}")
        other, before = _executed(subject.champion, subject.champion, chip, workloads, limits)
        note = note if before else f"not compared: the champion is {other.status} now: {other.reason}"
    return Report(subject=subject, chip=chip.name, status=verdict.status, note=note, workloads=found, champion=before)


def _executed(
    source: contract.Source, sealed: contract.Source, chip: Chip, workloads: tuple[str, ...], limits: pipeline.Limits
) -> tuple[pipeline.Verdict, dict[str, Explanation]]:
    task = pipeline.Task(candidate=source, sealed=sealed, chip=chip, mode="model", workloads=workloads, limits=limits)
    with pipeline.private_folder() as folder:
        judging = pipeline.Judging(task, folder, pipeline.print_progress)
        verdict = judging.run_to_cycles()
        if verdict.status != decide.PASS:
            return verdict, {}
        return verdict, {
            name: explain(folder / "compile" / name, cost, verdict.workloads[name], chip, source.text)
            for name, cost in judging.costs.items()
        }
