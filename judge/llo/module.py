"""Cycles of a whole compiled module: the Mosaic kernel and every XLA op beside it, each from its own bundles.

Ops run one after the other, in the order of the scheduled HLO. An asynchronous copy is charged in full where it
starts, so that moving work beside the kernel is never free.
"""

import gc
import glob
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from judge.compile import op_of_dump
from judge.llo.execute import Execution, ExecutionError, execute
from judge.llo.ici import COLLECTIVES, collective_seconds, group_size
from judge.llo.machine import Machine
from judge.llo.parse import ParseError, parse_allocations, parse_dump, parse_utilization


@dataclass(frozen=True, kw_only=True)
class Op:
    """One instruction of the scheduled entry computation."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class OpCost:
    """One op's share of the module's time."""

    op: Op
    cycles: float
    hbm_read_bytes: int
    hbm_written_bytes: int
    execution: Execution | None  # None for a copy that has no bundles
    slot_uses: dict[str, int]  # unit → slots executed
    block_slots: dict[int, dict[str, int]]  # block address → unit → slots in one run
    spill_slots: int  # in the schedule
    vmem_bytes: int

    @property
    def is_kernel(self) -> bool:
        return "tpu_custom_call" in self.op.text


@dataclass(frozen=True, kw_only=True)
class ModuleCost:
    """A module's predicted run."""

    ops: tuple[OpCost, ...]
    machine: Machine

    @property
    def cycles(self) -> float:
        return math.fsum(op.cycles for op in self.ops)

    @property
    def seconds(self) -> float:
        return self.cycles / self.machine.clock_hz

    @property
    def hbm_bytes(self) -> int:
        return sum(op.hbm_read_bytes + op.hbm_written_bytes for op in self.ops)

    @property
    def copy_count(self) -> int:
        """XLA ops beside the kernel that only move data: the copy trap."""
        return sum(op.op.opcode.startswith("copy") and op.op.opcode != "copy-done" for op in self.ops)

    @property
    def spill_slots(self) -> int:
        return sum(op.spill_slots for op in self.ops if op.is_kernel)

    @property
    def vmem_bytes(self) -> int:
        """Largest scoped VMEM of any op: scoped memory is given back between ops."""
        return max((op.vmem_bytes for op in self.ops), default=0)


_FREE = {f"{name}-done" for name in COLLECTIVES}
_FREE |= {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done", "slice-done", "opt-barrier"}
_FREE_CUSTOM_CALLS = ("ConcatBitcast", "AllocateBuffer")  # names for memory that is already in place
_OF_SCALARS = {"add", "subtract", "multiply", "minimum", "maximum", "negate", "compare", "select", "convert", "clamp"}
_OF_SCALARS |= {"and", "or", "not", "xor", "shift-left", "shift-right-logical", "shift-right-arithmetic"}
_ONE_VALUE = re.compile(r"\w+\[[1,]*\]")
_ONE_SCALAR = re.compile(r"\w+\[[1,]*\]\{[^}]*S\(6\)\}$")
_PASSES_VALUES = {"bitcast", "copy", "copy-done", "copy-start", "opt-barrier"}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\S.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}


def parse_entry(text: str) -> list[Op]:
    """Instructions of the entry computation, in scheduled order. Raises ExecutionError where there is none."""
    lines = text.splitlines()
    try:
        start = next(i for i, line in enumerate(lines) if line.startswith("ENTRY "))
    except StopIteration:
        raise ExecutionError("the compiled module has no entry computation") from None
    ops = []
    for line in lines[start + 1 :]:
        if line.startswith("}"):
            break
        match = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
        if match is None:
            raise ExecutionError(f"not an HLO instruction: {line.strip()[:120]}")
        name, type_text, opcode, rest = match.groups()
        inside = rest[: _closing(rest)]
        ops.append(
            Op(
                name=name,
                opcode=opcode,
                type=type_text,
                operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
                text=line.strip(),
            )
        )
    return ops


def _closing(text: str) -> int:
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(text)


def module_cost(folder: Path, machine: Machine, integers: dict[int, np.ndarray]) -> ModuleCost:
    """Executes the module whose HLO and dumps are in `folder`; `integers`: entry parameter → its values.

    Raises ExecutionError, ParseError or Untranslatable where any part of it cannot be costed.
    """
    hlo = (folder / "hlo.txt").read_text()
    by_name = {op.name: op for op in parse_entry(hlo)}  # in scheduled order
    dumps = _dumps_by_op(folder, hlo, by_name)
    with _no_collection():
        return ModuleCost(ops=tuple(_costs(by_name, dumps, machine, integers)), machine=machine)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A schedule is hundreds of thousands of records; looking through them for cycles takes a third of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _costs(
    by_name: dict[str, Op], dumps: dict[str, Path], machine: Machine, integers: dict[int, np.ndarray]
) -> Iterator[OpCost]:
    for op in by_name.values():
        if op.opcode.removesuffix("-start") in COLLECTIVES:
            yield _collective(op, machine)
        elif op.name in dumps:
            values = {
                i: words for i, name in enumerate(op.operands) if (words := _words(by_name, name, integers)) is not None
            }
            yield _executed(op, dumps[op.name], machine, values)
        elif op.opcode in ("copy-start", "slice-start"):
            yield _copied(op, machine)
        elif op.opcode == "copy" and ("S(6)" in op.type or _ONE_VALUE.match(op.type)):
            yield _scalar_copied(op, machine)
        elif op.opcode in _OF_SCALARS and _ONE_SCALAR.match(op.type):
            yield _scalar_computed(op, machine, [by_name[name] for name in op.operands if name in by_name])
        elif op.opcode not in _FREE and not any(f'"{target}"' in op.text for target in _FREE_CUSTOM_CALLS):
            raise ExecutionError(f"HLO op {op.name} ({op.opcode}) has no bundles and no known cost")


def _dumps_by_op(folder: Path, hlo: str, by_name: dict[str, Op]) -> dict[str, Path]:
    """Op → its final bundles. The compiler emits one program for ops that are the same but for their names."""
    dumps = {op_of_dump(path): path for path in sorted(folder.glob("*-final_bundles.txt"))}
    computations = dict(re.findall(r"^%([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.S | re.M))

    def signature(op: Op) -> tuple[object, ...]:
        bodies = [computations.get(name, name) for name in re.findall(r"calls=%([\w.\-]+)", op.text)]
        return (
            op.opcode,
            op.type,
            tuple(by_name[name].type for name in op.operands if name in by_name),
            tuple(re.sub(r"%[\w.\-]+|metadata=\{[^}]*\}|, backend_config=.*", "", body) for body in bodies),
        )

    # A Mosaic kernel is told apart by its name alone.
    twins = {
        signature(op): dumps[op.name] for op in by_name.values() if op.name in dumps and op.opcode != "custom-call"
    }
    for op in by_name.values():
        if op.name not in dumps and signature(op) in twins:
            dumps[op.name] = twins[signature(op)]
    return dumps


def _executed(op: Op, path: Path, machine: Machine, values: dict[int, np.ndarray]) -> OpCost:
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
    companions = {
        found.name.split(stem, 1)[1][4:]: found for found in path.parent.glob(f"{glob.escape(stem)}-[0-9][0-9]-*")
    }
    for name in ("pre-finalize-registers-and-allocations.txt", "final_hlo-static-per-bundle-utilization.txt"):
        if name not in companions:
            raise ParseError(f"{path.name}: the compiler left no {name} beside it")
    allocations = parse_allocations(companions["pre-finalize-registers-and-allocations.txt"])
    capacity, rows = parse_utilization(companions["final_hlo-static-per-bundle-utilization.txt"])
    dump = parse_dump(path)
    if len(rows) != len(dump.bundles):
        raise ExecutionError(f"{path.name}: {len(dump.bundles)} bundles, but {len(rows)} rows of utilisation")
    execution = execute(dump, allocations, values, machine)
    units, used = list(capacity), np.asarray(rows, np.int64)
    spills = int(used[:, [units.index(unit) for unit in ("VLOAD:FILL", "VSTORE:SPILL")]].sum())
    return OpCost(
        op=op,
        cycles=execution.cycles,
        hbm_read_bytes=execution.hbm_read_bytes,
        hbm_written_bytes=execution.hbm_written_bytes,
        execution=execution,
        slot_uses=dict(zip(units, map(int, execution.slot_uses(used)), strict=True)),
        block_slots={
            address: dict(zip(units, used[list(bundles)].sum(axis=0).tolist(), strict=True))
            for address, bundles in execution.block_bundles.items()
        },
        spill_slots=spills,
        vmem_bytes=sum(a.size_bytes for a in allocations.values() if a.space == "vmem" and not a.fixed),
    )


def _copied(op: Op, machine: Machine) -> OpCost:
    """An asynchronous copy or slice of the scheduled HLO, by the size of its result, charged where it starts."""
    shapes = _SHAPE.findall(op.type)
    if len(shapes) < 2:
        raise ExecutionError(f"HLO op {op.name}: cannot read the size of its result from {op.type}")
    source, target = (shapes[0], shapes[1]) if op.opcode == "slice-start" else (shapes[1], shapes[0])
    if "S(5)" in op.type:
        raise ExecutionError(f"HLO op {op.name} copies to or from host memory, which has no known cost")
    spaces = ["vmem" if "S(1)" in layout else "hbm" for _, _, layout in (source, target)]
    size_bytes = _size_bytes(op, target)
    if spaces == ["vmem", "vmem"]:
        raise ExecutionError(f"HLO op {op.name} copies within VMEM without bundles: no known cost")
    return _one_copy(op, machine, spaces[0], spaces[1], size_bytes)


def _scalar_copied(op: Op, machine: Machine) -> OpCost:
    """A kernel's operand in scalar memory, or one value: the top-level program fetches it by one copy through VMEM."""
    return _one_copy(op, machine, "hbm", "vmem", _size_bytes(op, _SHAPE.findall(op.type)[0]))


def _scalar_computed(op: Op, machine: Machine, operands: list[Op]) -> OpCost:
    """One scalar by the top-level program, in a bundle or two: its time is that of fetching what is not there yet,
    one operand after the other."""
    fetched = {o.name: o for o in operands if o.opcode != "constant" and "S(6)" not in o.type}
    sizes = [_size_bytes(o, _SHAPE.findall(o.type)[0]) for o in fetched.values()]
    cycles = math.fsum(_one_copy(op, machine, "hbm", "vmem", size).cycles for size in sizes)
    return replace(_one_copy(op, machine, "hbm", "vmem", sum(sizes)), cycles=cycles or 1.0)


def _collective(op: Op, machine: Machine) -> OpCost:
    """A collective, charged in full where it starts: by the larger of what goes in and what comes out."""
    kind = op.opcode.removesuffix("-start")
    size_bytes = max((_size_bytes(op, shape) for shape in _SHAPE.findall(op.type)), default=0)
    try:
        chips = group_size(op.text)
        if kind == "reduce-scatter":
            size_bytes *= chips
        seconds = collective_seconds(kind, size_bytes, chips, machine.ici)
    except ValueError as error:
        raise ExecutionError(f"HLO op {op.name}: {error}") from error
    return replace(_one_copy(op, machine, "hbm", "vmem", 0), cycles=seconds * machine.clock_hz)


def _one_copy(op: Op, machine: Machine, source: str, target: str, size_bytes: int) -> OpCost:
    cost = machine.dma[f"{source}_to_{target}"]
    return OpCost(
        op=op,
        cycles=cost.latency_cycles + size_bytes / cost.bytes_per_cycle,
        hbm_read_bytes=size_bytes * (source == "hbm"),
        hbm_written_bytes=size_bytes * (target == "hbm"),
        execution=None,
        slot_uses={},
        block_slots={},
        spill_slots=0,
        vmem_bytes=0,
    )


def _size_bytes(op: Op, shape: tuple[str, str, str]) -> int:
    dtype, dimensions, _ = shape
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype) or (int(digits[0]) if digits else None)
    if bits is None:
        raise ExecutionError(f"HLO op {op.name}: unknown element type {dtype}")
    return math.prod(int(d) for d in dimensions.split(",") if d) * max(bits, 8) // 8


def _words(by_name: dict[str, Op], name: str, integers: dict[int, np.ndarray]) -> np.ndarray | None:
    """The 32-bit words of an operand, as they lie in memory, where they follow from the module's integer inputs."""
    while True:
        op = by_name.get(name)
        if op is None:
            return None
        if op.opcode == "parameter":
            number = re.search(r"parameter\((\d+)\)", op.text)
            return _in_memory(integers.get(int(number[1])), op.type) if number else None
        if op.opcode == "constant":
            return _constant(op)
        if op.opcode in ("broadcast", "slice", "reshape"):
            return _rearranged(op, by_name.get(op.operands[0]), _words(by_name, op.operands[0], integers))
        if op.opcode not in _PASSES_VALUES or not op.operands or not _keeps_order(op, by_name.get(op.operands[0])):
            return None
        name = op.operands[0]


def _rearranged(op: Op, source: Op | None, words: np.ndarray | None) -> np.ndarray | None:
    """A scalar broadcast to one dimension, a contiguous slice of one dimension, or one dimension as rows of two."""
    shape = re.match(r"[su]32\[(\d+)(?:,(\d+))?\]", op.type)
    if words is None or source is None or shape is None:
        return None
    if op.opcode == "reshape":
        flat = re.match(r"[su]32\[\d+\]", source.type)
        return _in_memory(words.reshape(int(shape[1]), int(shape[2])), op.type) if flat and shape[2] else None
    if shape[2]:
        return None
    if op.opcode == "broadcast":
        return np.repeat(words, int(shape[1])) if words.size == 1 else None
    bounds = re.search(r"slice=\{\[(\d+):(\d+)\]\}", op.text)
    return words[int(bounds[1]) : int(bounds[2])] if bounds else None


def _keeps_order(op: Op, source: Op | None) -> bool:
    """Whether the words lie in memory as its operand's do: a copy into another layout transposes them."""
    if source is None or op.opcode not in ("copy", "copy-start"):
        return source is not None

    def order(text: str) -> tuple[str, ...] | None:
        shape = _SHAPE.search(text)
        return None if shape is None else (*shape.groups()[:2], (shape[3] or "").split(":", 1)[0])

    return order(op.type) == order(source.type)


def _constant(op: Op) -> np.ndarray | None:
    if not op.type.startswith(("s32", "u32")) or "..." in op.text:
        return None
    inside = op.text.split("constant(", 1)[1]
    numbers = [int(x) for x in re.findall(r"-?\d+", inside[: _closing(inside)])]
    return np.array(numbers, np.int64).astype(np.uint32).view(np.int32)


def _in_memory(values: Any, type_text: str) -> np.ndarray | None:
    """One dimension lies flat; two lie in tiles, of which the minor dimension, which may be the first, has 128 words.

    `type_text`: the type with its layout. Other layouts, more dimensions, none at all and other widths are not known.
    """
    shape = _SHAPE.match(type_text)
    if values is None or values.dtype not in (np.int32, np.uint32) or shape is None:
        return None
    if values.ndim <= 1:
        return np.atleast_1d(values).view(np.int32)
    layout = re.fullmatch(r"([01],[01])(?::(?:T\((\d+),128\))?(?:S\(\d\))?)?", shape[3] or "")
    rows = {"1,0": values, "0,1": values.T}.get(layout[1]) if layout and values.ndim == 2 else None
    if layout is None or rows is None or (layout[2] is None and rows.shape[1] > 128):
        return None
    tile = int(layout[2] or 1)
    padded = np.pad(rows, ((0, -rows.shape[0] % tile), (0, -rows.shape[1] % 128))).view(np.int32)
    return padded.reshape(-1, tile, padded.shape[1] // 128, 128).transpose(0, 2, 1, 3).reshape(-1)
