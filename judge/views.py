"""References seen as another shape or another type, for jax's strict interpreter, which knows slices alone.

    ref.at[slot].bitcast(uint32).reshape(rows, lanes)[pl.ds(3, n, stride=8), :]

reads part of one buffer, in another order and as wider words. What a chain of such steps touches is found by sending
the numbers of the buffer's smallest units through it. Where that is a box of the buffer (a start, a step and a count
along each axis), the interpreter accesses the box, so that races and bounds are checked on what is really touched, and
the values are put in order here. What is no box has the smallest one around it stand for it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class View:
    """A box of a region, relative to it, and where in the box each unit of the view lies."""

    box: tuple[tuple[int, int, int], ...]  # (start, count, step) along each axis
    order: np.ndarray  # view shape + (units an element,): number of the unit in the box
    dtype: Any
    unit: Any  # unsigned integers of the narrowest element in the chain

    def read(self, values: np.ndarray) -> np.ndarray:
        """The view of what the box holds."""
        units = np.ascontiguousarray(values).reshape(-1).view(self.unit)
        taken = np.ascontiguousarray(units[self.order])
        return taken.view(self.dtype).reshape(self.order.shape[:-1])

    def written(self, values: np.ndarray, new: np.ndarray) -> np.ndarray:
        """What the box holds once the view is `new`."""
        result = np.array(values, order="C")
        parts = np.ascontiguousarray(new).reshape(-1).view(self.unit).reshape(self.order.shape)
        result.reshape(-1).view(self.unit)[self.order] = parts
        return result


def is_plain(transforms: Any) -> bool:
    """Whether there are slices and indices alone."""
    from jax._src.state import indexing

    return all(isinstance(step, indexing.NDIndexer) for step in transforms or ())


@functools.lru_cache(maxsize=4096)
def view_of(shape: tuple[int, ...], dtype: Any, steps: tuple[Any, ...]) -> View:
    """The view that `steps` make of a region; a step is ("bitcast", dtype), ("reshape", shape) or ("index", …).

    Raises IndexError out of bounds.
    """
    widths = [np.dtype(d).itemsize for d in (dtype, *(what for kind, what in steps if kind == "bitcast"))]
    unit, per = min(widths), np.dtype(dtype).itemsize // min(widths)
    numbers = np.arange(math.prod(shape) * per, dtype=np.int64).reshape(*shape, per)
    for kind, what in steps:
        if kind == "bitcast":
            numbers, dtype = _bitcast(numbers, np.dtype(what).itemsize // unit), what
        elif kind == "reshape":
            numbers = numbers.reshape(*what, numbers.shape[-1])
        else:
            numbers = _indexed(numbers, what)
    box, order = _box(numbers, shape, per)
    return View(box, order, np.dtype(dtype), np.dtype(f"u{unit}"))


def _indexed(numbers: np.ndarray, parts: tuple[Any, ...]) -> np.ndarray:
    """Raises IndexError out of bounds, where NumPy would cut a slice off."""
    for part, size in zip(parts, numbers.shape, strict=False):
        if isinstance(part, tuple) and range(*part) and range(*part)[-1] >= size:
            raise IndexError(f"out-of-bounds access: [{part[0]}:{part[1]}:{part[2]}] of an axis of {size}")
    return numbers[(*(slice(*part) if isinstance(part, tuple) else part for part in parts), ...)]


def _bitcast(numbers: np.ndarray, per: int) -> np.ndarray:
    """Elements of `per` units: neighbours along the second-minor axis become one wider element, or it several."""
    *outer, rows, lanes, had = numbers.shape
    units = np.moveaxis(numbers, -1, -2).reshape(*outer, rows * had, lanes)
    return np.moveaxis(units.reshape(*outer, rows * had // per, per, lanes), -2, -1)


def _box(numbers: np.ndarray, shape: tuple[int, ...], per: int) -> tuple[tuple[tuple[int, int, int], ...], np.ndarray]:
    axes = [np.unique(axis) for axis in np.unravel_index(np.unique(numbers // per), shape)]
    steps = [int(a[1] - a[0]) if len(a) > 1 else 1 for a in axes]
    arithmetic = all(np.array_equal(a, a[0] + step * np.arange(len(a))) for a, step in zip(axes, steps, strict=True))
    if not arithmetic or math.prod(map(len, axes)) != np.unique(numbers // per).size:
        axes = [np.arange(a[0], a[-1] + 1) for a in axes]
        steps = [1] * len(axes)
    inside = np.zeros(math.prod(shape) * per, np.int64)
    box = np.arange(math.prod(shape) * per).reshape(*shape, per)[np.ix_(*axes, np.arange(per))]
    inside[box.reshape(-1)] = np.arange(box.size)
    bounds = tuple((int(a[0]), len(a), step) for a, step in zip(axes, steps, strict=True))
    return bounds, inside[numbers]


def patch() -> None:
    """Symptom without: "'BitcastTransform' object has no attribute 'indices'" from the strict interpreter."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    for name, make in (("get", _getting), ("store", _storing), ("swap", _swapping)):
        plain = getattr(interpreter, name).__wrapped__
        setattr(interpreter, name, interpreter.fail_on_exception(make(interpreter, plain)))


def _getting(interpreter: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def get(token: Any, *where: Any, **more: Any) -> Any:
        *place, transforms = where[:5]
        if is_plain(transforms):
            return plain(token, *where, **more)
        view, box = _located(interpreter, place, transforms)
        token, values = plain(token, *place, box, *where[5:], **more)
        return token, view.read(np.asarray(values))

    return get


def _storing(interpreter: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def store(token: Any, *where: Any, **more: Any) -> Any:
        *place, transforms, new = where[:6]
        if is_plain(transforms):
            return plain(token, *where, **more)
        view, box = _located(interpreter, place, transforms)
        values = _content(interpreter, place)[tuple(_slices(box[0]))]
        return plain(token, *place, box, view.written(values, np.asarray(new)), *where[6:], **more)

    return store


def _swapping(interpreter: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    def swap(token: Any, *where: Any, **more: Any) -> Any:
        *place, transforms, new, mask = where[:7]
        if is_plain(transforms):
            return plain(token, *where, **more)
        if mask is not None:
            raise NotImplementedError("a masked store to a reference that is seen as another shape or type")
        view, box = _located(interpreter, place, transforms)
        values = _content(interpreter, place)[tuple(_slices(box[0]))]
        token, before = plain(token, *place, box, view.written(values, np.asarray(new)), None, *where[7:], **more)
        return token, view.read(np.asarray(before))

    return swap


def _content(interpreter: Any, place: list[Any]) -> np.ndarray:
    """The whole buffer at (device, core, memory space, number)."""
    device, core, space, number = map(int, place)
    name = interpreter.TPU_MEMORY_SPACE_NAMES[space]
    core = interpreter._local_core_id_or_zero_if_hbm(core, name)
    content: np.ndarray = interpreter._get_shared_memory().mem[(name, number, device, core)].content
    return content


def _located(interpreter: Any, place: list[Any], transforms: Any) -> tuple[View, tuple[Any, ...]]:
    """The view, and its box of the buffer as the one transform that the interpreter is given."""
    import jax
    from jax._src.pallas.mosaic.interpret import utils
    from jax._src.state import indexing
    from jax.experimental import pallas

    content = _content(interpreter, place)
    transforms = jax.tree.map(int, transforms)
    plain = next(i for i, step in enumerate(transforms) if not isinstance(step, indexing.NDIndexer))
    region = [*utils.to_range(transforms[:plain])]
    region += [slice(0, n, 1) for n in content.shape[len(region) :]]
    shape = tuple(len(range(r.start, r.stop, r.step)) for r in region if isinstance(r, slice))
    view = view_of(shape, content.dtype, tuple(_key(step) for step in transforms[plain:]))
    inner = iter(view.box)
    indices: list[Any] = []
    for part in region:
        if isinstance(part, slice):
            start, count, step = next(inner)
            indices.append(pallas.Slice(part.start + start * part.step, count, part.step * step))
        else:
            indices.append(part)
    return view, (indexing.NDIndexer(tuple(indices), content.shape, ()),)


def _slices(box: Any) -> list[Any]:
    return [i if isinstance(i, int) else slice(i.start, i.start + i.size * i.stride, i.stride) for i in box.indices]


def _key(step: Any) -> tuple[str, Any]:
    from jax._src.pallas.mosaic.interpret import utils
    from jax._src.state import indexing, types

    if isinstance(step, types.BitcastTransform):
        return "bitcast", np.dtype(step.dtype)
    if isinstance(step, types.ReshapeTransform):
        return "reshape", tuple(step.shape)
    if not isinstance(step, indexing.NDIndexer):
        raise NotImplementedError(f"a reference seen through {type(step).__name__}")
    parts = utils.to_range((step,))
    return "index", tuple((p.start, p.stop, p.step) if isinstance(p, slice) else p for p in parts)
