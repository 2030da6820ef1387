"""Executes a compiled schedule on a machine described as data and counts its cycles.

Covered: scalars, predicates, SMEM with the real prefetched arrays, branches with their delay slots, sync flags,
asynchronous DMAs (dma.py), and in-order issue held back by results and units (issue.py).
Not covered: VMEM port conflicts, a second core, copies between chips.
A value that comes from vector registers is UNKNOWN: it may be computed with, but not steer a branch, an address or a
size. Anything unknown raises; there is never a silent guess.
"""

import math
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from judge.llo.dma import CopyError, DmaEngine, DmaRecord
from judge.llo.issue import Issue
from judge.llo.machine import Machine
from judge.llo.parse import Allocation, Dump
from judge.llo.translate import Block, Translator


class ExecutionError(Exception):
    """The program cannot be timed: the message says where and why."""


class _Unknown:
    """A scalar whose value the executor cannot know; contagious, and an error where it would steer."""

    def _same(self, *_: Any) -> "_Unknown":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _same
    __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __mod__ = __rmod__ = _same
    __floordiv__ = __rfloordiv__ = __lt__ = __le__ = __gt__ = __ge__ = _same
    __eq__ = __ne__ = _same  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise ExecutionError("a branch, predicate or address depends on a value that no scalar input gives")

    def __index__(self) -> int:
        raise ExecutionError("an address or size depends on a value that no scalar input gives")


UNKNOWN = _Unknown()


@dataclass(kw_only=True, slots=True)
class Wait:
    """One wait of the schedule, over all times that it ran."""

    count: int = 0
    cycles: int = 0  # beyond the bundle's own
    flags: set[int] = field(default_factory=set)


@dataclass(kw_only=True)
class Execution:
    """What one run of a program did."""

    cycles: float = 0.0
    hbm_read_bytes: int = 0
    hbm_written_bytes: int = 0
    dma_count: int = 0
    dma_wait_cycles: float = 0.0
    waits: dict[int, Wait] = field(default_factory=dict)  # bundle of a dma.done.wait → what became of it
    stalls: Counter[tuple[int, str]] = field(default_factory=Counter)  # (bundle, cause) → cycles lost before it
    bundle_runs: Counter[int] = field(default_factory=Counter)  # block address → runs
    block_bundles: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of the blocks that ran
    dmas: list[DmaRecord] = field(default_factory=list)  # the first `_RECORDED`
    blocks: list[tuple[int, float, float]] = field(default_factory=list)  # (address, start, end), long ones
    vmem_rows: dict[str, range] = field(default_factory=dict)  # buffer or operand in VMEM → its rows

    def slot_uses(self, rows: np.ndarray) -> np.ndarray:
        """Slots of each unit executed: Σ over bundles of runs × slots used. `rows`: (bundles, units), slots used."""
        runs = np.zeros(len(rows), np.int64)
        for address, count in self.bundle_runs.items():
            runs[list(self.block_bundles[address])] += count
        return runs @ rows


_SMEM_WORDS = 1 << 18
_SMEM_SCOPED = 1 << 12  # first word of the program's own buffers
_VMEM_ROW_BYTES = 512
_STEP_BYTES = 512  # unit of a strided copy's runs
_RECORDED = 50_000
_BLOCK_BUNDLES_SHOWN = 64  # shorter blocks would drown the timeline
_MAX_BLOCK_RUNS = 300_000_000


class _Core:
    """Memory, flags and the DMA engine: what the translated blocks call as `M`."""

    def __init__(self, machine: Machine, dump: Dump, result: Execution) -> None:
        self.machine = machine
        self.dump = dump
        self.result = result
        self.smem: list[Any] = [UNKNOWN] * _SMEM_WORDS
        self.smem[0] = 0  # chip id
        self.smem[1] = 0  # core index
        self.engine = DmaEngine(machine)
        self.operands: dict[int, Any] = {}  # index → register value
        self.contents: list[tuple[int, int, np.ndarray]] = []  # (first granule, granules, words)

    # --- SMEM ---

    def load(self, address: int) -> Any:
        if not 0 <= address < _SMEM_WORDS:
            raise ExecutionError(f"SMEM index {address} is out of range")
        return self.smem[address]

    def store(self, address: int, value: Any) -> None:
        if not 0 <= address < _SMEM_WORDS:
            raise ExecutionError(f"SMEM index {address} is out of range")
        self.smem[address] = value

    def operand(self, index: int) -> Any:
        if index not in self.operands:
            raise ExecutionError(f"the program reads operand {index}, which the module does not pass")
        return self.operands[index]

    # --- sync flags ---

    def read_flag(self, flag: int, now: float) -> int:
        return self.engine.read(flag.__index__(), now) & 0xFFFFFFFF

    def set_flag(self, flag: int) -> None:
        self.engine.flags[flag.__index__()] = 0

    def add_flag(self, flag: int, count: int) -> None:
        self.engine.flags[flag.__index__()] += _signed(count.__index__())

    def wait(self, flag: int, count: int, issued: int, address: int) -> int:
        """The first cycle after a wait that issues at `issued`: the next, or wait_cycles after the flag was raised."""
        flag, count = flag.__index__(), _signed(count.__index__())
        seen = self.machine.wait_cycles
        try:
            end = math.ceil(self.engine.wait(flag, count, issued + 1 - seen)) + seen
        except CopyError as error:
            raise ExecutionError(str(error)) from None
        waited = end - issued - 1  # the bundle itself is the other cycle
        self.result.dma_wait_cycles += waited
        wait = self.result.waits.get(address)
        if wait is None:
            wait = self.result.waits[address] = Wait()
        wait.count += 1
        wait.cycles += waited
        wait.flags.add(flag)
        return end

    # --- DMA ---

    def copy(
        self, kind: str, source: int, target: int, granules: int, flag: int, strided: tuple[int, ...], now: int
    ) -> None:
        """Starts a copy; `strided`: (steps of 512 bytes that a run has, stride in HBM in granules, …), or empty."""
        granules, flag = granules.__index__(), flag.__index__()
        size_bytes, runs = granules * self.machine.granule_bytes, 1
        if strided:
            steps, *strides = (number.__index__() for number in strided)
            run_bytes = max(1, steps * _STEP_BYTES)
            if not strides or any(stride * self.machine.granule_bytes != run_bytes for stride in strides):
                runs = max(1, -(-size_bytes // run_bytes))
        begin, end, done = self.engine.start(kind, granules, runs, flag, now)
        result = self.result
        result.dma_count += 1
        if kind.startswith("hbm"):
            result.hbm_read_bytes += size_bytes
        if kind.endswith("hbm"):
            result.hbm_written_bytes += size_bytes
        if kind.endswith("smem"):
            self._fill_smem(source, target.__index__(), granules)
        if len(result.dmas) < _RECORDED:
            result.dmas.append(
                DmaRecord(
                    kind=kind,
                    issue_cycle=now,
                    transfer_cycle=begin,
                    transferred_cycle=end,
                    done_cycle=done,
                    size_bytes=size_bytes,
                    flag=flag,
                    vmem_row=self._vmem_row(kind, source, target),
                )
            )

    def _vmem_row(self, kind: str, source: Any, target: Any) -> int | None:
        address = target if kind.endswith("vmem") else source if kind.startswith("vmem") else None
        return address * self.machine.granule_bytes // _VMEM_ROW_BYTES if isinstance(address, int) else None

    def _fill_smem(self, source: int, target: int, granules: int) -> None:
        words = granules * self.machine.granule_bytes // 4
        if not 0 <= target <= _SMEM_WORDS - words:
            raise ExecutionError(f"a copy writes SMEM words {target} to {target + words}, out of range")
        self.smem[target : target + words] = [UNKNOWN] * words
        for first, count, values in self.contents:
            if first <= source < first + count:
                offset = (source - first) * self.machine.granule_bytes // 4
                known = values[offset : offset + words].view(np.uint32).tolist()
                self.smem[target : target + len(known)] = known

    def halt(self, address: int, line: int) -> None:
        raise ExecutionError(
            f"the program halts itself at bundle {address:#x} (shalt.err, line {line}): usually a copy that is never "
            "waited for, or a wait or signal without its pair, which leaves a semaphore above zero at the end"
        )

    def check_exit(self) -> None:
        """Every copy that was started and moves anything must have been waited for: its time would be free."""
        for flag, waiting in self.engine.pending.items():
            owed = sum(granules > 0 for _, granules in waiting)
            if owed:
                raise ExecutionError(f"{owed} copies on sync flag {flag} are never waited for")


def execute(
    dump: Dump,
    allocations: dict[str, Allocation],
    words: dict[int, np.ndarray],
    machine: Machine,
    *,
    limit_seconds: float = 120.0,
) -> Execution:
    """Runs one program from its first bundle to its exit.

    `words`: operand index → its 32-bit words as they lie in memory, for operands whose values are known; the program
    may copy them to SMEM and steer by them. Raises ExecutionError, or Untranslatable from the translation, where no
    total can be given; also when it runs longer than `limit_seconds`.
    """
    result = Execution()
    core = _Core(machine, dump, result)
    symbols = _place_allocations(dump, allocations)
    _place_operands(core, words)
    result.vmem_rows = _vmem_rows(core, allocations, symbols)
    issue = Issue(dump, machine)
    translator = Translator(dump, machine, symbols, issue)
    scope = _scope(issue)
    functions: dict[int, Any] = {}  # a block is translated when control first reaches it
    long_blocks: set[int] = set()
    scalars: list[Any] = [UNKNOWN] * 32
    predicates: list[Any] = [UNKNOWN] * 32
    results: dict[str, Any] = {}
    runs = result.bundle_runs
    deadline = time.monotonic() + limit_seconds
    now = 0
    address, count, state = 0, 0, issue.start
    while address >= 0:
        function = functions.get(address)
        if function is None:
            if address == len(dump.bundles):
                break
            if address not in translator.entries:
                raise ExecutionError(f"{dump.path.name}: control reaches bundle {address:#x}, where no block begins")
            block = translator.block(address)
            function = functions[address] = _compiled(block, scope)
            result.block_bundles[address] = block.bundle_indices
            if len(block.bundle_indices) >= _BLOCK_BUNDLES_SHOWN:
                long_blocks.add(address)
        runs[address] += 1
        start, here = now, address
        try:
            address, now, state = function(core, scalars, predicates, results, now, state)
        except ExecutionError as error:
            raise ExecutionError(f"{dump.path.name}: in the block at bundle {here:#x}: {error}") from None
        if here in long_blocks and len(result.blocks) < _RECORDED:
            result.blocks.append((here, start, now))
        count += 1
        if count % 65536 == 0 and (time.monotonic() > deadline or count > _MAX_BLOCK_RUNS):
            raise ExecutionError(f"{dump.path.name}: still running after {now:.3g} cycles; the loop may never end")
    scope.clear()  # it holds the blocks, and they hold it
    core.check_exit()
    result.cycles = float(now)
    result.stalls = issue.stalls()
    return result


def _signed(word: Any) -> Any:
    return word if word is UNKNOWN else word - ((word & 0x80000000) << 1)


def _divided(dividend: Any, divisor: Any, kind: str) -> list[Any]:
    """Results of a division in the order in which they are popped; what the chip gives for ÷ 0 is not known."""
    if dividend is UNKNOWN or divisor is UNKNOWN or divisor == 0:
        return [UNKNOWN, UNKNOWN]
    quotient, remainder = divmod(dividend, divisor)
    return {"kind=kDiv": [quotient], "kind=kRem": [remainder], "kind=kDivAndRem": [quotient, remainder]}[kind]


def _popped(results: Any) -> Any:
    if results is UNKNOWN:
        return UNKNOWN
    if not results:
        raise ExecutionError("a division's result is popped twice")
    return results.pop(0)


def _scope(issue: Issue) -> dict[str, Any]:
    """What a block's source refers to beside its arguments."""
    return {
        "I": issue,
        "UNKNOWN": UNKNOWN,
        "signed": _signed,
        "divided": _divided,
        "popped": _popped,
        "distance": lambda x: x if x is UNKNOWN or x < 32 else UNKNOWN,
        "least": lambda a, b: a if a is UNKNOWN else b if b is UNKNOWN else min(a, b),
        "greatest": lambda a, b: a if a is UNKNOWN else b if b is UNKNOWN else max(a, b),
    }


def _compiled(block: Block, scope: dict[str, Any]) -> Any:
    exec(compile(block.source, "<schedule>", "exec"), scope)
    return scope[f"block_{block.address}"]


_SPILL = re.compile(r"#(allocation\w*_spill)\b")


def _place_allocations(dump: Dump, allocations: dict[str, Allocation]) -> dict[str, int]:
    """Addresses of the program's buffers, in their space's units, laid one after the other; spill slots at the end."""
    symbols: dict[str, int] = {}
    free = {"smem": _SMEM_SCOPED, "sflag": 64, "vmem": 0}
    unit_bytes = {"smem": 4, "sflag": 4, "vmem": _VMEM_ROW_BYTES}
    for name, allocation in allocations.items():
        space = allocation.space
        if allocation.fixed:
            symbols[name] = allocation.offset_bytes // 4
        elif space in free:
            symbols[name] = free[space]
            free[space] += -(-allocation.size_bytes // unit_bytes[space])
    spilled = {
        name
        for bundle in dump.bundles
        for slot in bundle.slots
        if "_spill" in slot.rest
        for name in _SPILL.findall(slot.rest)
    }
    for name in sorted(spilled - symbols.keys()):
        symbols[name] = free["smem"]
        free["smem"] += 1
    return symbols


def _vmem_rows(core: _Core, allocations: dict[str, Allocation], symbols: dict[str, int]) -> dict[str, range]:
    """Name of a buffer, or `operand 3` → the rows of VMEM that it was given."""
    rows = {
        name: range(symbols[name], symbols[name] + -(-allocation.size_bytes // _VMEM_ROW_BYTES))
        for name, allocation in allocations.items()
        if allocation.space == "vmem" and not allocation.fixed
    }
    for index in core.operands:
        first = _operand_granule(index) * core.machine.granule_bytes // _VMEM_ROW_BYTES
        rows[f"operand {index}"] = range(
            first, _operand_granule(index + 1) * core.machine.granule_bytes // _VMEM_ROW_BYTES
        )
    return rows


def _operand_granule(index: int) -> int:
    return (index + 1) << 23  # 256 MiB apart, shared by no two operands


_OPERAND = re.compile(r"index: (\d+)")


def _place_operands(core: _Core, words: dict[int, np.ndarray]) -> None:
    """Gives every operand an address of its own, in the unit that its register holds, far enough from the next."""
    granule = core.machine.granule_bytes
    for bundle in core.dump.bundles:
        for slot in bundle.slots:
            if not slot.opcode.startswith("inlined_call_operand."):
                continue
            match = _OPERAND.search(slot.rest)
            space = slot.opcode.partition(".")[2]
            if match is None or space not in ("hbm", "vmem", "smem", ""):
                raise ExecutionError(f"{core.dump.path.name}:{bundle.line}: unknown operand {slot.opcode} {slot.rest}")
            index = int(match[1])
            known = words.get(index)
            if space in ("", "smem"):
                core.operands[index] = int(known[0]) & 0xFFFFFFFF if known is not None and space == "" else UNKNOWN
                continue
            first = _operand_granule(index)
            unit = core.machine.hbm_pointer_bytes if space == "hbm" else _VMEM_ROW_BYTES
            core.operands[index] = first * granule // unit
            if known is not None:
                core.contents.append((first, 1 << 23, np.ascontiguousarray(known, np.int32)))
