"""Where in a buffer a reference lies, also where it is seen as another shape or type.

A chain of slices is a box with steps. From the first reshape or bitcast on, what it touches is one run of elements in
the order of memory: exact where whole rows are taken one after the other, as copies do; else a little more than is
touched, never less.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from judge.copies import Broken, Buffer, Found
from judge.races import place_of

if TYPE_CHECKING:
    from judge.follow import Routine

MOST_FOUND = 1000  # places that a region remembers
Part = tuple[bool, int, int | None, int]  # is a slice, numbers of the values that start it and size it, its step


class Unfollowable(Exception):
    """The scalars do not say what the program does."""


class Run:
    """Elements of a region of `shape`, in row-major order, seen through steps: first element, (count, step) by axis."""

    def __init__(self, shape: Sequence[int], itemsize: int) -> None:
        self._itemsize = self._own_itemsize = itemsize
        self._row = shape[-1] if shape else 1
        self.first = 0
        self.axes = _row_major(shape)

    @property
    def count(self) -> int:
        """Elements that are seen."""
        return math.prod(count for count, _ in self.axes)

    def bitcast(self, itemsize: int) -> None:
        """Neighbours along the second-minor axis become one element, or one becomes several."""
        shape = [count for count, _ in self.axes]
        if itemsize != self._itemsize:
            self._must(self.first == 0 and self.axes == _row_major(shape) and len(shape) > 1)
            shape[-2] = shape[-2] * self._itemsize // itemsize
            self._row = shape[-1]
        self._itemsize, self.axes = itemsize, _row_major(shape)

    def reshape(self, shape: Sequence[int]) -> None:
        self._must(self.axes == _row_major([count for count, _ in self.axes]))
        self.axes = _row_major(shape)

    def index(self, parts: Sequence[tuple[bool, int, int, int]]) -> int | None:
        """Takes (is a slice, start, size, step) of each axis; returns an element out of bounds where one is."""
        left = []
        for (is_slice, start, size, step), (count, stride) in zip(parts, self.axes, strict=True):
            last = start + (size - 1) * step
            if size > 0 and not (start >= 0 and last < count):
                return start if start < 0 else last
            self.first += start * stride
            if is_slice:
                left.append((size, stride * step))
        self.axes = left
        return None

    def bounds(self) -> tuple[int, int]:
        """First element of the region that is touched, and one past the last."""
        last = self.first + sum((count - 1) * step for count, step in self.axes)
        if self._itemsize == self._own_itemsize:
            return self.first, last + 1
        rows, end = self.first // self._row, last // self._row + 1
        if self._itemsize > self._own_itemsize:
            times = self._itemsize // self._own_itemsize
            return rows * times * self._row, end * times * self._row
        parts = self._own_itemsize // self._itemsize
        return rows // parts * self._row, -(-end // parts) * self._row

    @property
    def size_bytes(self) -> int:
        return self.count * self._itemsize

    def _must(self, holds: bool) -> None:
        if not holds:
            raise NotARun


class NotARun(Exception):
    """What is seen is no run of elements: the whole region has to stand for it."""


def _row_major(shape: Sequence[int]) -> list[tuple[int, int]]:
    return [(int(count), math.prod(shape[axis + 1 :])) for axis, count in enumerate(shape)]


def box_of(first: int, end: int, shape: Sequence[int]) -> list[tuple[int, int]]:
    """(lowest, one past the highest) along each axis of the smallest box around a run of a region's elements."""
    box: list[Any] = []
    for axis in range(len(shape)):
        step = math.prod(shape[axis + 1 :])
        low, high = first // step, (end - 1) // step
        if low != high:
            return [*box, (low, high + 1), *((0, n) for n in shape[axis + 1 :])]
        box.append((low, low + 1))
        first, end = first - low * step, end - low * step
    return box


class Region:
    """A reference with its indices, as the jaxpr has them: where it lies follows from the scalars."""

    def __init__(self, routine: "Routine", ref: Any, transforms: Any, place: Any) -> None:
        from jax._src.state.indexing import NDIndexer

        self.slot, self.place = routine.slot(ref), place
        self.indexers: list[list[Part]] = []
        self.seen: list[tuple[str, Any]] = []  # from the first reshape or bitcast on
        for transform in transforms or ():
            if not isinstance(transform, NDIndexer):
                self.seen.append(_other_view(transform))
            elif self.seen:
                self.seen.append(("index", _parts(routine, transform)))
            else:
                self.indexers.append(_parts(routine, transform))
        parts = [part for indexer in self.indexers for part in indexer]
        parts += [part for kind, what in self.seen if kind == "index" for part in what]
        self._slots = [slot for _, start, size, _ in parts for slot in (start, size) if slot is not None]
        self._found: dict[Any, Found] = {}

    def find(self, env: list[Any]) -> Found:
        """Where it is for these values. Raises Broken."""
        buffer: Buffer = env[self.slot]
        key = (buffer, *(env[slot] if isinstance(env[slot], int) else None for slot in self._slots))
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._locate(env, buffer)
            if len(self._found) > MOST_FOUND:
                self._found.clear()
        return found

    def _locate(self, env: list[Any], buffer: Buffer) -> Found:
        low, high = [0] * len(buffer.shape), list(buffer.shape)
        strides, open_axes, known = [1] * len(low), list(range(len(low))), True
        for indexer in self.indexers:
            left = []
            for axis, (is_slice, start_slot, size_slot, stride) in zip(open_axes, indexer, strict=True):
                start, size = env[start_slot], 1 if size_slot is None else env[size_slot]
                if is_slice:
                    left.append(axis)
                if not isinstance(start, int) or not isinstance(size, int):
                    known = False
                    continue
                extent, last = -(-(high[axis] - low[axis]) // strides[axis]), start + (size - 1) * stride
                if size > 0 and not (start >= 0 and last < extent):
                    self._out_of_bounds(start if start < 0 else last, extent, buffer)
                low[axis] += start * strides[axis]
                strides[axis] *= stride
                high[axis] = low[axis] + max(0, (size - 1) * strides[axis] + 1)
            open_axes = left
        size_bytes = buffer.itemsize * math.prod(h - n for n, h in zip(low, high, strict=True))
        if self.seen:
            size_bytes, known = self._look(env, buffer, (low, high, strides, open_axes), known)
        return Found(buffer, low, high, known, size_bytes)

    def _look(self, env: list[Any], buffer: Buffer, box: tuple[list[int], ...], known: bool) -> tuple[int, bool]:
        """Narrows (low, high, …) to what the other views leave of it; returns its bytes and whether it is known."""
        low, high, strides, axes = box
        shape = [-(-(high[axis] - low[axis]) // strides[axis]) for axis in axes]
        run = Run(shape, buffer.itemsize)
        try:
            for kind, what in self.seen:
                if kind == "bitcast":
                    run.bitcast(what)
                elif kind == "reshape":
                    run.reshape(what)
                else:
                    parts = [(s, env[start], 1 if size is None else env[size], step) for s, start, size, step in what]
                    if not all(isinstance(start, int) and isinstance(size, int) for _, start, size, _ in parts):
                        return run.size_bytes, False
                    outside = run.index(parts)
                    if outside is not None:
                        self._out_of_bounds(outside, "what is seen", buffer)
        except NotARun:
            return run.size_bytes, False
        if not run.count:
            return 0, known
        for axis, (first, end) in zip(axes, box_of(*run.bounds(), shape), strict=True):
            start = low[axis]
            low[axis], high[axis] = start + first * strides[axis], start + (end - 1) * strides[axis] + 1
        return run.size_bytes, False  # no scalar is read through another view

    def _out_of_bounds(self, element: int, extent: Any, buffer: Buffer) -> None:
        where = f"of an axis of {extent} in {buffer.space}{list(buffer.shape)}"
        raise Broken(f"{place_of(self.place)} goes out of bounds: element {element} {where}")


def _parts(routine: "Routine", indexer: Any) -> list[Part]:
    from jax.experimental.pallas import Slice

    return [
        (True, routine.slot(i.start), routine.slot(i.size), i.stride)
        if isinstance(i, Slice)
        else (False, routine.slot(i), None, 1)
        for i in indexer.indices
    ]


def _other_view(transform: Any) -> tuple[str, Any]:
    from jax._src.state import types

    if isinstance(transform, types.BitcastTransform):
        return "bitcast", np.dtype(transform.dtype).itemsize
    if isinstance(transform, types.ReshapeTransform):
        return "reshape", transform.shape
    raise Unfollowable(f"a reference seen through {type(transform).__name__}")
