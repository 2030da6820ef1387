#!/usr/bin/env python3
"""Does the installed libtpu still say what judge/data/llo/<chip>.toml says it says? Derives its numbers again.

    .venv/bin/python benchmarks/machine_probe.py [--chip v5e …] [--fresh] [--json]

libtpu's static profile lists the critical path of a kernel, a line a bundle with the cycles left to the end. Where a
line reads the result of the one before, the difference of the two is that result's latency, or more; between two
instructions of one unit, the unit's cadence, or more; from the last push of weights to the vmatmul that takes them, the
push's latency, or more. So the least that the corpus shows, often enough, is compared with the committed number. From a
transpose's last row to its first pop it is the latency or less, since a pop may take a row of an earlier one: there the
most counts. Between a copy and its wait it is the copy's time. `--fresh` compiles the corpus anew, for a new libtpu.
Exit code 1 where a number disagrees. What no critical path shows is not derived: the latency and spacing of the MXU's
results, where lines that follow one another are of other vmatmuls; whole kernels check those (benchmarks/fidelity.py).
A number whose `path` differs from its `value` is held to the former: its source says why whole kernels fit the latter.
`inferred` and `measured` numbers are not the compiler's and are not looked at.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))


from benchmarks.corpus.build import OUT  # noqa: E402
from judge.llo.issue import dtype_class, opcode_class, push_name, staging, xlu_variant  # noqa: E402
from judge.llo.machine import DATA  # noqa: E402

CHIPS = ("v5e", "v6e", "tpu7x")
BUILD = PROJECT / "benchmarks" / "corpus" / "build.py"
ENOUGH = 4  # a difference seen less often may be a coincidence of other delays
_LINE = re.compile(r"^Length to end: (\d+), (?:%(\w+) = )?(\S+)\s?(.*)$")
_UNIT = re.compile(r"\b(xlu\d|mxu\d)")
_SIZE = re.compile(r"/\*size_in_granules=\*/(\d+)")
_NAME = re.compile(r"%(\w+)")
_GRANULE_BYTES = 32
_XLU = ("reduce", "index_reduce", "permute")
_XLU_CADENCE = 16  # the longest between rows: a pop so soon takes a row of an earlier transpose
_AT_MOST = ("transpose", "transpose_b16", "transpose_binary", "transpose_xlu2")  # latencies that a path may shorten


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One committed number and what the critical paths say; `seen`: how often the derived value occurred."""

    chip: str
    name: str
    committed: float
    derived: float | None
    seen: int

    @property
    def verdict(self) -> str:
        if self.derived is None:
            return "not seen"
        return "agrees" if abs(self.derived / self.committed - 1) < 0.03 else "DISAGREES"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=CHIPS, help="default: all")
    parser.add_argument("--fresh", action="store_true", help="compile the corpus anew")
    parser.add_argument("--json", action="store_true", help="also one JSON array as the last line")
    arguments = parser.parse_args()
    findings: list[Finding] = []
    for chip in arguments.chip or CHIPS:
        command = [sys.executable, str(BUILD), "--chip", chip, "--group", "micro", "--profile"]
        subprocess.run([*command, *([] if arguments.fresh else ["--missing"])], check=True, stdout=sys.stderr)
        findings += probe(chip, sorted((OUT / chip).glob("*/profile/*_critical_path.txt")))
    for one in findings:
        derived = "-" if one.derived is None else f"{one.derived:g}"
        print(f"{one.chip:6} {one.name:36} {one.committed:8g} {derived:>8} {one.seen:6}  {one.verdict}")
    print(f"{Counter(one.verdict for one in findings)}")
    if arguments.json:
        print(json.dumps([asdict(one) | {"verdict": one.verdict} for one in findings]))
    return 1 if any(one.verdict == "DISAGREES" for one in findings) else 0


def probe(chip: str, paths: Iterable[Path]) -> list[Finding]:
    """Every number of the chip's file that the compiler gave, against these critical paths."""
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    copies: dict[str, dict[int, int]] = defaultdict(dict)
    for path in paths:
        # Only where copies come one at a time is the way from a copy to its wait that copy's time.
        collect(path.read_text().splitlines(), seen, copies if path.name.startswith("serial_") else defaultdict(dict))
    data = tomllib.loads((DATA / f"{chip}.toml").read_text())
    findings = []
    for table in ("latency", "cadence"):
        for name, number in data[table].items():
            found = seen.get(f"{table}.{name}", Counter())
            often = [cycles for cycles, count in found.items() if count >= ENOUGH]
            bound = max if table == "latency" and name in _AT_MOST else min
            derived = bound(often) if often else None
            committed = number.get("path", number["value"])  # `path`: where whole kernels fit another value
            findings.append(
                Finding(
                    chip=chip,
                    name=f"{table}.{name}",
                    committed=committed,
                    derived=derived,
                    seen=found[derived] if derived is not None else 0,
                )
            )
    for kind, cost in data["dma"]["compiler"].items():
        findings += _copy_findings(chip, kind, cost, copies.get(kind, {}))
    return findings


def collect(lines: Iterable[str], seen: dict[str, Counter[int]], copies: dict[str, dict[int, int]]) -> None:
    """Adds the differences of one critical path: number's name → cycles → how often, and copies by size."""
    parsed = [(int(m[1]), m[2] or "", m[3], m[4]) for line in lines if (m := _LINE.match(line))]
    for (left, result, opcode, rest), (left_next, _, following, operands) in itertools.pairwise(parsed):
        cycles = left - left_next
        if opcode.startswith("dma.") and following == "dma.done.wait" and (size := _SIZE.search(rest)):
            of_kind, bytes_moved = copies[opcode.removeprefix("dma.")], int(size[1]) * _GRANULE_BYTES
            of_kind[bytes_moved] = min(cycles, of_kind.get(bytes_moved, cycles))
        elif result and result in _NAME.findall(operands):
            for name in _latency_names(opcode):
                seen[f"latency.{name}"][cycles] += 1
        for name in _cadence_names(opcode, following):
            seen[f"cadence.{name}"][cycles] += 1
        for name in _unit_names(opcode, following):
            if name.removeprefix("latency.") not in _AT_MOST or cycles > _XLU_CADENCE:
                seen[name][cycles] += 1


def _latency_names(opcode: str) -> Iterator[str]:
    kind = opcode_class(opcode)
    if kind is None or kind in (
        "none",
        "matmul",
        "matprep",
        "push",
        "pushprep",
        "transpose",
        "transpose_pop",
        "mxu_pop",
    ):
        return
    unit = _UNIT.search(opcode)
    name = "rotate" if opcode.startswith("vrot.lane") else "pop" if kind == "xlu_pop" else kind
    yield f"{name}_{unit[1]}" if unit and unit[1] == "xlu2" and name in ("permute", "rotate") else name


def _cadence_names(opcode: str, following: str) -> Iterator[str]:
    units = _UNIT.search(opcode), _UNIT.search(following)
    kinds = opcode_class(opcode), opcode_class(following)
    if units[0] and units[1] and units[0][1] == units[1][1] and kinds[0] in _XLU and kinds[1] in _XLU:
        yield f"{kinds[0]}_to_{kinds[1]}"


def _unit_names(opcode: str, following: str) -> Iterator[str]:
    """What two neighbours on one unit say, neither of which reads the other's result."""
    units = _UNIT.search(opcode), _UNIT.search(following)
    if not units[0] or not units[1] or units[0][1] != units[1][1]:
        return
    kinds = opcode_class(opcode), opcode_class(following)
    if kinds == ("push", "matmul") and ".vlgmr" in following and staging(opcode) == staging(following):
        yield f"latency.{push_name(opcode)}"
    elif kinds == ("matmul", "matmul"):
        yield f"cadence.matmul_{dtype_class(opcode)}"
    elif kinds == ("push", "push") and "matpush." in opcode:  # one by one, not in pairs
        yield f"cadence.{push_name(opcode)}"
    elif kinds[0] == "transpose":
        variant = xlu_variant(opcode, "transpose")
        if kinds[1] == "transpose_pop" and opcode.endswith(".end"):
            yield f"latency.{variant}" + ("_xlu2" if units[0][1] == "xlu2" and variant == "transpose" else "")
        elif kinds[1] == "transpose":
            yield f"cadence.{variant}_to_transpose"


def _copy_findings(chip: str, kind: str, cost: dict[str, float], by_size: dict[int, int]) -> list[Finding]:
    """A line through the smallest and the largest copy: latency and bytes a cycle."""
    latency = rate = None
    if len(by_size) >= 2 and cost["confidence"] == "compiler":
        small, large = min(by_size), max(by_size)
        if by_size[large] > by_size[small]:
            rate = (large - small) / (by_size[large] - by_size[small])
            latency = by_size[small] - small / rate
    names = (("latency_cycles", latency), ("bytes_per_cycle", rate))
    return [
        Finding(chip=chip, name=f"dma.{kind}.{name}", committed=cost[name], derived=value, seen=len(by_size))
        for name, value in names
    ]


if __name__ == "__main__":
    sys.exit(main())
