"""judge/decide.py, the only keep-or-discard rule: it fails closed."""

import dataclasses
import math

import pytest

from judge.decide import (
    COPY_RESOLUTION,
    FAILURES,
    ISSUE_RESOLUTION,
    PASS,
    REGRESSION,
    RULES,
    STATUSES,
    decide,
    model_resolution,
)
from judge.roofline import Figures

FIGURES = Figures(
    score=5000.0,
    latency_ms=1.0,
    util_pct=50.0,
    mfu_pct=50.0,
    mbu_pct=10.0,
    bw_util_pct=20.0,
    tflops=100.0,
    regime="COMPUTE-BOUND",
)
CHAMPION = {"decode": 1.0, "prefill": 4.0}


def status(workload_ms, champion=CHAMPION, mode="model", candidate=FIGURES):
    return decide(candidate, workload_ms, champion, mode=mode).status


def faster(by: float, *, only: str | None = None):
    return {name: ms * (1 - by) if only in (None, name) else ms for name, ms in CHAMPION.items()}


def test_the_first_of_a_lineage_is_its_baseline():
    decision = decide(FIGURES, {"decode": 1.0}, None, mode="model")
    assert decision.status == PASS and "baseline" in decision.reason


@pytest.mark.parametrize("mode", RULES)
def test_a_clear_gain_is_kept_and_its_size_said(mode):
    decision = decide(FIGURES, faster(0.1), CHAMPION, mode=mode)
    assert decision.status == PASS
    assert "rises by 23.46 %" in decision.reason  # 1 / 0.9², the score's own measure


@pytest.mark.parametrize("mode", RULES)
def test_equal_or_slower_is_not_kept(mode):
    assert status(dict(CHAMPION), mode=mode) == REGRESSION
    assert status(faster(-0.001), mode=mode) == REGRESSION


@pytest.mark.parametrize("mode", RULES)
def test_a_win_needs_more_than_the_least_gain(mode):
    """The score goes with the square of time: a gain of g needs times shorter by 1 - 1 / √(1 + g)."""
    least = 1 - 1 / math.sqrt(1 + RULES[mode].min_gain)
    assert status(faster(least * 0.99), mode=mode) == REGRESSION
    assert status(faster(least * 1.01), mode=mode) == PASS


def test_what_wins_in_the_model_need_not_win_on_a_chip():
    assert status(faster(0.003), mode="model") == PASS
    assert status(faster(0.003), mode="chip") == REGRESSION


def test_a_gain_may_come_from_one_workload():
    assert status(faster(0.1, only="decode")) == PASS


@pytest.mark.parametrize("mode", RULES)
def test_one_workload_may_not_pay_for_another(mode):
    loss = RULES[mode].max_loss
    assert status({"decode": 0.5, "prefill": 4.0 * (1 + loss * 0.9)}, mode=mode) == PASS
    decision = decide(FIGURES, {"decode": 0.5, "prefill": 4.0 * (1 + loss * 1.1)}, CHAMPION, mode=mode)
    assert decision.status == REGRESSION
    assert decision.reason.startswith("prefill takes")


def test_the_worst_workload_is_named():
    decision = decide(FIGURES, {"decode": 1.2, "prefill": 4.4}, CHAMPION, mode="model")
    assert "decode takes 1.2 ms, 20.0 % more than the champion's 1 ms" in decision.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("champion", [CHAMPION, None])
def test_a_time_that_cannot_be_fails_closed(bad, champion):
    decision = decide(FIGURES, {"decode": bad, "prefill": 1.0}, champion, mode="model")
    assert decision.status == "FAIL_CRASH"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("champion", [CHAMPION, None])
def test_a_score_that_cannot_be_fails_closed(bad, champion):
    candidate = dataclasses.replace(FIGURES, score=bad)
    assert status(faster(0.5), champion, candidate=candidate) == "FAIL_CRASH"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_champion_that_cannot_be_is_never_beaten(bad):
    """A ledger that was edited by hand must not make everything a win, and no exception may end the loop."""
    decision = decide(FIGURES, faster(0.5), CHAMPION | {"prefill": bad}, mode="model")
    assert decision.status != PASS


@pytest.mark.parametrize("champion", [None, CHAMPION, {}])
def test_no_workload_is_no_win(champion):
    assert status({}, champion) != PASS


@pytest.mark.parametrize(
    "workload_ms", [{"decode": 0.1}, {"decode": 0.1, "prefill": 0.1, "mixed": 0.1}, {"decode": 0.1, "other": 0.1}]
)
def test_other_workloads_are_not_comparable(workload_ms):
    decision = decide(FIGURES, workload_ms, CHAMPION, mode="model")
    assert decision.status == REGRESSION and "not comparable" in decision.reason


def test_an_unknown_mode_is_an_error():
    with pytest.raises(KeyError):
        decide(FIGURES, faster(0.5), CHAMPION, mode="guess")


def test_scores_are_compared_as_numbers():
    """Not as text, where 999 is more than 1000, nor by a shell's redirection."""
    assert status({"decode": 9.0}, {"decode": 10.0}) == PASS
    assert status({"decode": 10.0}, {"decode": 9.0}) == REGRESSION


def test_many_small_wins_never_lose_what_was_won():
    """Only a strictly better time is ever kept, so that a sequence of verdicts cannot walk back."""
    champion, kept = {"decode": 1.0, "prefill": 4.0}, []
    for i in range(50):
        candidate = {name: ms * (0.995 if (i + k) % 3 else 1.004) for k, (name, ms) in enumerate(champion.items())}
        if status(candidate, champion) == PASS:
            champion = candidate
            kept.append(math.prod(champion.values()))
    assert len(kept) > 10 and kept == sorted(kept, reverse=True)


def test_every_status_is_listed():
    assert {PASS, REGRESSION, "FAIL_CRASH"} <= set(STATUSES)
    assert all(name.startswith("FAIL_") for name in FAILURES)


def test_the_models_resolution_lies_between_that_of_issue_and_that_of_copies():
    assert model_resolution([0.0, 0.0]) == pytest.approx(ISSUE_RESOLUTION)
    assert model_resolution([1.0]) == pytest.approx(COPY_RESOLUTION)
    assert model_resolution([0.0, 1.0]) == pytest.approx((ISSUE_RESOLUTION + COPY_RESOLUTION) / 2)
    assert model_resolution([7.0]) == model_resolution([1.0])  # never more than all of the time


@pytest.mark.parametrize(("by", "expected"), [(0.009, REGRESSION), (0.011, PASS)])
def test_a_gain_below_the_resolution_is_no_win(by, expected):
    assert decide(FIGURES, faster(by), CHAMPION, mode="model", resolution=0.01).status == expected
