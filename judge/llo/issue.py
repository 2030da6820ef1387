"""When each bundle issues: in order, one a cycle at most, held back by results and units that are not ready yet.

Covered: results of scalar, predicate, vector, mask, EUP, XLU and MXU instructions, cadences of the XLU, EUP and MXU,
the MXU's result queues, all of it carried across block boundaries. Not covered: VMEM port conflicts.

A stretch of bundles without a wait takes the same time whenever it starts in the same state, so each stretch is timed
once for each state that it meets, and then looked up.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from judge.llo.machine import Machine
from judge.llo.parse import Bundle, Dump, ParseError, Slot


class UnknownOpcode(ParseError):
    """A vector instruction that the machine has no figures for: no total can be given."""


class EmptyQueue(ParseError):
    """A result is popped that nothing pushed: when it would be there is not known."""


# What a bundle may wait for; stall cycles are reported by these names.
CAUSES = ("MXU", "XLU", "EUP", "load", "VALU", "scalar", "DMA wait", "branch")

_CLASSES: tuple[tuple[str, str], ...] = (
    # (class, opcodes), the first that matches counts
    ("sdivrem", r"sdivrem\."),
    ("sld", r"sld$"),
    ("smul", r"smul(hi)?(\.|$)"),
    ("predicate", r"(scmp\.|sc\.u32)"),
    ("predicate_logic", r"p(or|and|nand|nor|xor|neg|mov)$"),
    ("flag_read", r"vsync(mov|donemov)"),
    ("none", r"(vst(\.|$)|vsync|vwait|vdelay|vtrace|vsettm|dma\.|sst$|sbr|shalt|sfence|sphi)"),
    ("none", r"(compiler-|set\.|int_to_ptr|inlined_call|reloc|scalar_parameter_address|vsetiar|vstfence|vnop|vphi)"),
    ("salu", r"(s[a-z]|scalar_|smov)"),
    ("vpush", r"vpush"),
    ("eup", r"v(pow2?|log2|rcp|rsqrt|tanh|erf|sinq|cosq|sigshft)(\.|$)"),
    ("mxu_pop", r"vpop\.([a-z0-9]+\.)+mr[fb]"),
    ("mxu_pop", r"vmatres"),
    ("transpose_pop", r"vpop\.trf"),
    ("xlu_pop", r"vpop\.(xlane|permute)"),
    ("pop", r"vpop\.(eup|sfrf|ccrf|add|crf)"),
    ("matmul", r"vmatmul"),
    ("matprep", r"vmatprep\.mubr"),
    ("pushprep", r"vmatprep\.subr"),
    ("push", r"vmatpush"),
    ("latch", r"v(load|done|dwg|llmr)"),
    ("index_reduce", r"v(max|min)\.index"),
    ("reduce", r"v(add|max|min)\.(xlane|seg)"),
    ("transpose", r"vxpose"),
    ("pattern", r"vset\.pattern"),
    ("permute", r"(vperm|vrot|vbcast)\.(lane|xlu|[a-z0-9.]*xlu)"),
    ("load", r"vld"),
    ("mask", r"(vcmp|v[csl]mask|vm(and|or|xor|mov|neg|nand|nor|packc?)|vmpackc?|vnez|vweird|vlaneseq|vmask|vc\.u32)"),
    ("move", r"(vsel|vmov|vstv|vimm|vrng|vsublane|vlane)"),
    (
        "valu",
        r"v(addc?|sub|mul(?:hi)?|max|min|and|or|xor|shl|shr|shra|shll|shrl|cvtr?|pack|unpack|rot\.slane|perm\.slane|clz|popcnt|"
        r"pcnt|ceil|floor|round|clamps?|abs|neg|not|combine|trunc|exponent|significand|compose|mantissa|expo|sign|rem|"
        r"div|fma|mac|mad|bcast|shuf|ror|rol|relu|avg|sad|dup|ins|ext|move|copy|nan|is|bit|xnor|bfi|bfe)",
    ),
)
_WHOLE = ("valu", "move", "mask", "load", "matmul", "matprep", "pushprep", "vpush", "pattern")  # names of families
_CLASS_OF = tuple(
    (name, re.compile(f"(?:{pattern})(?=[.-]|$)" if name in _WHOLE else pattern)) for name, pattern in _CLASSES
)
_OPERANDS = re.compile(r"%(?:\w*?_((?:s|p|vm|v)\d+)|(\d+))\b")  # a register, or a result that has a name alone
_MAX_QUEUE = 4096  # far more than any result queue holds
_GUARD = re.compile(r"\(!?%\w+_p\d+\)")
_UNIT = re.compile(r"\b(xlu\d|mxu\d)")
_XLU_KINDS = ("reduce", "index_reduce", "permute", "transpose", "pattern")
_DTYPE = re.compile(r"\.(bf16|f32|s8|u8|s4|u4|f8\w*|bf8|if8|e4m3\w*|e5m2)(\.|$)")
_DTYPE_CLASS = {"bf16": "bf16", "f32": "f32", "s8": "int8", "u8": "int8", "s4": "int4", "u4": "int4"}
_MRB = re.compile(r"\[(\d+)\]")
_TRANSPOSED = re.compile(r"\bwidth=(\d+)")


@cache
def opcode_class(opcode: str) -> str | None:
    """The class of an opcode, or None where the machine does not know it."""
    return next((name for name, pattern in _CLASS_OF if pattern.match(opcode)), None)


class State(dict[int, "Run"]):
    """What is still on its way when a stretch begins, in cycles until it is ready; also the memo, stretch → its run.

    `pending`: registers, named results and units; `queues`: results in order; `causes`: who is to blame for a wait.
    """

    __slots__ = ("causes", "pending", "queues")

    def __init__(self, pending: dict[str, int], queues: dict[str, tuple[int, ...]], causes: dict[str, str]) -> None:
        super().__init__()
        self.pending = pending
        self.queues = queues
        self.causes = causes


class Run(list[Any]):
    """[times run, state afterwards, cycles taken, offset of each bundle of interest …]: a list, for speed."""

    __slots__ = ("stalls",)

    stalls: tuple[tuple[int, str, int], ...]  # (bundle, cause, cycles)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Bundles that issue one after the other with no wait between; `gaps`: cycles lost behind a bundle."""

    bundles: tuple[int, ...]
    gaps: dict[int, int] = field(default_factory=dict)
    delays: frozenset[int] = frozenset()  # empty bundles in a branch's delay
    interest: tuple[int, ...] = ()  # bundles whose time of issue the executor asks for


class _Record(NamedTuple):
    """What one bundle needs and leaves."""

    needs: tuple[tuple[str, str], ...]  # (key, cause where its producer is not known)
    pops: tuple[str, ...]  # result queues
    leaves: tuple[tuple[str, int, str], ...]  # (register or result, ready after, cause): the last write counts
    holds: tuple[tuple[str, int, str], ...]  # (unit, free after, cause): the latest counts
    shifts: tuple[tuple[str, int], ...]  # pairs: the second last counts
    pushes: tuple[tuple[str, int, int, int], ...]  # (queue, first ready after, results, spacing)


_CAUSE_OF_CLASS = {
    "reduce": "XLU",
    "index_reduce": "XLU",
    "permute": "XLU",
    "transpose": "XLU",
    "pattern": "XLU",
    "xlu_pop": "XLU",
    "transpose_pop": "XLU",
    "vpush": "XLU",
    "eup": "EUP",
    "matmul": "MXU",
    "matprep": "MXU",
    "push": "MXU",
    "pushprep": "MXU",
    "mxu_pop": "MXU",
    "load": "load",
    "sld": "scalar",
    "salu": "scalar",
    "smul": "scalar",
    "sdivrem": "scalar",
    "predicate": "scalar",
    "predicate_logic": "scalar",
    "flag_read": "scalar",
}

# What all slots of an opcode share: (class, cause, latency, the rule of its unit); "alias" does nothing at all.
_Plan = tuple[str, str, int, "Callable[[Issue, Slot, str, str, _Draft], None] | None"]


class Issue:
    """Times stretches of one dump on one machine. Raises UnknownOpcode for what the machine has no figures for."""

    def __init__(self, dump: Dump, machine: Machine) -> None:
        self.dump = dump
        self.machine = machine
        self._free = {b.address for b in dump.bundles if passed_over(b)} if machine.rule == "compiler" else set()
        self._results_of = _results_of(dump, machine)
        self.results = {slot.result for bundle in dump.bundles for slot in bundle.slots}
        self._plans: dict[str, _Plan] = {}
        self.records: list[_Record | None] = [None] * len(dump.bundles)
        self.stretches: list[Stretch] = []
        self.states: dict[tuple[object, ...], State] = {}
        self.start = self._intern({}, {}, {})
        self.runs: list[tuple[int, Run]] = []  # (stretch, run)

    def results_of(self, queue: str, shape: str) -> int:
        """How many pops belong to one vmatmul of that type, or to one transpose of that shape."""
        return self._results_of[queue, shape]

    def add(self, stretch: Stretch) -> int:
        """The stretch's number."""
        self.stretches.append(stretch)
        return len(self.stretches) - 1

    # --- timing ---

    def run(self, number: int, state: State) -> Run:
        """The stretch's run from `state`; the executor looks up `state.get(number)` first."""
        if not self.runs:
            self._check_opcodes()
        stretch = self.stretches[number]
        ready, causes = dict(state.pending), dict(state.causes)
        queues = {name: list(times) for name, times in state.queues.items()}
        now = 0
        stalls: list[tuple[int, str, int]] = []
        offsets: list[int] = []
        interest = set(stretch.interest)
        get = ready.get
        for address in stretch.bundles:
            record = self.records[address] or self._record(address)
            at, held = now, ""
            for key, cause in record.needs:
                when = get(key, 0)
                if when > at:
                    at, held = when, causes.get(key, cause)
            for name in record.pops:
                waiting = queues.get(name)
                if not waiting:
                    raise self._nothing_to_pop(address, name)
                when = waiting.pop(0)
                if when > at:
                    at, held = when, "XLU" if name.endswith("trf") else "MXU"
            if at > now:
                stalls.append((address, held, at - now))
            for key, after, cause in record.leaves:
                ready[key] = at + after
                causes[key] = cause
            for key, after, cause in record.holds:
                if at + after > get(key, 0):
                    ready[key] = at + after
                    causes[key] = cause
            for key, after in record.shifts:
                ready[key] = get(key + "'", 0)
                ready[key + "'"] = at + after
                causes[key] = causes[key + "'"] = "MXU"
            for name, after, results, spacing in record.pushes:
                waiting = queues.setdefault(name, [])
                first = at + after
                if waiting:
                    first = max(first, waiting[-1] + spacing)
                waiting.extend(first + i * spacing for i in range(results))
                if len(waiting) > _MAX_QUEUE:
                    raise UnknownOpcode(
                        f"{self.dump.path.name}: more than {_MAX_QUEUE} results of {name} are not popped"
                    )
            if address in interest:
                offsets.append(at)
            if address in self._free:
                continue
            gap = stretch.gaps.get(address, 0)
            if gap or address in stretch.delays:
                stalls.append((address, "branch", gap + (address in stretch.delays)))
            now = at + 1 + gap
        after_state = self._shifted(ready, queues, causes, now)
        run = Run([0, after_state, now, *offsets])
        run.stalls = tuple(stalls)
        state[number] = run
        self.runs.append((number, run))
        return run

    def _nothing_to_pop(self, address: int, queue: str) -> EmptyQueue:
        return EmptyQueue(
            f"{self.dump.path.name}: the bundle at {address:#x} pops {queue}, which nothing was pushed to"
        )

    def stalls(self) -> Counter[tuple[int, str]]:
        """(bundle, cause) → cycles that it came later than the bundle before it allows, over all runs so far.

        An empty bundle in a branch's delay counts as a cycle of "branch", not as a bundle that issued.
        """
        total: Counter[tuple[int, str]] = Counter()
        for _, run in self.runs:
            for address, cause, cycles in run.stalls:
                total[address, cause] += cycles * run[0]
        return total

    def later(self, state: State, cycles: int) -> State:
        """`state` after `cycles` in which nothing issued."""
        if cycles <= 0 or not (state.pending or state.queues):
            return state
        return self._shifted(state.pending, state.queues, state.causes, cycles)

    def _shifted(
        self,
        ready: dict[str, int],
        queues: Mapping[str, Iterable[int]],
        causes: dict[str, str],
        now: int,
    ) -> State:
        pending = {key: when - now for key, when in ready.items() if when > now}
        waiting = {name: tuple(max(0, when - now) for when in times) for name, times in queues.items() if times}
        return self._intern(pending, waiting, {key: causes[key] for key in pending if key in causes})

    def _intern(self, pending: dict[str, int], queues: dict[str, tuple[int, ...]], causes: dict[str, str]) -> State:
        identity = (*sorted(pending.items()), None, *sorted(queues.items()))
        state = self.states.get(identity)
        if state is None:
            state = self.states[identity] = State(pending, queues, causes)
        return state

    # --- what a bundle needs and leaves ---

    def _check_opcodes(self) -> None:
        """Raises UnknownOpcode where any bundle, also one that never runs, holds what the machine does not know.

        Before the first stretch is timed; by then the scalar side of the first block has been translated.
        """
        for bundle in self.dump.bundles:
            for slot in bundle.slots:
                if opcode_class(slot.opcode) is None:
                    where = f"{self.dump.path.name}:{bundle.line}"
                    raise UnknownOpcode(f"{where}: unknown vector instruction: {slot.opcode} {slot.rest}"[:300])

    def _record(self, address: int) -> _Record:
        bundle, draft = self.dump.bundles[address], _Draft()
        needs = draft.needs
        for slot in bundle.slots:
            opcode, rest = slot.opcode, slot.rest
            plan = self._plans.get(opcode)
            if plan is None:
                plan = self._plans[opcode] = self._plan(opcode)
            kind, cause, latency, rule = plan
            if kind == "alias":
                continue
            # no cycle is counted between a predicate and what it guards
            operands = _OPERANDS.findall(_GUARD.sub("", rest) if "(" in rest else rest)
            named = []
            for register, name in operands:
                if register:
                    needs.append((register, "VALU"))
                else:
                    named.append(name)
            if named:
                needs += [(name, cause) for name in named]
            if kind in ("pop", "xlu_pop") and not self.results.issuperset(named):
                raise self._nothing_to_pop(bundle.address, rest)
            if rule is not None:
                rule(self, slot, kind, _unit(slot), draft)
            elif kind != "none" or slot.register is not None:
                draft.leaves.append((slot.register or slot.result, latency, cause))
        record = self.records[address] = _Record(
            needs=tuple(draft.needs),
            pops=tuple(draft.pops),
            leaves=tuple(draft.leaves),
            holds=tuple(draft.holds),
            shifts=tuple(draft.shifts),
            pushes=tuple(draft.pushes),
        )
        return record

    def _plan(self, opcode: str) -> _Plan:
        if opcode in ("sphi", "vphi") or opcode.startswith(("inlined_call", "int_to_ptr")):
            return "alias", "", 0, None
        kind = opcode_class(opcode)
        assert kind is not None  # all have been checked
        rule = _UNIT_RULES.get(kind)
        latency = 0 if rule else 1 if kind == "none" else self.machine.latency(kind)
        return kind, _CAUSE_OF_CLASS.get(kind, "VALU"), latency, rule


@dataclass(kw_only=True)
class _Draft:
    """A _Record in the making."""

    needs: list[tuple[str, str]] = field(default_factory=list)
    pops: list[str] = field(default_factory=list)
    leaves: list[tuple[str, int, str]] = field(default_factory=list)
    holds: list[tuple[str, int, str]] = field(default_factory=list)
    shifts: list[tuple[str, int]] = field(default_factory=list)
    pushes: list[tuple[str, int, int, int]] = field(default_factory=list)


@cache
def _units(opcode: str) -> list[str]:
    return _UNIT.findall(opcode)


def _unit(slot: Slot) -> str:
    """`xlu1`, `mxu0` …, from the opcode or, where results are addressed, from its operands; "" for none."""
    match = _UNIT.search(slot.opcode) or _UNIT.search(slot.rest)
    return match[1] if match else ""


def dtype_class(opcode: str) -> str:
    """bf16, f32, int8, int4 or fp8, of an MXU instruction."""
    match = _DTYPE.search(opcode)
    name = match[1] if match else "f32"
    return _DTYPE_CLASS.get(name, "fp8")


def _xlu_push(issue: Issue, slot: Slot, kind: str, unit: str, draft: _Draft) -> None:
    machine, variant = issue.machine, xlu_variant(slot.opcode, kind)
    draft.needs.append((f"{unit}.{kind}", "XLU"))
    cadence = kind if variant == "rotate" else variant
    for following in _XLU_KINDS:
        draft.holds.append((f"{unit}.{following}", machine.cadence(f"{cadence}_to_{following}"), "XLU"))
    if kind != "transpose":
        draft.leaves.append((slot.result, machine.latency(variant, unit), "XLU"))
    elif slot.opcode.endswith(".end"):  # the results come after the last row
        queue = f"{unit}.trf"
        after, spacing = machine.latency(variant, unit), machine.cadence("transpose_pop")
        draft.pushes.append((queue, after, issue.results_of(queue, _shape(slot, machine)[0]), spacing))


def xlu_variant(opcode: str, kind: str) -> str:
    """The kind, or the variant of it that has figures of its own."""
    if opcode.startswith("vrot"):
        return "rotate"
    if kind == "transpose" and ".b16" in opcode:
        return "transpose_binary" if ".binary" in opcode else "transpose_b16"
    return kind


def _xlu_pop(issue: Issue, slot: Slot, kind: str, unit: str, draft: _Draft) -> None:
    if kind == "transpose_pop":
        draft.pops.append(f"{unit}.trf")
    if slot.register is not None:
        draft.leaves.append((slot.register, issue.machine.latency("pop"), "XLU"))


def _matmul(issue: Issue, slot: Slot, kind: str, unit: str, draft: _Draft) -> None:
    machine, dtype = issue.machine, dtype_class(slot.opcode)
    cadence = machine.cadence(f"matmul_{dtype}")
    draft.needs.append((f"{unit}.matmul", "MXU"))
    if ".lmr" in slot.opcode:  # takes half as many rows of a left-hand side that was pushed and latched
        cadence //= 2
        draft.needs.append((f"{unit}.lmr", "MXU"))
    draft.holds.append((f"{unit}.matmul", cadence, "MXU"))
    if ".vlgmr" in slot.opcode:  # takes the weights that were pushed
        draft.needs.append((f"{unit}.{staging(slot.opcode)}", "MXU"))
    after, spacing = machine.latency(f"matmul_{dtype}"), machine.cadence(f"mxu_pop_{dtype}")
    buffer = _MRB.search(slot.rest)
    if buffer is None:
        draft.pushes.append((unit, after, issue.results_of(unit, _shape(slot, machine)[0]), spacing))
        return
    for i in range(machine.results_per_matmul(dtype)):
        draft.leaves.append((f"{unit}[{int(buffer[1]) + i}]", after + i * spacing, "MXU"))


def _latch(issue: Issue, slot: Slot, kind: str, unit: str, draft: _Draft) -> None:
    """`vllmr` latches a left-hand side, pushed like weights, for the vmatmul.lmr that follow."""
    if slot.opcode.startswith("vllmr"):
        draft.holds.append((f"{unit}.lmr", issue.machine.latency("latch_lhs"), "MXU"))


def _mxu_pop(issue: Issue, slot: Slot, kind: str, unit: str, draft: _Draft) -> None:
    buffer = _MRB.search(slot.rest)
    if buffer is None:  # `vpop.add.s32.mrf.mxu0.mxu1` takes a result of each and adds them
        draft.pops += _units(slot.opcode)
    else:
        draft.needs.append((f"{unit}[{buffer[1]}]", "MXU"))
    if slot.register is not None:
        draft.leaves.append((slot.register, issue.machine.latency("pop"), "MXU"))


def staging(opcode: str) -> str:
    """Which of the two staging registers weights go to or come from."""
    return "msrb" if ".msrb" in opcode else "msra"


def push_name(opcode: str) -> str:
    """Name of a push's figures: `push_xpose_bf16`."""
    return ("push_xpose_" if ".xpose" in opcode else "push_") + dtype_class(opcode)


def _push(issue: Issue, slot: Slot, kind: str, unit: str, draft: _Draft) -> None:
    machine = issue.machine
    name = push_name(slot.opcode)
    draft.needs.append((f"{unit}.push", "MXU"))
    draft.holds.append((f"{unit}.{staging(slot.opcode)}", machine.latency(name), "MXU"))
    if machine.pushes_pairs:
        draft.shifts.append((f"{unit}.push", machine.cadence(name)))
    else:
        draft.holds.append((f"{unit}.push", machine.cadence(name), "MXU"))


def _matprep(issue: Issue, slot: Slot, kind: str, unit: str, draft: _Draft) -> None:
    draft.needs.append((f"{unit}.prep", "MXU"))
    draft.holds.append((f"{unit}.prep", issue.machine.cadence(f"matmul_{dtype_class(slot.opcode)}"), "MXU"))


_UNIT_RULES: dict[str, Callable[[Issue, Slot, str, str, _Draft], None]] = {
    **dict.fromkeys(("reduce", "index_reduce", "permute", "transpose", "pattern"), _xlu_push),
    **dict.fromkeys(("xlu_pop", "transpose_pop"), _xlu_pop),
    "matmul": _matmul,
    "matprep": _matprep,
    "mxu_pop": _mxu_pop,
    "latch": _latch,
    **dict.fromkeys(("push", "pushprep"), _push),
}


def passed_over(bundle: Bundle) -> bool:
    """Whether libtpu passes over it in its estimate: empty, or a conditional branch alone. The hardware does not."""
    return all(slot.opcode == "sbr.rel" and slot.rest.startswith("(") for slot in bundle.slots)


def _shape(slot: Slot, machine: Machine) -> tuple[str, int]:
    """What tells one vmatmul's or transpose's number of results from another's: a name, and the number in proportion.

    A transpose hands out as many rows as it is wide, two a register where they are 16 bits wide.
    """
    if not slot.opcode.startswith("vxpose"):
        dtype = dtype_class(slot.opcode)
        results = machine.results_per_matmul(dtype)
        return (f"{dtype}.lmr", results // 2) if ".lmr" in slot.opcode else (dtype, results)
    width = _TRANSPOSED.search(slot.rest)
    if width is None:
        raise ParseError(f"a transpose of unknown width: {slot.opcode} {slot.rest}")
    rows = int(width[1]) // (2 if xlu_variant(slot.opcode, "transpose") == "transpose_b16" else 1)
    return str(rows), rows


def _results_of(dump: Dump, machine: Machine) -> dict[tuple[str, str], int]:
    """(result queue, dtype of a vmatmul or rows of a transpose) → pops that belong to one.

    From the schedule, which pops all that it pushes: in proportion to the rows that a vmatmul of the dtype takes, or
    that a transpose hands out.
    """
    pushes: Counter[tuple[str, str]] = Counter()
    pops: Counter[str] = Counter()
    weights: dict[tuple[str, str], int] = {}

    def push(queue: str, slot: Slot) -> None:
        shape, weight = _shape(slot, machine)
        pushes[queue, shape] += 1
        weights[queue, shape] = weight

    for bundle in dump.bundles:
        for slot in bundle.slots:
            units = _units(slot.opcode)
            kind = opcode_class(slot.opcode) if units else None
            if kind == "mxu_pop":
                pops.update(units)
            elif kind == "matmul":
                for unit in units:
                    push(unit, slot)
            elif kind == "transpose_pop":
                pops[f"{units[0]}.trf"] += 1
            elif kind == "transpose" and slot.opcode.endswith(".end"):
                push(f"{units[0]}.trf", slot)

    pushed: Counter[str] = Counter()
    for key, count in pushes.items():
        pushed[key[0]] += count * weights[key]
    return {key: max(1, round(pops[key[0]] * weight / pushed[key[0]])) for key, weight in weights.items()}
