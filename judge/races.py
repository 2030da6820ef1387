"""Which two accesses of one buffer no wait orders: the strict interpreter's detector, fast enough for whole kernels.

Two accesses race where they overlap, one of them writes, and neither's vector clock is before the other's. Takes the
place of jax's own detector, which compares each access with all before it one by one: tens of thousands of row copies
would take it hours. Here the accesses of a buffer are rows of arrays, compared all at once. `slice(None)` overlaps
everything that is not empty.
"""

from typing import Any

import numpy as np

_ENDLESS = np.iinfo(np.int64).max


class Accesses:
    """What one buffer has seen, of one kind: boxes, clocks, places; grows by doubling."""

    def __init__(self, dimensions: int, clock_size: int) -> None:
        self.count = 0
        self._low = np.empty((16, dimensions), np.int64)
        self._high = np.empty((16, dimensions), np.int64)
        self._clocks = np.empty((16, clock_size), np.int32)
        self.places: list[str] = []

    def add(self, low: np.ndarray, high: np.ndarray, clock: np.ndarray, place: str) -> None:
        if self.count == len(self._low):
            self._low, self._high, self._clocks = (
                np.concatenate([array, np.empty_like(array)]) for array in (self._low, self._high, self._clocks)
            )
        self._low[self.count], self._high[self.count], self._clocks[self.count] = low, high, clock
        self.places.append(place)
        self.count += 1

    def unordered(self, low: np.ndarray, high: np.ndarray, clock: np.ndarray) -> int | None:
        """An access that overlaps the box and is neither before nor after the clock, or None."""
        n = self.count
        overlap = ((self._low[:n] < high) & (low < self._high[:n])).all(axis=1)
        candidates = np.flatnonzero(overlap)
        clocks = self._clocks[candidates]
        before, after = (clocks <= clock).all(axis=1), (clocks >= clock).all(axis=1)
        racing = candidates[before == after]  # both: the same clock, which orders nothing
        return int(racing[0]) if racing.size else None


class Detector:
    """Has the interface of jax's RaceDetectionState; `first` tells the first race, for a message."""

    def __init__(self, num_cores: int) -> None:
        self.num_cores = num_cores
        self.races_found = False
        self.first = ""
        self._seen: dict[Any, tuple[Accesses, Accesses]] = {}  # buffer → reads, writes

    def check_read(self, device: Any, core: Any, clock: Any, buffer: Any, box: Any, source_info: Any = None) -> None:
        """Records a read; a race with an earlier write."""
        self._check(clock, buffer, box, source_info, is_write=False)

    def check_write(self, device: Any, core: Any, clock: Any, buffer: Any, box: Any, source_info: Any = None) -> None:
        """Records a write; a race with an earlier write or read."""
        self._check(clock, buffer, box, source_info, is_write=True)

    def _check(self, clock: Any, buffer: Any, box: Any, source_info: Any, *, is_write: bool) -> None:
        lowest, highest = _bounds(box)
        dimensions, clock = max(len(lowest), 1), np.asarray(clock)
        if buffer not in self._seen:
            self._seen[buffer] = (Accesses(dimensions, clock.size), Accesses(dimensions, clock.size))
        reads, writes = self._seen[buffer]
        width = reads._low.shape[1]
        low, high = _fit(lowest, width, 0), _fit(highest, width, _ENDLESS)
        place = place_of(source_info)
        for others, kind in ((writes, "write"), (reads, "read")) if is_write else ((writes, "write"),):
            other = others.unordered(low, high, clock)
            if other is not None and not self.races_found:
                self.races_found = True
                self.first = f"{'write' if is_write else 'read'} at {place} and {kind} at {others.places[other]}"
        (writes if is_write else reads).add(low, high, clock.copy(), place)


def _bounds(box: Any) -> tuple[list[int], list[int]]:
    """The lowest element of a box along each axis, and the one past its highest; strides are taken as filled."""
    low, high = [], []
    for part in box:
        if isinstance(part, slice):
            low.append(0 if part.start is None else int(part.start))
            high.append(_ENDLESS if part.stop is None else int(part.stop))
        else:
            low.append(int(part))
            high.append(int(part) + 1)
    return low, high


def _fit(values: list[int], width: int, fill: int) -> np.ndarray:
    """Axes that a box does not name are whole; those beyond the first box's are left out, which overlaps more."""
    return np.array((values + [fill] * width)[:width], np.int64)


def place_of(source_info: Any) -> str:
    from jax._src import source_info_util

    frame = source_info_util.user_frame(source_info.traceback) if source_info is not None else None
    return "a block's own copy" if frame is None else f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.start_line}"
