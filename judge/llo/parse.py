"""The TPU compiler's final schedule (`*-final_bundles.txt`) as typed records.

A dump is one VLIW bundle a line, `ADDR [label] : [>…] { slot ;; slot … }`, with comments that may span lines and
nest. The comments carry structure: `Start region N` names branch targets, `/*size_in_granules=*/` names arguments.
Text that does not fit is an error with file and line, never skipped.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple


class ParseError(Exception):
    """A dump says something that this parser does not know."""


class Slot(NamedTuple):
    """One instruction: `%<id>_<register> = opcode rest`; `register` is None where the result is not a register.

    A tuple, since a schedule has hundreds of thousands.
    """

    register: str | None  # physical: s0, p3, v12, vm1
    result: str  # the compiler's own name of the result; FIFO pops refer to it
    opcode: str
    rest: str  # operands, predicates and named arguments, as text
    source: tuple[str, int] | None = None  # base name and line of the Python expression that it comes from


class Bundle(NamedTuple):
    """The slots that issue in one cycle, and where the bundle stands."""

    address: int
    line: int
    label: str  # "", LB, PF, …
    depth: int  # region nesting; 0 where not printed
    slots: tuple[Slot, ...]
    regions: tuple[int, ...]  # regions that start here: targets of sbr.rel
    opens_region: bool  # one of them has bundles of its own
    ends: tuple[int, ...]  # regions that end here and began at an earlier bundle


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One buffer of the program: `size_bytes` in `space` (vmem, smem, sflag, hbm …)."""

    name: str
    space: str
    shape: str  # without its layout: bf16[2,256,128]
    size_bytes: int
    tag: str
    fixed: bool  # at a fixed address, outside the program's own scoped memory
    offset_bytes: int  # where it is fixed; 0 otherwise


@dataclass(frozen=True, kw_only=True)
class Dump:
    """One HLO op's final schedule."""

    path: Path
    bundles: tuple[Bundle, ...]
    region_address: dict[int, int] = field(default_factory=dict)


_NAMED_ARGUMENT = re.compile(r"/\*([a-zA-Z_0-9]+)=\*/")
# Which results of sdivrem are popped; perhaps behind where it comes from.
_DIVISION_RESULT = re.compile(r"/\* (?:(loc\(\"[^\"]*\":[^()\"]*\)) :: )?(k(?:Div|Rem|DivAndRem)) \*/")
# Directly behind a slot, alone in its comment; elsewhere (a phi's operands, bounds checks) it says something else.
_SOURCE = re.compile(r"/\* loc\(\"(?:[^\"]*/)?([^\"/\0]*)\":(\d+):[^()\"]*\) \*/")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*: ([> ]*)\{(.*)\}\s*$", re.S)
_SLOT = re.compile(r"(?:^|;; )%(\w+) = ([a-zA-Z][\w.\-]*)([^;]*(?:;(?!;)[^;]*)*)")
_REGISTER = re.compile(r"(?:s|p|vm|v)\d+$")
_REGION = re.compile(r"Start(/End empty)? region (\d+)")
_REGION_START = re.compile(r"Start region (\d+)")
_REGION_END = re.compile(r"End region (\d+)")
_ALLOCATION_LINE = re.compile(r"#allocation.*")
_ALLOCATION = re.compile(
    r"^\s*#(allocation\w+) \[shape = '([^'{]*)[^']*', space=(\w+), size = (0x[0-9a-f]+|0),?(.*)\]\s*$"
)
_TAG = re.compile(r"tag = '([^']*)'")
_OFFSET = re.compile(r"offset = (0x[0-9a-f]+|0)\b")
_HEADER = re.compile(r"^(= control target key (start|end)|[A-Z]{2}: [a-z ]+|)$")


def parse_dump(path: Path) -> Dump:
    """The bundles of one dump, addresses checked to be consecutive.

    Raises ParseError for any line that is neither the key, a bundle nor part of a bundle's comments.
    """
    bundles: list[Bundle] = []
    for line, code, comment in _statements(path):
        match = _BUNDLE.match(code)
        if match is None:
            raise ParseError(f"{path.name}:{line}: not a bundle: {code.strip()[:120]!r}")
        address, label, nesting, body = match.groups()
        if int(address, 16) != len(bundles):
            raise ParseError(f"{path.name}:{line}: address {address} where {len(bundles):#x} was expected")
        bundles.append(
            Bundle(
                address=len(bundles),
                line=line,
                label=label or "",
                depth=nesting.count(">"),
                slots=_slots(path, line, body),
                regions=tuple(int(region) for _, region in _REGION.findall(comment)) if comment else (),
                opens_region="Start region" in comment,
                ends=_earlier_ends(comment) if comment else (),
            )
        )
    if not bundles:
        raise ParseError(f"{path.name}: no bundles")
    region_address = {region: bundle.address for bundle in bundles for region in bundle.regions}
    return Dump(path=path, bundles=tuple(bundles), region_address=region_address)


def _earlier_ends(comment: str) -> tuple[int, ...]:
    started = set(_REGION_START.findall(comment))
    return tuple(int(region) for region in _REGION_END.findall(comment) if region not in started)


def _slots(path: Path, line: int, body: str) -> tuple[Slot, ...]:
    text = " ".join(body.split())
    found = _SLOT.findall(text)
    if len(found) != (text.count(";;") + 1 if text else 0):
        wrong = next((part.strip() for part in text.split(";;") if not _SLOT.fullmatch(part.strip())), text)
        raise ParseError(f"{path.name}:{line}: not an instruction: {wrong[:120]!r}")
    slots = []
    for name, opcode, rest in found:
        result, _, register = name.rpartition("_")
        if not result or not _is_register(register):
            result, register = name, None
        source = None
        if "\0" in rest:  # code, file, line, code
            parts = rest.split("\0")
            rest, source = " ".join("".join(parts[::3]).split()), (parts[1], int(parts[2]))
        slots.append(Slot(register, result, opcode, rest.strip(), source))
    return tuple(slots)


@cache
def _is_register(name: str) -> bool:
    return _REGISTER.match(name) is not None


def _division(match: re.Match[str]) -> str:
    return f", kind={match[2]}" + (f" /* {match[1]} */" if match[1] else "")


def _statements(path: Path) -> list[tuple[int, str, str]]:
    """(line, code, comments) of each bundle, comments (which nest and span lines) taken out of the code."""
    statements: list[tuple[int, list[str], list[str]]] = []
    depth = 0
    for number, raw in enumerate(path.read_text().splitlines(), 1):
        text = raw
        if "/*" in raw:
            names = _NAMED_ARGUMENT.split(raw)  # each second one is a name
            names[1::2] = [f" {name}=" for name in names[1::2]]
            text = _DIVISION_RESULT.sub(_division, "".join(names))
            if "/* loc(" in text:
                text = _SOURCE.sub("\0\\1\0\\2\0", text)
        if depth == 0:
            if _HEADER.match(text.strip()):
                continue
            statements.append((number, [], []))
            if "/*" not in text and "*/" not in text:
                statements[-1][1].append(text)
                continue
        try:
            code, comment, depth = split_comments(text, depth)
        except ParseError as error:
            raise ParseError(f"{path.name}:{number}: {error}") from None
        statements[-1][1].append(code)
        statements[-1][2].append(comment)
    if depth:
        raise ParseError(f"{path.name}: a comment never ends")
    return [(number, "".join(code), " ".join(comment)) for number, code, comment in statements]


def split_comments(text: str, depth: int = 0) -> tuple[str, str, int]:
    """(code, comments, depth behind it) of text that begins `depth` comments deep: they nest. Raises ParseError."""
    code: list[str] = []
    comments: list[str] = []
    for piece in re.split(r"(/\*|\*/)", text):
        if piece in ("/*", "*/"):
            depth += 1 if piece == "/*" else -1
            if depth < 0:
                raise ParseError("a comment ends that never began")
        else:
            (comments if depth else code).append(piece)
    return "".join(code), " ".join(comments), depth


def parse_allocations(path: Path) -> dict[str, Allocation]:
    """Name → buffer, from `*-pre-finalize-registers-and-allocations.txt`."""
    allocations = {}
    text = path.read_text()
    for found in _ALLOCATION_LINE.finditer(text):
        if text[text.rfind("\n", 0, found.start()) + 1 : found.start()].strip():
            continue  # an instruction's operand
        match = _ALLOCATION.match(found[0])
        if match is None:
            number = text.count("\n", 0, found.end()) + 1
            raise ParseError(f"{path.name}:{number}: not an allocation: {found[0].strip()[:120]!r}")
        name, shape, space, size, rest = match.groups()
        tag, offset = _TAG.search(rest), _OFFSET.search(rest)
        allocations[name] = Allocation(
            name=name,
            space=space,
            shape=shape,
            size_bytes=int(size, 16),
            tag=tag[1] if tag else "",
            fixed="fixed_abs" in rest,
            offset_bytes=int(offset[1], 16) if offset else 0,
        )
    return allocations


def parse_utilization(path: Path) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """(slots of each unit in a bundle, slots used in each bundle), from `*-per-bundle-utilization.txt`.

    Units are the file's columns: MXU or MATMUL and MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE,
    VSTORE:SPILL, SALU.
    """
    lines = path.read_text().splitlines()
    try:
        start = next(i for i, line in enumerate(lines) if line.startswith("== CAP"))
        units = [name.strip() for name in lines[start + 1].split(",")]
        capacity = dict(zip(units, map(int, lines[start + 2].split()), strict=True))
        first = next(i for i, line in enumerate(lines) if line.startswith("== UTIL")) + 1
        rows = [tuple(map(int, line.split())) for line in lines[first:] if line.strip()]
    except (StopIteration, IndexError, ValueError) as error:
        raise ParseError(f"{path.name}: not a per-bundle utilisation table: {error}") from error
    if any(len(row) != len(units) for row in rows):
        raise ParseError(f"{path.name}: a row does not have {len(units)} columns")
    return capacity, rows
