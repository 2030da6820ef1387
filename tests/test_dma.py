"""judge/llo/dma.py: the two rules of the copy engine, kept apart."""

import dataclasses

import pytest

from judge.llo.dma import CopyError, DmaEngine
from judge.llo.machine import DmaCost, load_machine

COST = DmaCost(latency_cycles=100, bytes_per_cycle=32, run_cycles=20)
CALIBRATED, COMPILER = (
    dataclasses.replace(load_machine("v5e", rule), dma={"hbm_to_vmem": COST}) for rule in ("calibrated", "compiler")
)


def start(engine, granules, *, flag=0, now=0, runs=1):
    return engine.start("hbm_to_vmem", granules, runs, flag, now)


def test_copies_take_turns_on_the_path_and_their_latencies_overlap():
    engine = DmaEngine(CALIBRATED)
    assert start(engine, 64) == (0, 64, 164)  # 64 granules of 32 bytes at 32 bytes a cycle
    assert start(engine, 64, flag=1, now=10) == (64, 128, 228)
    assert start(engine, 64, now=500) == (500, 564, 664)


def test_short_runs_hold_the_path_for_longer_than_their_bytes():
    assert start(DmaEngine(CALIBRATED), 64, runs=2) == (0, 64, 164)  # 2 × 20 < 64
    assert start(DmaEngine(CALIBRATED), 64, runs=16) == (0, 320, 420)


def test_a_flag_counts_granules_and_a_wait_ends_with_the_copy_that_reaches_its_count():
    engine = DmaEngine(CALIBRATED)
    start(engine, 64)
    start(engine, 32)
    assert engine.read(0, 163) == 0 and engine.read(0, 164) == 64
    assert engine.wait(0, 96, 170) == 64 + 32 + 100
    assert engine.wait(0, 96, 300) == 300  # a wait takes nothing off the flag


def test_a_wait_that_nothing_satisfies_is_a_deadlock():
    engine = DmaEngine(CALIBRATED)
    start(engine, 64)
    with pytest.raises(CopyError, match="deadlock: sync flag 0 is 64, waited for 65, no copy due"):
        engine.wait(0, 65, 0)
    with pytest.raises(CopyError, match="sync flag 7 is 0"):
        DmaEngine(COMPILER).wait(7, 1, 0)


def test_the_compilers_rule_has_no_contention_and_no_runs():
    engine = DmaEngine(COMPILER)
    assert start(engine, 64, runs=16) == (0, 64, 164)
    assert start(engine, 64, flag=1, now=10) == (10, 74, 174)


def test_the_compilers_rule_ends_a_wait_by_the_last_copy_on_the_flag():
    engine = DmaEngine(COMPILER)
    start(engine, 64)
    start(engine, 32, now=50)
    assert engine.wait(0, 96, 60) == 50 + 100 + 96  # as if it had moved all 96 granules
    assert engine.wait(0, 96, 1000) == 1000
