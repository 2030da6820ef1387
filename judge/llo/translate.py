"""The scalar side of a schedule as Python source: one function a block, run by execute.py.

A block begins where control can arrive (the entry, a branch target, the bundle after a branch's delay slots) and ends
behind the delay slots of its first branch or where another block begins. Vector slots compute nothing here; every
bundle costs a cycle. Registers are read before any is written within a bundle. Scalars are unsigned 32-bit.

Covered: scalar arithmetic and comparisons, predicates, SMEM, addresses, branches, sync flags, DMAs, halts. Any other
instruction that writes a scalar or predicate register, moves data or synchronises raises Untranslatable by name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from judge.llo.issue import Issue, Stretch
from judge.llo.machine import Machine
from judge.llo.parse import Bundle, Dump, Slot


class Untranslatable(Exception):
    """A slot that the executor does not know: no total can be given."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """`source` defines `block_<address>(M, s, p, m, t, q) -> (next address or -1, t, q)`.

    t is the first cycle in which it may issue, q the issue state (issue.State). Between waits a block is one stretch:
    `r = q.get(n) or I.run(n, q)` gives its state afterwards, its cycles, and when the bundles with effects issue.
    """

    address: int
    source: str
    bundle_indices: tuple[int, ...]  # bundles issued by one run of it


_MASK = "0xFFFFFFFF"
_BINARY = {
    "sadd.s32": "({0} + {1}) & " + _MASK,
    "ssub.s32": "({0} - {1}) & " + _MASK,
    "smul.u32": "({0} * {1}) & " + _MASK,
    "smulhi.u32": "({0} * {1}) >> 32",
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
    "sshll.u32": "({0} << distance({1})) & " + _MASK,
    "sshrl.u32": "{0} >> distance({1})",
    "sshra.s32": "(signed({0}) >> distance({1})) & " + _MASK,
    "smin.u32": "least({0}, {1})",
    "smax.u32": "greatest({0}, {1})",
    "smin.s32": "least({0} ^ 0x80000000, {1} ^ 0x80000000) ^ 0x80000000",
    "smax.s32": "greatest({0} ^ 0x80000000, {1} ^ 0x80000000) ^ 0x80000000",
    "sc.u32": "({0} + {1}) >> 32 != 0",  # carry out of an addition
    "pand": "{0} & {1}",
    "por": "{0} | {1}",
    "pxor": "{0} ^ {1}",
    "pnand": "({0} & {1}) ^ True",
    "pnor": "({0} | {1}) ^ True",
}
_UNTYPED = {"sadd": "sadd.s32", "ssub": "ssub.s32", "smul": "smul.u32", "sand": "sand.u32", "sor": "sor.u32"}
_UNTYPED |= {"sxor": "sxor.u32", "sshll": "sshll.u32", "sshrl": "sshrl.u32", "sshra": "sshra.s32"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LEA = re.compile(r"scalar_lea\.(vmem|hbm|smem|sflag)$")
_COMPARISON = re.compile(r"scmp\.(eq|ne|lt|le|gt|ge)\.(s32|u32)(?:\.totalorder)?$")
_WAITS = ("dma.done.wait", "vwait.ge", "vwait.ge.trace")
_DIVISION = ("kind=kDiv", "kind=kRem", "kind=kDivAndRem")  # the quotient is popped first
# Results that steer nothing in any schedule seen (scalar floats, sublane masks): UNKNOWN, so an error where they do.
_NOT_COMPUTED = re.compile(r"(s(add|sub|mul|min|max|mov|cmp\.\w+)\.f32(\.\w+)?|scvt\.[\w.]+|sshllo\.u32)$")
# Nothing for the scalar side to do: aliases, hints, traces.
_NOTHING = {"sphi", "sfence", "compiler-scheduling-barrier", "vdelay", "vtrace", "vsettm"}
_DMA = {
    "dma.hbm_to_vmem": ("hbm", "vmem"),
    "dma.vmem_to_hbm": ("vmem", "hbm"),
    "dma.hbm_to_smem": ("hbm", "smem"),
    "dma.vmem_to_smem": ("vmem", "smem"),
    "dma.general": ("src", "dst"),
}
_VECTOR = re.compile(r"(v|set\.|custom)")
_SCALAR_RESULT = re.compile(r"[sp]\d+$")


def split_arguments(text: str) -> list[str]:
    """Arguments at the top level of brackets and parentheses."""
    arguments, depth, current = [], 0, ""
    for character in text:
        depth += character in "[("
        depth -= character in "])"
        if character == "," and depth == 0:
            arguments.append(current.strip())
            current = ""
        else:
            current += character
    return [*arguments, current.strip()] if current.strip() else arguments


class Translator:
    """Turns the bundles of one dump into blocks.

    `symbols` maps allocation names to addresses in their space's own units: SMEM words, VMEM rows, flag numbers.
    """

    def __init__(self, dump: Dump, machine: Machine, symbols: dict[str, int], issue: Issue) -> None:
        self.dump = dump
        self.issue = issue
        self.machine = machine
        self.symbols = symbols
        self.entries = self._entries()

    # --- blocks ---

    def _entries(self) -> set[int]:
        entries = {0}
        for bundle in self.dump.bundles:
            branch = _branch_of(bundle)
            if branch is not None:
                entries.add(self._target(bundle, branch))
                last = self._delay_slots(bundle.address)[-1:] or [bundle.address]
                entries.add(last[0] + 1)
        return {entry for entry in entries if entry < len(self.dump.bundles)}

    def _target(self, bundle: Bundle, branch: Slot) -> int:
        match = re.search(r"target = \$region(\d+)", branch.rest)
        if match is None:
            raise self._unknown(bundle, branch, "branch without a target")
        # The region that ends the program is not always marked: its place is the exit, the last bundle.
        return self.dump.region_address.get(int(match[1]), len(self.dump.bundles) - 1)

    def _delay_slots(self, address: int) -> list[int]:
        """Addresses of the bundles that issue between the branch at `address` and its target.

        Where a run of empty bundles may be printed as one, the count alone does not tell: the delay ends before a
        label or a region, and behind an empty bundle unless the branch's own region closes further on. That is the last
        to begin of those that close here; where the branch is a loop's, one that began with the loop or in it.
        """
        window = self.dump.bundles[address + 1 : address + 1 + self.machine.branch_delay_bundles]
        if not self.machine.merges_empty_bundles:
            return [bundle.address for bundle in window]
        bundle = self.dump.bundles[address]
        branch = _branch_of(bundle)
        assert branch is not None
        target = self._target(bundle, branch)
        earliest = target if target <= address else 0
        begins = self.dump.region_address
        closes = [
            (begins[region], bundle.address)
            for bundle in (bundle, *window)
            for region in (bundle.ends if bundle.slots else ())
            if earliest <= begins.get(region, address + 1) <= address
        ]
        _, own_end = max(closes, default=(0, address))
        slots: list[int] = []
        for bundle in window:
            if bundle.label or (bundle.slots and bundle.opens_region):
                break
            slots.append(bundle.address)
            if not bundle.slots and bundle.address >= own_end:
                break
        return slots

    def block(self, entry: int) -> Block:
        """The block that begins at one of `entries`. Raises Untranslatable where it holds what is not known."""
        block = _BlockSource(self.issue)
        branch: tuple[Bundle, Slot] | None = None
        remaining: list[int] = []
        issued: list[int] = []
        address, following = entry, "-1"
        while address < len(self.dump.bundles):
            bundle = self.dump.bundles[address]
            here = _branch_of(bundle)
            if here is not None:
                if branch is not None:
                    raise self._unknown(bundle, here, "branch in the delay slots of another")
                branch = (bundle, here)
                block.lines.append(f"taken = {self._arguments(bundle, here)[0] or True}")
                remaining = self._delay_slots(address)
            waits, lines = self._bundle(bundle)
            if waits and here is not None:
                raise self._unknown(bundle, here, "branch beside a wait")
            # Merged empty bundles stand for as many cycles as the delay has left.
            gap = self.machine.branch_delay_bundles - len(remaining) if here and self.machine.rule != "compiler" else 0
            block.add(address, lines, waits=waits, gap=gap, delay=branch is not None and not bundle.slots)
            issued.append(address)
            address += 1
            if branch is not None and (not remaining or address > remaining[-1]):
                following = f"({self._target(*branch)} if taken else {address})"
                break
            if branch is None and address in self.entries:
                following = str(address)
                break
        block.end(following)
        source = f"def block_{entry}(M, s, p, m, t, q):\n" + "".join(f"    {line}\n" for line in block.lines)
        return Block(address=entry, source=source, bundle_indices=tuple(issued))

    # --- bundles ---

    def _bundle(self, bundle: Bundle) -> tuple[bool, list[str]]:
        """(whether it waits, Python lines): waits end, values are computed, effects run, then registers change.

        "@" in a line is the time of issue; a wait sets `u`, the first cycle after it, which what else the bundle does
        comes just before.
        """
        before: list[str] = []  # operands are in their registers when the program starts
        values: list[tuple[str, str]] = []
        effects: list[str] = []
        waits: list[str] = []
        for slot in bundle.slots:
            if slot.opcode.startswith(("dma.done.wait", "vwait")):
                waits.append(self._wait(bundle, slot))
            else:
                for kind, target, text in self._slot(bundle, slot):
                    if kind == "before":
                        before.append(text)
                    elif kind == "value":
                        values.append((target, text))
                    else:
                        effects.append(text)
        if values and not effects and not waits:
            return False, [*before, f"{', '.join(v[0] for v in values)} = {', '.join(v[1] for v in values)}"]
        computed = [f"x{i} = {text}" for i, (_, text) in enumerate(values)]
        assigned = [f"{target} = x{i}" for i, (target, _) in enumerate(values)]
        after = computed + effects + assigned
        if waits:
            after = [*waits, *(line.replace("@", "u - 1") for line in after)]
        return bool(waits), before + after

    def _wait(self, bundle: Bundle, slot: Slot) -> str:
        predicate, arguments = self._arguments(bundle, slot)
        if slot.opcode not in _WAITS:
            raise self._unknown(bundle, slot, "sync instruction")
        flag, count = (self._value(bundle, slot, text) for text in arguments[:2])
        return f"{f'if {predicate}: ' if predicate else ''}u = max(u, M.wait({flag}, {count}, @, {bundle.address}))"

    def _slot(self, bundle: Bundle, slot: Slot) -> Iterator[tuple[str, str, str]]:
        """(kind, register, text) of one slot: "value" an expression for a register, "effect" a statement, "before" a
        statement that runs ahead of the bundle; "@" is the time of issue."""
        opcode = _UNTYPED.get(slot.opcode, slot.opcode)
        if opcode in _NOTHING or opcode == "sbr.rel":
            return
        if opcode.startswith("inlined_call_operand."):
            yield "before", "", f"{_place(slot)} = M.operand({self._operand_index(bundle, slot)})"
            return
        if opcode.startswith("int_to_ptr."):
            yield from self._pointer(bundle, slot)
            return
        scalar = slot.register is not None and _SCALAR_RESULT.match(slot.register)
        if not scalar and _VECTOR.match(opcode) and opcode != "vpush" and not opcode.startswith(("vsync", "vwait")):
            return
        if scalar:
            yield "value", _place(slot), self._expression(bundle, slot, opcode)
        elif opcode in ("vsyncmov", "vpush") or opcode.startswith("sdivrem"):
            name = f"m['{slot.result}']"
            yield "value", name, self._expression(bundle, slot, opcode)
        else:
            yield "effect", "", self._effect(bundle, slot, opcode)

    def _expression(self, bundle: Bundle, slot: Slot, opcode: str) -> str:
        predicate, arguments = self._arguments(bundle, slot)
        old = f"m.get('{slot.result}', UNKNOWN)" if slot.register is None else _place(slot)
        text = self._unpredicated(bundle, slot, opcode, arguments)
        return f"({_select(predicate, text, old)})" if predicate else f"({text})"

    def _unpredicated(self, bundle: Bundle, slot: Slot, opcode: str, arguments: list[str]) -> str:
        def value(i: int) -> str:
            if i >= len(arguments):
                raise self._unknown(bundle, slot, "instruction with too few operands")
            return self._value(bundle, slot, arguments[i])

        if _NOT_COMPUTED.match(opcode):
            return "UNKNOWN"
        comparison = _COMPARISON.match(opcode)
        if comparison:
            operator, sign = _COMPARE[comparison[1]], comparison[2]
            flip = " ^ 0x80000000" if sign == "s32" and operator not in ("==", "!=") else ""
            return f"({value(0)}{flip}) {operator} ({value(1)}{flip})"
        if opcode in _BINARY:
            return re.sub(r"distance\((\d+)\)", r"\1", _BINARY[opcode].format(value(0), value(1)))
        if opcode in ("smov", "smov.u32", "smov.s32", "pmov"):
            select = re.match(r"^\((!?%\w+), (.*)\)$", arguments[0])
            if select:
                old = self._value(bundle, slot, select[2])
                return _select(self._register(bundle, slot, select[1]), value(1), old)
            return value(0)
        if _LEA.match(opcode):
            return f"({value(0)} + {value(1)}) & {_MASK}"
        if opcode == "scalar_select":
            names = [argument.split("=", 1)[-1] for argument in arguments]
            picked = [self._value(bundle, slot, name) for name in names]
            return _select(picked[0], picked[1], picked[2])
        if opcode == "sld":
            return f"M.load({self._memory(bundle, slot, arguments[0])})"
        if opcode == "pneg":
            return f"{value(0)} ^ True"
        if opcode == "vsyncmov":
            return f"M.read_flag({value(0)}, @)"
        if opcode == "vpop.sfrf":
            return f"m.get('{arguments[0].lstrip('%')}', UNKNOWN)"
        if opcode == "spop.drf":
            return f"popped(m.get('{arguments[0].lstrip('%')}', UNKNOWN))"
        if opcode == "sdivrem.u32" and arguments[-1] in _DIVISION:
            return f"divided({value(0)}, {value(1)}, '{arguments[-1]}')"
        if opcode in ("vpush", "spop"):
            return "UNKNOWN"
        raise self._unknown(bundle, slot, "scalar instruction")

    def _effect(self, bundle: Bundle, slot: Slot, opcode: str) -> str:
        predicate, arguments = self._arguments(bundle, slot)
        guard = f"if {predicate}: " if predicate else ""
        if opcode == "sst":
            address = self._memory(bundle, slot, arguments[0])
            return f"{guard}M.store({address}, {self._value(bundle, slot, arguments[1])})"
        if opcode == "vsyncadd":
            flag, count = (self._value(bundle, slot, text) for text in arguments[:2])
            return f"{guard}M.add_flag({flag}, {count})"
        if opcode == "vsyncpa":
            return f"{guard}M.set_flag({self._value(bundle, slot, arguments[0])})"
        if opcode == "shalt.err":
            return f"{guard}M.halt({bundle.address}, {bundle.line})"
        if opcode in _DMA:
            return guard + self._dma(bundle, slot, opcode, arguments)
        raise self._unknown(bundle, slot, "control, sync or DMA instruction")

    def _dma(self, bundle: Bundle, slot: Slot, opcode: str, arguments: list[str]) -> str:
        named = dict(argument.split("=", 1) for argument in arguments)
        source, target = _DMA[opcode]
        needed = (source, target, "size_in_granules", "dst_syncflagno")
        missing = [name for name in needed if name not in named]
        if missing:
            raise self._unknown(bundle, slot, f"DMA without {', '.join(missing)}")
        kind = "hbm_to_hbm" if opcode == "dma.general" else opcode.removeprefix("dma.")
        values = (self._value(bundle, slot, named[name]) for name in needed)
        # What a run of it costs is HBM's business: where that side has no gaps, VMEM's do not matter.
        strides = [
            f"{side}_stride" for side, place in (("src", source), ("dst", target)) if place not in ("vmem", "smem")
        ]
        told = [self._value(bundle, slot, named[name]) for name in ("steps_per_stride", *strides) if name in named]
        return f"M.copy('{kind}', {', '.join(values)}, ({''.join(f'{value}, ' for value in told)}), @)"

    # --- operands ---

    def _arguments(self, bundle: Bundle, slot: Slot) -> tuple[str, list[str]]:
        """(predicate or "", arguments): predicates stand before the operands or behind an SMEM operand."""
        rest = re.sub(r"\[thread:\$\d+\]", "", slot.rest).strip()
        rest = re.sub(r"\[resolvable:\$\w+\]", "", rest).strip()
        # scalar_lea names what it points into
        rest = re.sub(r"^((?:\(!?%\w+\), )?%\w+, %?\w+) \[#allocation\w+\]$", r"\1", rest)
        predicate = ""
        match = re.match(r"^\((!?%\w+)\)\s*,?\s*(.*)$", rest, re.S)
        if match:
            predicate, rest = self._register(bundle, slot, match[1]), match[2]
        match = re.match(r"^(\[smem:\[.*?\]\])\s*(?:\((!?%\w+)\))?,?\s*(.*)$", rest)
        if match is None:
            return predicate, split_arguments(rest)
        if match[2]:
            predicate = self._register(bundle, slot, match[2])
        return predicate, [match[1], *split_arguments(match[3])]

    def _register(self, bundle: Bundle, slot: Slot, text: str) -> str:
        match = re.match(r"^(!?)%\w+?_([sp])(\d+)$", text)
        if match is None:
            raise self._unknown(bundle, slot, f"operand {text!r}")
        register = f"{match[2]}[{match[3]}]"
        return f"({register} ^ True)" if match[1] else register

    def _value(self, bundle: Bundle, slot: Slot, text: str) -> str:
        text = text.strip()
        if text.startswith(("%", "!%")):
            return self._register(bundle, slot, text)
        if re.match(r"^-?\d+$", text):
            return str(int(text) & 0xFFFFFFFF)
        if re.match(r"^\$?0x[0-9a-f]+$", text):
            return str(int(text.lstrip("$"), 16))
        if re.match(r"^-?(\d+\.\d+(e[+-]?\d+)?|inf|nan)$", text):
            return "UNKNOWN"  # floats are not computed
        match = re.match(r"^\[([^\[\]]*)\]$", text)
        if match:
            return self._sum(bundle, slot, match[1])
        raise self._unknown(bundle, slot, f"operand {text!r}")

    def _memory(self, bundle: Bundle, slot: Slot, text: str) -> str:
        match = re.match(r"^\[smem:\[(.*)\]\]$", text)
        if match is None:
            raise self._unknown(bundle, slot, f"memory operand {text!r}")
        return self._sum(bundle, slot, match[1])

    def _sum(self, bundle: Bundle, slot: Slot, text: str) -> str:
        """`#allocation13 + %s5 + $0x1` as an expression in the units of the allocation's space."""
        terms = []
        for term in text.split(" + "):
            name = term.strip()
            if name.startswith("#"):
                if name[1:] not in self.symbols:
                    raise self._unknown(bundle, slot, f"symbol {name}")
                terms.append(str(self.symbols[name[1:]]))
            else:
                terms.append(self._value(bundle, slot, name))
        return " + ".join(terms)

    def _operand_index(self, bundle: Bundle, slot: Slot) -> str:
        match = re.search(r"index: (\d+)", slot.rest)
        if match is None:
            raise self._unknown(bundle, slot, "operand without an index")
        return match[1]

    def _pointer(self, bundle: Bundle, slot: Slot) -> Iterator[tuple[str, str, str]]:
        """A pointer cast: nothing where it names a register of its own bundle anew, else a move."""
        _, arguments = self._arguments(bundle, slot)
        source = self._value(bundle, slot, arguments[0])
        if source != _place(slot):
            yield "value", _place(slot), source

    def _unknown(self, bundle: Bundle, slot: Slot, what: str) -> Untranslatable:
        return Untranslatable(f"{self.dump.path.name}:{bundle.line}: unknown {what}: {slot.opcode} {slot.rest}"[:300])


class _BlockSource:
    """The Python lines of one block, and the stretches that time it."""

    def __init__(self, issue: Issue) -> None:
        self.issue = issue
        self.lines: list[str] = []
        self._bundles: list[int] = []
        self._gaps: dict[int, int] = {}
        self._delays: set[int] = set()
        self._interest: list[int] = []
        self._first_line = 0

    def add(self, address: int, lines: list[str], *, waits: bool, gap: int, delay: bool) -> None:
        self._bundles.append(address)
        if gap:
            self._gaps[address] = gap
        if delay:
            self._delays.add(address)
        timed = any("@" in line for line in lines)
        if timed:
            self._interest.append(address)
            index = 2 + len(self._interest)
            lines = [line.replace("@", f"t + r[{index}]") for line in lines]
        if not waits:
            self.lines += lines
            return
        self._close()
        # The wait is the stretch's last bundle: what comes after it begins when it ends, at u.
        self.lines += ["u = t + r[2]", *lines, "q = r[1] if u == t + r[2] else I.later(r[1], u - t - r[2])", "t = u"]
        self._first_line = len(self.lines)

    def end(self, following: str) -> None:
        if self._bundles:
            self._close()
            self.lines += ["t += r[2]", "q = r[1]"]
        self.lines.append(f"return {following}, t, q")

    def _close(self) -> None:
        stretch = Stretch(
            bundles=tuple(self._bundles),
            gaps=self._gaps,
            delays=frozenset(self._delays),
            interest=tuple(self._interest),
        )
        number = self.issue.add(stretch)
        self.lines.insert(self._first_line, f"r = q.get({number}) or I.run({number}, q)")
        self.lines.insert(self._first_line + 1, "r[0] += 1")
        self._bundles, self._gaps, self._delays, self._interest = [], {}, set(), []


def _place(slot: Slot) -> str:
    assert slot.register is not None
    return f"{slot.register[0]}[{slot.register[1:]}]"


def _select(predicate: str, then: str, otherwise: str) -> str:
    """Predicates are bools or UNKNOWN, which makes the result UNKNOWN."""
    return f"({then}) if {predicate} is True else ({otherwise}) if {predicate} is False else UNKNOWN"


def _branch_of(bundle: Bundle) -> Slot | None:
    return next((slot for slot in bundle.slots if slot.opcode == "sbr.rel"), None)
