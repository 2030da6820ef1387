"""judge/llo/dma.py: when copies are done and waits end, by each of the two rules."""

import dataclasses

import pytest

from judge.chips import CHIPS
from judge.llo.dma import CopyError, DmaEngine
from judge.llo.machine import DmaCost, Machine, load_machine

READ = DmaCost(latency_cycles=100, bytes_per_cycle=32, run_cycles=20)
MACHINE = dataclasses.replace(  # a granule of 32 bytes takes a cycle of the path
    load_machine("v5e"),
    granule_bytes=32,
    dma={
        "hbm_to_vmem": READ,
        "vmem_to_hbm": dataclasses.replace(READ, latency_cycles=300),
        "hbm_to_smem": DmaCost(latency_cycles=50, bytes_per_cycle=8),
    },
)
COMPILER = dataclasses.replace(MACHINE, rule="compiler")
KIND = "hbm_to_vmem"


@pytest.fixture
def engine() -> DmaEngine:
    return DmaEngine(MACHINE)


@pytest.fixture
def compiler() -> DmaEngine:
    return DmaEngine(COMPILER)


# --- calibrated: copies take turns ---


def test_a_copy_holds_the_path_for_its_bytes_and_is_done_a_latency_later(engine: DmaEngine) -> None:
    assert engine.start(KIND, 64, 1, flag=1, now=7) == (7, 7 + 64, 7 + 64 + 100)
    assert engine.wait(1, 64, now=8) == 171


def test_two_copies_take_turns_and_their_latencies_overlap(engine: DmaEngine) -> None:
    engine.start(KIND, 64, 1, flag=1, now=0)
    begin, end, done = engine.start(KIND, 64, 1, flag=2, now=1)
    assert (begin, end, done) == (64, 128, 128 + 100)
    assert engine.wait(2, 64, now=2) == 228  # not 2 × 164: the second moves before the first's flag is raised
    assert engine.wait(1, 64, now=228) == 228


def test_a_path_that_is_free_is_taken_at_once(engine: DmaEngine) -> None:
    engine.start(KIND, 64, 1, flag=1, now=0)
    assert engine.start(KIND, 64, 1, flag=2, now=64)[:2] == (64, 128)
    assert engine.start(KIND, 64, 1, flag=3, now=500)[:2] == (500, 564)


def test_all_kinds_share_the_path(engine: DmaEngine) -> None:
    engine.start("vmem_to_hbm", 64, 1, flag=1, now=0)
    assert engine.start(KIND, 64, 1, flag=2, now=0)[:2] == (64, 128)
    assert engine.start("hbm_to_smem", 1, 1, flag=3, now=0) == (128, 128 + 4, 132 + 50)


def test_turns_are_in_the_order_of_issue_whatever_the_sizes(engine: DmaEngine) -> None:
    sizes = (100, 30, 70)
    ends = [engine.start(KIND, granules, 1, flag=1, now=0)[1] for granules in sizes]
    assert ends == [100, 130, 200]


@pytest.mark.parametrize(
    ("granules", "runs", "cycles"),
    [
        (64, 1, 64),  # bytes
        (64, 3, 64),
        (64, 4, 80),  # 4 runs of 20
        (64, 64, 1280),
        (1, 1, 20),  # no copy holds the path for less than a run
        (19, 1, 20),
        (21, 1, 21),
    ],
)
def test_short_runs_waste_the_path(engine: DmaEngine, granules: int, runs: int, cycles: int) -> None:
    begin, end, done = engine.start(KIND, granules, runs, flag=1, now=0)
    assert (begin, end, done) == (0, cycles, cycles + 100)
    assert engine.start(KIND, 64, 1, flag=2, now=0)[0] == cycles


def test_runs_cost_nothing_where_the_machine_has_no_figure(engine: DmaEngine) -> None:
    assert engine.start("hbm_to_smem", 4, 1000, flag=1, now=0)[1] == 4 * 32 / 8


def test_many_small_copies_cost_more_than_one_of_the_same_bytes(engine: DmaEngine) -> None:
    for _ in range(64):
        engine.start(KIND, 1, 1, flag=1, now=0)
    assert engine.wait(1, 64, now=0) == 64 * 20 + 100


# --- flags, by either rule ---


@pytest.mark.parametrize("machine", [MACHINE, COMPILER])
def test_a_flag_counts_granules_of_copies_that_are_done(machine: Machine) -> None:
    engine = DmaEngine(machine)
    done = engine.start(KIND, 64, 1, flag=1, now=0)[2]
    assert engine.read(1, done - 1) == 0
    assert engine.read(1, done) == 64
    assert engine.read(1, done + 1) == 64  # once
    assert engine.read(2, done) == 0
    assert engine.pending[1] == []


@pytest.mark.parametrize("machine", [MACHINE, COMPILER])
def test_a_count_that_is_reached_ends_a_wait_at_once(machine: Machine) -> None:
    engine = DmaEngine(machine)
    engine.flags[1] = 3
    assert engine.wait(1, 3, now=9) == 9
    assert engine.wait(1, 0, now=10) == 10
    assert engine.wait(2, 0, now=11) == 11
    assert engine.flags[1] == 3  # the program takes the count off itself


@pytest.mark.parametrize("machine", [MACHINE, COMPILER])
@pytest.mark.parametrize(("flag", "count", "has"), [(1, 65, 64), (2, 1, 0), (3, 4, -2)])
def test_a_wait_that_no_copy_satisfies_is_a_deadlock(machine: Machine, flag: int, count: int, has: int) -> None:
    engine = DmaEngine(machine)
    engine.start(KIND, 64, 1, flag=1, now=0)
    engine.flags[3] = -2
    with pytest.raises(CopyError, match=f"^deadlock: sync flag {flag} is {has}, waited for {count}, no copy due$"):
        engine.wait(flag, count, now=0)


def test_a_wait_takes_the_copies_that_it_needs_and_no_more(engine: DmaEngine) -> None:
    for _ in range(3):
        engine.start(KIND, 64, 1, flag=1, now=0)
    assert engine.wait(1, 64, now=0) == 64 + 100
    assert (engine.flags[1], len(engine.pending[1])) == (64, 2)
    assert engine.wait(1, 128, now=164) == 128 + 100
    assert engine.wait(1, 129, now=228) == 192 + 100  # a part of the third's granules needs all of it
    assert (engine.flags[1], engine.pending[1]) == (192, [])


def test_copies_on_one_flag_count_in_the_order_in_which_they_are_done(engine: DmaEngine) -> None:
    """A write started first raises the flag after a read that was started later: its latency is longer."""
    slow = engine.start("vmem_to_hbm", 10, 1, flag=1, now=0)[2]
    fast = engine.start(KIND, 64, 1, flag=1, now=0)[2]
    assert fast < slow
    assert engine.read(1, fast) == 64
    assert engine.wait(1, 74, now=fast) == slow


def test_a_wait_counts_what_arrived_before_it(engine: DmaEngine) -> None:
    engine.start(KIND, 64, 1, flag=1, now=0)
    engine.start(KIND, 64, 1, flag=1, now=1000)
    engine.flags[1] -= 64  # taken off ahead of the copy
    assert engine.wait(1, 0, now=1000) == 1000
    assert engine.wait(1, 64, now=1000) == 1064 + 100


# --- compiler: every copy alone ---


def test_no_copy_delays_another(compiler: DmaEngine) -> None:
    assert compiler.start(KIND, 64, 1, flag=1, now=0) == (0, 64, 164)
    assert compiler.start(KIND, 64, 1, flag=2, now=1) == (1, 65, 165)
    assert compiler.wait(1, 64, now=2) == 164
    assert compiler.wait(2, 64, now=164) == 165


def test_runs_cost_nothing_by_the_compilers_rule(compiler: DmaEngine) -> None:
    assert compiler.start(KIND, 64, 64, flag=1, now=0)[1] == 64
    assert compiler.start(KIND, 1, 1, flag=2, now=0)[1] == 1


def test_the_last_copy_on_the_flag_decides_with_all_the_bytes_waited_for(compiler: DmaEngine) -> None:
    compiler.start(KIND, 64, 1, flag=1, now=0)
    compiler.start(KIND, 64, 1, flag=1, now=10)
    assert compiler.wait(1, 128, now=11) == 10 + 100 + 128
    assert (compiler.flags[1], compiler.pending[1]) == (128, [])


def test_the_last_copy_decides_even_where_an_earlier_one_is_slower(compiler: DmaEngine) -> None:
    slow = compiler.start("vmem_to_hbm", 64, 1, flag=1, now=0)[2]
    compiler.start(KIND, 1, 1, flag=1, now=10)
    assert compiler.wait(1, 65, now=11) == 10 + 100 + 65 < slow


def test_a_wait_behind_completion_ends_at_once_by_the_compilers_rule(compiler: DmaEngine) -> None:
    compiler.start(KIND, 64, 1, flag=1, now=0)
    assert compiler.wait(1, 64, now=5000) == 5000


@pytest.mark.parametrize("chip", CHIPS)
def test_one_copy_alone_takes_its_bytes_and_its_latency_on_every_chip(chip: str) -> None:
    for rule in ("calibrated", "compiler"):
        machine = load_machine(chip, rule)
        for kind, cost in machine.dma.items():
            engine = DmaEngine(machine)
            granules = 1 << 16  # long enough for a run's cost not to show
            size_bytes = granules * machine.granule_bytes
            engine.start(kind, granules, 1, flag=1, now=0)
            expected = cost.latency_cycles + size_bytes / cost.bytes_per_cycle
            assert engine.wait(1, granules, now=0) == pytest.approx(expected, rel=1e-12)
