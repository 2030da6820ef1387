"""tests/cheats/: what is decided on a file's text at once, one each of a few other classes, and an honest kernel.

`benchmarks/integrity.py` judges all of them.
"""

import json

import pytest

from tests import cheats

EARLY = [case for case in cheats.cheats() if case.is_early]
LATE = [case for case in cheats.cheats() if not case.is_early]
# The first in its file, where the stages after the text decide; more take minutes.
CLASSES = ("cycle_model", "precision", "race", "skipped_work")
ONE_EACH = [case for group in CLASSES for case in [c for c in LATE if c.group == group][:1]]
HONEST = {"copies by hand", "a grid as large as the batch"}


def named(case: cheats.Case) -> str:
    return f"{case.group}-{case.name}"


def test_the_suite_is_as_large_as_it_says():
    assert len(cheats.cheats()) >= 60
    assert len(cheats.load("honest")) >= 27
    assert sum(case.base == "rpa" for case in cheats.cheats()) > len(cheats.cheats()) / 2
    assert all(case.status != "PASS" for case in cheats.cheats())
    assert all(case.status == "PASS" for case in cheats.load("honest"))
    assert all(case.reason for case in cheats.cheats())


@pytest.mark.parametrize("case", EARLY, ids=named)
def test_cheat_that_the_text_shows(case):
    assert not case.problem(case.judge())


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_EACH, ids=named)
def test_cheat(case):
    assert not case.problem(case.judge())


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cheats.load("honest") if c.name in HONEST], ids=named)
def test_honest_kernel(case):
    assert not case.problem(case.judge())


def test_what_a_kernel_says_of_its_cost_changes_nothing(passed, judge_file, variant):
    """CostEstimate and get_tiling_meta are for people and for XLA; the figures come from the schedule."""
    call = "        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),\n"
    flattering = "cost_estimate=pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=1)"
    text = variant((call, f"{call}        {flattering},\n"), ('(BLOCK, COLUMNS), "grid": (', '(1, 1), "grid": (0 * '))
    done = judge_file(text, "--chip", "v5e", "--json")
    one, other = (json.loads(d.out.splitlines()[-1])["workloads"] for d in (passed, done))
    assert one == other
