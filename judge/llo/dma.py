"""When asynchronous copies complete. Two rules, kept apart:

`calibrated`, which the judge uses: all copies take turns on one path to HBM. A copy holds it for its bytes ÷ bandwidth,
and at least for a fixed time for each contiguous run, since short runs waste it; its flag is raised a latency later.
`compiler`, libtpu's own, for comparison with its static profile: no copy delays another; a wait ends when the last copy
started on the flag would, had it moved all the bytes that are waited for.
"""

from collections import Counter
from dataclasses import dataclass

from judge.llo.machine import DmaCost, Machine


@dataclass(frozen=True, kw_only=True)
class DmaRecord:
    """One copy: times in cycles since the program's start."""

    kind: str
    issue_cycle: float
    transfer_cycle: float  # its turn on the shared path begins
    transferred_cycle: float  # and ends
    done_cycle: float  # its flag is raised
    size_bytes: int
    flag: int
    vmem_row: int | None = None  # where in VMEM it begins, in rows of 512 bytes; None where it touches none


class CopyError(Exception):
    """A wait that no copy satisfies."""


class DmaEngine:
    """Copies under way, and the sync flags that they raise by their size in granules."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.flags: Counter[int] = Counter()
        self.pending: dict[int, list[tuple[float, int]]] = {}  # flag → (raised at, granules), in order
        self._costs = machine.dma
        self._granule_bytes = machine.granule_bytes
        self._is_compiler = machine.rule == "compiler"
        self._path_free = 0.0
        self._last: dict[int, tuple[float, DmaCost]] = {}

    def start(self, kind: str, granules: int, runs: int, flag: int, now: float) -> tuple[float, float, float]:
        """Starts a copy of `runs` contiguous runs at `now`: (its turn on the path begins, ends, its flag is raised)."""
        cost = self._costs[kind]
        size_bytes = granules * self._granule_bytes
        if self._is_compiler:
            begin, end = now, now + size_bytes / cost.bytes_per_cycle
            self._last[flag] = now, cost
        else:
            begin = self._path_free if self._path_free > now else now
            own, least = size_bytes / cost.bytes_per_cycle, runs * cost.run_cycles
            end = self._path_free = begin + (own if own > least else least)
        done = end + cost.latency_cycles
        waiting = self.pending.get(flag)
        if waiting is None:
            waiting = self.pending[flag] = []
        waiting.append((done, granules))
        if len(waiting) > 1 and waiting[-2][0] > done:
            waiting.sort()
        return begin, end, done

    def read(self, flag: int, now: float) -> int:
        waiting = self.pending.get(flag)
        while waiting and waiting[0][0] <= now:
            self.flags[flag] += waiting.pop(0)[1]
        return self.flags[flag]

    def wait(self, flag: int, count: int, now: float) -> float:
        """Time at which the flag has reached `count`: now, or when the copies it needs are done."""
        self.read(flag, now)
        waiting = self.pending.get(flag, [])
        if self._is_compiler and flag in self._last and (waiting or count > 0):
            issued, cost = self._last[flag]
            now = max(now, issued + cost.latency_cycles + count * self.machine.granule_bytes / cost.bytes_per_cycle)
            self.read(flag, now)
        while self.flags[flag] < count:
            if not waiting:
                raise CopyError(f"deadlock: sync flag {flag} is {self.flags[flag]}, waited for {count}, no copy due")
            done, granules = waiting.pop(0)
            now = now if self._is_compiler else max(now, done)
            self.flags[flag] += granules
        return now
