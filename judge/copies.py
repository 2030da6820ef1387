"""Memory of a followed kernel, and which parts of it copies under way touch."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from judge import jax_shims
from judge.races import place_of


class Broken(Exception):
    """FAIL_RACE: what was done, and where."""


class Boxes:
    """Regions of one buffer that copies under way touch."""

    def __init__(self, dimensions: int) -> None:
        self.live = 0
        self._count = 0
        self._low = np.empty((16, dimensions), np.int64)
        self._high = np.empty((16, dimensions), np.int64)
        self._is_live = np.zeros(16, bool)
        self._places: list[Any] = []

    def add(self, low: Sequence[int], high: Sequence[int], place: Any) -> int:
        """Returns the number by which the region is removed."""
        if not self.live:
            self._count = 0
            self._places.clear()
        if self._count == len(self._low):
            self._low, self._high = (np.concatenate([a, np.empty_like(a)]) for a in (self._low, self._high))
            self._is_live = np.concatenate([self._is_live, np.zeros_like(self._is_live)])
        number = self._count
        self._low[number], self._high[number], self._is_live[number] = low, high, True
        self._places.append(place)
        self._count += 1
        self.live += 1
        return number

    def remove(self, number: int) -> None:
        self._is_live[number] = False
        self.live -= 1

    def overlapping(self, low: Sequence[int], high: Sequence[int]) -> int | None:
        """The number of a region that overlaps this one, or None."""
        n = self._count
        hit = ((self._low[:n] < high) & (self._high[:n] > low)).all(axis=1) & self._is_live[:n]
        return int(hit.argmax()) if hit.any() else None

    def place(self, number: int) -> Any:
        """Where the copy was started that touches the region."""
        return self._places[number]


class Buffer:
    """Memory behind a reference; `values`: its elements in order where they are scalars, None where one is unknown."""

    def __init__(self, aval: Any, values: np.ndarray | None = None) -> None:
        self.shape = tuple(int(n) for n in aval.shape)
        self.space = jax_shims.memory_space(aval)
        self.itemsize = int(getattr(aval.dtype, "itemsize", 4))
        self.steps = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        self.values: list[Any] | None = None
        if values is not None and values.dtype.kind in "iub":
            self.values = values.reshape(-1).tolist()
        elif "smem" in self.space:
            self.values = [None] * math.prod(self.shape)
        self.brought, self.taken = Boxes(len(self.shape)), Boxes(len(self.shape))  # written, read by copies

    def touch(self, low: Sequence[int], high: Sequence[int], place: Any, *, writes: bool) -> None:
        """Raises Broken where a copy under way touches the same memory."""
        for boxes in (self.brought, self.taken) if writes else (self.brought,):
            other = boxes.overlapping(low, high) if boxes.live else None
            if other is not None:
                what = "writes" if writes else "reads"
                box = ", ".join(f"{a}:{b}" for a, b in zip(low, high, strict=True))
                told = f"{what} {self.space}{list(self.shape)}[{box}]"
                by = place_of(boxes.place(other))
                raise Broken(f"{place_of(place)} {told}, which the copy of {by}, not waited for, touches")

    def at(self, low: Sequence[int]) -> int:
        return sum(a * b for a, b in zip(low, self.steps, strict=True))


class Found(NamedTuple):
    """Where a reference lies for the scalars at hand."""

    buffer: Buffer
    low: list[int]
    high: list[int]  # one past the highest element along each axis
    known: bool  # whether every index is
    size_bytes: int  # of what is seen, which is what a wait counts


class UnderWay(NamedTuple):
    """A copy that may not be over, and by which numbers its regions are removed."""

    size_bytes: int
    taken: Buffer
    taken_number: int
    brought: Buffer
    brought_number: int
    place: Any


class Semaphore:
    """Copies under way on one semaphore. They may end in any order: a wait says how many bytes have come, not which."""

    def __init__(self) -> None:
        self.owed_bytes = 0  # started and not waited for
        self._copies: list[UnderWay] = []
        self._largest_bytes = 0
        self.last: Any = None  # where the last copy was started

    def add(self, copy: UnderWay) -> None:
        self._copies.append(copy)
        self._largest_bytes = max(self._largest_bytes, copy.size_bytes)
        self.owed_bytes += copy.size_bytes
        self.last = copy.place

    def wait(self, size_bytes: int) -> None:
        """Ends the copies that are surely over: those larger than all that is still owed, or all with nothing owed."""
        self.owed_bytes -= size_bytes
        if not self._is_over(self._largest_bytes):
            return
        left = []
        for copy in self._copies:
            if self._is_over(copy.size_bytes):
                copy.taken.taken.remove(copy.taken_number)
                copy.brought.brought.remove(copy.brought_number)
            else:
                left.append(copy)
        self._copies = left
        self._largest_bytes = max((copy.size_bytes for copy in left), default=0)

    def _is_over(self, size_bytes: int) -> bool:
        return self.owed_bytes <= 0 or size_bytes > self.owed_bytes


class Copies:
    """Copies under way, by semaphore."""

    def __init__(self) -> None:
        self._semaphores: dict[tuple[int, int], Semaphore] = {}

    def start(self, source: Found, target: Found, flag: tuple[int, int], place: Any) -> None:
        """Raises Broken where another copy under way touches the same memory."""
        (taken, low, high, known, _), (brought, to_low, to_high, to_known, size_bytes) = source, target
        taken.touch(low, high, place, writes=False)
        brought.touch(to_low, to_high, place, writes=True)
        if brought.values is not None:
            _copy_values(taken, low, high, brought, to_low, to_high, known and to_known)
        numbers = taken.taken.add(low, high, place), brought.brought.add(to_low, to_high, place)
        copy = UnderWay(size_bytes, taken, numbers[0], brought, numbers[1], place)
        self._semaphores.setdefault(flag, Semaphore()).add(copy)

    def wait(self, flag: tuple[int, int], size_bytes: int, place: Any) -> None:
        """Raises Broken where more bytes are waited for than were started."""
        semaphore = self._semaphores.setdefault(flag, Semaphore())
        semaphore.wait(size_bytes)
        if semaphore.owed_bytes < 0:
            raise Broken(f"{place_of(place)} waits for a copy that was not started")

    def check_end(self) -> None:
        for semaphore in self._semaphores.values():
            if semaphore.owed_bytes:
                raise Broken(f"nobody waits for the copy of {place_of(semaphore.last)}")


def _copy_values(
    taken: Buffer, low: Sequence[int], high: Sequence[int], brought: Buffer, to: Sequence[int], end: Any, known: bool
) -> None:
    """Scalars that a copy brings; unknown where the two regions are not alike."""
    assert brought.values is not None
    axes = [[h - n for n, h in zip(a, b, strict=True) if h - n != 1] for a, b in ((low, high), (to, end))]
    if not known or taken.values is None or axes[0] != axes[1]:
        brought.values = [None] * len(brought.values)
        return
    sources, targets = (
        itertools.product(*(range(n, h) for n, h in zip(a, b, strict=True))) for a, b in ((low, high), (to, end))
    )
    for source, target in zip(sources, targets, strict=True):
        brought.values[brought.at(target)] = taken.values[taken.at(source)]
