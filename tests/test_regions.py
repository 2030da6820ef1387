"""judge/regions.py: what other views of a reference touch is never less than the truth, and exact for runs of rows."""

import numpy as np
import pytest

from judge.regions import NotARun, Run, box_of
from judge.views import view_of

CASES = {
    "row of pages laid end to end": ((3, 4, 2, 8), 2, [("reshape", (12, 2, 8)), ("index", [(False, 7, 1, 1)])]),
    "rows of pages laid end to end": ((3, 4, 2, 8), 2, [("reshape", (12, 2, 8)), ("index", [(True, 3, 4, 1)])]),
    "rows of a head": (
        (5, 4, 2, 8),
        2,
        [("bitcast", 4), ("reshape", (20, 8)), ("index", [(True, 3, 5, 4), (True, 0, 8, 1)])],
    ),
    "narrower": ((6, 8), 4, [("bitcast", 2), ("reshape", (3, 4, 8)), ("index", [(False, 1, 1, 1)])]),
    "half a word": ((6, 8), 4, [("bitcast", 2), ("index", [(False, 5, 1, 1), (True, 0, 8, 1)])]),
}
EXACT = [name for name in CASES if name != "rows of a head"]


def run_of(name):
    shape, itemsize, steps = CASES[name]
    run = Run(shape, itemsize)
    for kind, what in steps:
        if kind == "index":
            parts = [*what, *((True, 0, n, 1) for n, _ in run.axes[len(what) :])]
            assert run.index(parts) is None
        else:
            getattr(run, kind)(what)
    return run


def touched(name):
    """The box that views.py finds: low and one past high along each axis."""
    shape, itemsize, steps = CASES[name]
    unsigned = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
    known = {"bitcast": lambda w: unsigned[w], "reshape": tuple}
    keyed = [
        (
            kind,
            tuple((s, s + n * t, t) if is_slice else s for is_slice, s, n, t in what)
            if kind == "index"
            else known[kind](what),
        )
        for kind, what in steps
    ]
    view = view_of(shape, unsigned[itemsize], tuple(keyed))
    return [
        (start, start + (count - 1) * step + 1) for start, count, step in view.box
    ], view.order.size * view.unit.itemsize


@pytest.mark.parametrize("name", CASES)
def test_never_less_than_what_is_touched(name):
    box, size = touched(name)
    run = run_of(name)
    mine = box_of(*run.bounds(), CASES[name][0])
    assert all(low <= a and b <= high for (low, high), (a, b) in zip(mine, box, strict=True))
    assert run.size_bytes == size


@pytest.mark.parametrize("name", EXACT)
def test_exact_for_rows_one_after_the_other(name):
    assert box_of(*run_of(name).bounds(), CASES[name][0]) == touched(name)[0]


def test_a_part_seen_as_another_shape_is_no_run():
    run = Run((4, 8), 4)
    run.index([(True, 0, 4, 1), (True, 0, 4, 1)])
    with pytest.raises(NotARun):
        run.reshape((16,))


def test_out_of_bounds_names_the_element():
    run = Run((4, 8), 4)
    run.reshape((32,))
    assert run.index([(True, 30, 4, 1)]) == 33
    assert run.index([(False, -1, 1, 1)]) == -1
