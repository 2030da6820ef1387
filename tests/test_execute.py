"""judge/llo/execute.py and translate.py: hand-written schedules to the cycle, golden dumps of every chip."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from judge.chips import CHIPS
from judge.llo.execute import Execution, ExecutionError, execute
from judge.llo.issue import CAUSES, passed_over
from judge.llo.machine import DmaCost, Machine, load_machine
from judge.llo.module import module_cost
from judge.llo.parse import parse_allocations, parse_dump, parse_utilization
from judge.llo.translate import Untranslatable, split_arguments

GOLDEN = Path(__file__).resolve().parent / "golden"
KINDS = ("hbm_to_vmem", "vmem_to_hbm", "hbm_to_smem", "vmem_to_smem", "hbm_to_hbm")
V5E = load_machine("v5e")
MACHINE = Machine(
    chip="made up",
    rule="calibrated",
    clock_hz=1e9,
    granule_bytes=32,
    hbm_pointer_bytes=32,
    branch_delay_bundles=4,
    merges_empty_bundles=False,
    wait_cycles=6,
    pushes_pairs=False,
    latencies=dict.fromkeys(V5E.latencies, 1),  # results are there at once: test_issue.py has the others
    cadences=dict.fromkeys(V5E.cadences, 1),
    dma={kind: DmaCost(latency_cycles=100, bytes_per_cycle=32) for kind in KINDS},
    ici=V5E.ici,
)
MERGING = dataclasses.replace(MACHINE, branch_delay_bundles=6, merges_empty_bundles=True)
ALLOCATIONS = """
  #allocation0 [shape = 'f32[8,128]', space=vmem, size = 0x1000, scoped, tag = 'buffer']
  #allocation1 [shape = 's32[1]', space=sflag, size = 0x4, scoped, tag = 'a flag']
  #allocation2 [shape = 's32[1]', space=sflag, size = 0x4, scoped, tag = 'another flag']
  #allocation3 [shape = 's32[128]', space=smem, size = 0x200, scoped, tag = 'prefetched']
  #allocation4 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'core index']
"""
OPERAND = "{ %s1_s0 = inlined_call_operand.hbm [shape: s32[64], index: 0, kind: input, shape index: {}] }"


def copy(flag: int = 1, *, kind: str = "hbm_to_vmem", size: object = 16, guard: str = "") -> str:
    source, target = kind.split("_to_")
    operand = {"hbm": "%s1_s0", "vmem": "[#allocation0]", "smem": "[#allocation3]"}
    return (
        f"{{ %90 = dma.{kind} [thread:$0] {guard} /*{source}=*/{operand[source]}, /*size_in_granules=*/{size}, "
        f"/*{target}=*/{operand[target]}, /*dst_syncflagno=*/[#allocation{flag}] }}"
    )


def wait(flag: int = 1, count: int = 16) -> list[str]:
    return [
        f"{{ %91 = dma.done.wait [#allocation{flag}], {count} }}",
        f"{{ %92 = vsyncadd [#allocation{flag}], {2**32 - count} }}",
    ]


@pytest.fixture
def run(tmp_path):
    """Runs bundles, each `[label] [>] { slots } comments`, on a made-up machine; returns the Execution."""

    def run(bundles: list[str], words: dict[int, np.ndarray] | None = None, machine: Machine = MACHINE) -> Execution:
        lines = []
        for address, bundle in enumerate(bundles):
            before, brace, code = bundle.partition("{")
            label = before.replace(">", "").strip()
            lines.append(f"{address:#x} {label} : {'> ' * before.count('>')}{brace}{code}".replace("0x0 ", "0 ", 1))
        path = tmp_path / "1-op-03-final_bundles.txt"
        path.write_text("\n".join(lines) + "\n")
        (tmp_path / "allocations.txt").write_text(ALLOCATIONS)
        return execute(parse_dump(path), parse_allocations(tmp_path / "allocations.txt"), words or {}, machine)

    return run


# --- time ---


def test_every_bundle_costs_a_cycle(run):
    assert run(["{}"] * 7).cycles == 7
    vectors = "{ %v1_v0 = vld [vmem:[#allocation0] sm:$0xff]  ;;  %v2_v1 = vadd.f32 %v1_v0, %v1_v0 }"
    assert run([vectors] * 3).cycles == 3


def test_a_copy_takes_its_bytes_over_bandwidth_and_then_its_latency(run):
    done = run([OPERAND, copy(), *wait(), "{}"])
    # issued at 1, 512 bytes at 32 a cycle, latency 100: done at 117. The wait ends 6 cycles on, two bundles follow.
    assert [(dma.issue_cycle, dma.done_cycle, dma.size_bytes) for dma in done.dmas] == [(1, 117, 512)]
    assert done.cycles == 117 + 6 + 2
    assert done.dma_wait_cycles == 117 + 5 - 2
    assert (done.dma_count, done.hbm_read_bytes, done.hbm_written_bytes) == (1, 512, 0)


def test_a_wait_behind_completion_costs_its_bundle_alone(run):
    done = run([OPERAND, copy(), *["{}"] * 150, *wait()])
    assert done.cycles == 2 + 150 + 1 + 1
    assert done.dma_wait_cycles == 0


def test_what_shares_a_bundle_with_a_wait_happens_when_the_wait_ends(run):
    machine = dataclasses.replace(MACHINE, wait_cycles=1)
    first, follows, waits = copy(1), copy(2)[2:-2].replace("%90", "%93"), wait(1)
    for bundle in (f"{{ {waits[0][2:-2]}  ;;  {follows} }}", f"{{ {follows}  ;;  {waits[0][2:-2]} }}"):
        done = run([OPERAND, first, bundle, waits[1], *wait(2)], machine=machine)
        assert [dma.issue_cycle for dma in done.dmas] == [1, 117]  # the first is done at 117, which ends the wait
        assert done.cycles == 117 + 16 + 100 + 2
    flag = run([OPERAND, first, f"{{ {waits[0][2:-2]}  ;;  {waits[1][2:-2]} }}"], machine=machine)
    assert flag.cycles == 117 + 1  # the count is taken off behind the wait, in either order
    off = f"{{ %91 = dma.done.wait (%p3_p1), [#allocation1], 16  ;;  {follows} }}"
    never = "{ %p3_p1 = scmp.eq.s32.totalorder 0, 1 }"
    assert [dma.issue_cycle for dma in run([OPERAND, never, off, *wait(2)], machine=machine).dmas] == [2]


def test_copies_take_turns_on_the_path_whatever_their_flags(run):
    done = run([OPERAND, copy(1), copy(2), *wait(2), *wait(1)])
    assert [dma.done_cycle for dma in done.dmas] == [117, 133]  # 17 + 16 + 100
    assert done.cycles == 133 + 6 + 1 + 1 + 1  # the first was done long before its wait


def test_two_copies_on_one_flag_add_up(run):
    done = run([OPERAND, copy(1), copy(1, size=32), *wait(1, 48)])
    assert done.dmas[-1].done_cycle == 17 + 32 + 100
    assert done.cycles == 149 + 6 + 1


def test_a_flag_waited_for_in_parts(run):
    done = run([OPERAND, copy(1), copy(1), *wait(1, 16), *wait(1, 16)])
    assert done.cycles == max(117 + 6 + 1, 133) + 6 + 1


@pytest.mark.parametrize(
    ("kind", "read", "written"),
    [("hbm_to_vmem", 512, 0), ("vmem_to_hbm", 0, 512), ("hbm_to_smem", 512, 0), ("vmem_to_smem", 0, 0)],
)
def test_bytes_moved_by_kind(run, kind, read, written):
    done = run([OPERAND, copy(kind=kind), *wait()])
    assert (done.hbm_read_bytes, done.hbm_written_bytes) == (read, written)
    assert done.dmas[0].kind == kind


def test_a_copy_within_hbm_reads_and_writes(run):
    general = (
        "{ %9 = dma.general /*src=*/%s1_s0, /*size_in_granules=*/16, /*dst=*/%s1_s0, "
        "/*dst_syncflagno=*/[#allocation1] }"
    )
    done = run([OPERAND, general, *wait()])
    assert (done.hbm_read_bytes, done.hbm_written_bytes) == (512, 512)


def test_kinds_have_costs_of_their_own(run):
    slow = MACHINE.dma | {"vmem_to_hbm": DmaCost(latency_cycles=1000, bytes_per_cycle=8)}
    done = run([OPERAND, copy(kind="vmem_to_hbm"), *wait()], machine=dataclasses.replace(MACHINE, dma=slow))
    assert done.dmas[0].done_cycle == 1 + 64 + 1000


def test_twice_gives_the_identical_time(run):
    machine = dataclasses.replace(MACHINE, dma={k: DmaCost(latency_cycles=1 / 3, bytes_per_cycle=0.7) for k in KINDS})
    program = [OPERAND, copy(1), copy(2, size=33), *wait(2, 33), *wait(1)]
    first, second = run(program, machine=machine), run(program, machine=machine)
    assert first == second and first.cycles.hex() == second.cycles.hex()
    done = first.dmas[1].done_cycle
    assert [copied.done_cycle.hex() for copied in first.dmas] == [copied.done_cycle.hex() for copied in second.dmas]
    assert done == pytest.approx(1 + (512 + 1056) / 0.7 + 1 / 3) and done != int(done)
    assert first.cycles == math.ceil(done) + 6 + 1 + 1 + 1  # bundles issue in whole cycles


def test_each_rule_has_its_own_end_of_a_wait(run):
    """The compiler's: copies do not take turns, and the last on a flag decides."""
    compiler = dataclasses.replace(MACHINE, rule="compiler")
    one_each = [OPERAND, copy(1), copy(2), *wait(2), *wait(1)]
    assert [copied.done_cycle for copied in run(one_each, machine=compiler).dmas] == [117, 118]
    assert run(one_each, machine=compiler).cycles == 118 + 6 + 1 + 1 + 1
    assert run(one_each).cycles == 133 + 6 + 1 + 1 + 1
    both_on_one = [OPERAND, copy(1), copy(1, size=4), *wait(1, 20)]
    assert run(both_on_one, machine=compiler).cycles == 2 + 20 + 100 + 6 + 1
    assert run(both_on_one).cycles == 1 + 20 + 100 + 6 + 1


@pytest.mark.parametrize("cycles", [1, 6])
def test_a_flag_is_seen_the_machines_cycles_after_it_was_raised(run, cycles):
    machine = dataclasses.replace(MACHINE, wait_cycles=cycles)
    assert run([OPERAND, copy(), *wait()], machine=machine).cycles == 117 + cycles + 1
    assert run([OPERAND, copy(), *["{}"] * 150, *wait()], machine=machine).cycles == 2 + 150 + 1 + 1
    just = [OPERAND, copy(), *["{}"] * (117 + 2 - 2), *wait()]  # issues two cycles after
    assert run(just, machine=machine).cycles == 117 + max(2 + 1, cycles) + 1


@pytest.mark.parametrize(("steps", "runs"), [(1, 8), (2, 4), (3, 3), (8, 1), (16, 1)])
def test_a_strided_copy_has_a_run_for_every_so_many_steps(run, steps, runs):
    """128 granules are 4096 bytes, eight steps of 512."""
    strided = copy(size=128).replace(" }", f", /*src_stride=*/4, /*dst_stride=*/4, /*steps_per_stride=*/{steps} }}")
    costs = {kind: DmaCost(latency_cycles=100, bytes_per_cycle=1024, run_cycles=20) for kind in KINDS}
    done = run([OPERAND, strided, *wait(count=128)], machine=dataclasses.replace(MACHINE, dma=costs))
    assert done.dmas[0].done_cycle == 1 + max(4, runs * 20) + 100
    assert done.hbm_read_bytes == 4096


@pytest.mark.parametrize(("source", "target", "runs"), [(16, 18, 1), (32, 16, 8)])
def test_a_copy_without_gaps_in_hbm_is_one_run(run, source, target, runs):
    """Runs of one step, 512 bytes, are 16 granules."""
    strides = f", /*src_stride=*/{source}, /*dst_stride=*/{target}, /*steps_per_stride=*/1 }}"
    costs = {kind: DmaCost(latency_cycles=100, bytes_per_cycle=1024, run_cycles=20) for kind in KINDS}
    machine = dataclasses.replace(MACHINE, dma=costs)
    done = run([OPERAND, copy(size=128).replace(" }", strides), *wait(count=128)], machine=machine)
    assert done.dmas[0].done_cycle == 1 + max(4, runs * 20) + 100


def test_the_account_of_a_copy_and_of_its_wait(run):
    done = run([OPERAND, copy(1), copy(2), *wait(2), *wait(1)])
    assert [
        (dma.issue_cycle, dma.transfer_cycle, dma.transferred_cycle, dma.done_cycle, dma.flag) for dma in done.dmas
    ] == [
        (1, 1, 17, 117, 64),
        (2, 17, 33, 133, 65),
    ]
    assert {at: (one.count, one.cycles, one.flags) for at, one in done.waits.items()} == {
        3: (1, 133 + 6 - 3 - 1, {65}),
        5: (1, 0, {64}),
    }
    assert done.dma_wait_cycles == sum(one.cycles for one in done.waits.values())


def test_a_wait_in_a_loop_adds_up_over_its_trips(run):
    body = ["> " + copy(), "> { %91 = dma.done.wait [#allocation1], 16 }", "> { %92 = vsyncadd [#allocation1], -16 }"]
    program = [
        OPERAND,
        "{ %s1_s1 = smov 0 }",
        *LOOP[1:2],
        *body,
        *LOOP[2:],
        *["> {}"] * 3,
        "> {} /* End region 7 */",
        "{}",
    ]
    done = run(program)
    assert {at: (one.count, one.flags) for at, one in done.waits.items()} == {4: (5, {64})}
    assert done.waits[4].cycles == 5 * (16 + 100 - 1 + 5) == done.dma_wait_cycles
    assert (done.dma_count, done.cycles) == (5, 2 + 5 * (10 + 16 + 100 - 1 + 5) + 1)


# --- loops and branches ---

LOOP = [
    "{ %s1_s1 = smov 0 }",
    "LB > { %s2_s1 = sadd.s32 1, %s2_s1 } /* Start region 7 */",
    "> { %p3_p0 = scmp.ge.s32.totalorder %s2_s1, 5 }",
    "> { %4 = sbr.rel (!%p3_p0) target = $region7 }",
]


def test_a_loop_runs_its_trips_with_four_delay_slots(run):
    done = run([*LOOP, "> {}", "> {}", "> {}", "> {} /* End region 7 */", "{}"])
    assert done.bundle_runs == {0: 1, 1: 5, 8: 1}
    assert done.cycles == 1 + 5 * 7 + 1


def test_merged_empty_bundles_stand_for_the_delay_that_is_left(run):
    done = run([*LOOP, "> {} /* End region 7 */", "PF { %9 = sfence }"], machine=MERGING)
    assert done.bundle_runs == {0: 1, 1: 5, 5: 1}
    assert done.cycles == 1 + 5 * (2 + 1 + 6) + 1
    assert done.stalls == {
        (3, "branch"): 5 * 5,
        (4, "branch"): 5,
    }  # all six cycles of the delay, five of them unprinted
    printed = run(
        [*LOOP, "> {} /* End region 7 */", "PF { %9 = sfence }"], machine=dataclasses.replace(MERGING, rule="compiler")
    )
    assert printed.cycles == 1 + 5 * 2 + 1  # the compiler's own estimate passes over the branch and what is empty


def test_delay_slots_that_are_all_printed_are_not_merged(run):
    filled = [f"> {{ %s{i}_s{i} = smov {i} }}" for i in range(10, 16)]
    done = run([*LOOP, *filled, "PF { %9 = sfence }"], machine=MERGING)
    assert done.bundle_runs == {0: 1, 1: 5, 10: 1}
    assert done.cycles == 1 + 5 * (2 + 1 + 6) + 1


@pytest.mark.parametrize(
    "compare_comment, delay",
    [
        ("", ["> { %s7_s7 = smov 0 }", "{}", ">> { %s9_s9 = sadd.s32 1, %s9_s9 } /* End region 7 */", "{}"]),
        (" /* End region 7 */", ["> { %s9_s9 = sadd.s32 1, %s9_s9 }", "{}"]),
    ],
    ids=["the loop's region closes in the delay", "the loop's region has closed"],
)
def test_the_delay_of_a_loop_ends_where_the_loop_does_not_where_the_region_around_it_ends(run, compare_comment, delay):
    """What is printed behind the loop's end and an empty bundle runs once, when the loop is left."""
    program = [
        OPERAND,
        *["{ %s8_s8 = smov 0 }", "> { %s9_s9 = smov 0 } /* Start region 6 */", "> { %s2_s1 = smov 0 }"],
        "LB >> { %s2_s1 = sadd.s32 1, %s2_s1 } /* Start region 7 */",
        ">> { %p3_p0 = scmp.ge.s32.totalorder %s2_s1, 5 }" + compare_comment,
        "> { %4 = sbr.rel (!%p3_p0) target = $region7 }",
        *delay,
        "> { %s8_s8 = sadd.s32 100, %s8_s8 } /* End region 6 */",
        "{ %s9_s9 = sadd.s32 %s8_s8, %s9_s9 }",
        copy(size="%s9_s9"),
        *wait(count=105),
    ]
    assert run(program, machine=MERGING).hbm_read_bytes == 105 * 32


def test_delay_slots_run_whether_the_branch_is_taken_or_not(run):
    program = [
        OPERAND,
        *["{ %s9_s9 = smov 0 }", "{ %s2_s1 = smov 0 }"],
        "LB > { %s2_s1 = sadd.s32 1, %s2_s1 } /* Start region 7 */",
        "> { %p3_p0 = scmp.ge.s32.totalorder %s2_s1, 5 }",
        "> { %4 = sbr.rel (!%p3_p0) target = $region7 }",
        "> { %s9_s9 = sadd.s32 1, %s9_s9 }",
        *["> {}"] * 3,
        "{ %s9_s9 = sadd.s32 100, %s9_s9 }",
        copy(size="%s9_s9"),
        *wait(count=105),
    ]
    assert run(program).hbm_read_bytes == 105 * 32


def test_a_skipped_block_neither_runs_nor_copies(run):
    def program(flag: int) -> list[str]:
        return [
            OPERAND,
            f"{{ %s2_s2 = smov {flag} }}",
            "{ %p3_p1 = scmp.eq.s32.totalorder %s2_s2, 0 }",
            "{ %4 = sbr.rel (%p3_p1) target = $region5 }",
            *["{}"] * 4,
            "> " + copy(),
            *wait(),
            "PF { %8 = sfence } /* Start region 5 */",
        ]

    assert run(program(1)).hbm_read_bytes == 512
    skipped = run(program(0))
    assert (skipped.hbm_read_bytes, skipped.dma_count, skipped.cycles) == (0, 0, 9)


def test_a_copy_and_its_wait_that_are_predicated_off(run):
    def program(value: int) -> list[str]:
        return [
            OPERAND,
            f"{{ %s2_s2 = smov {value} }}",
            "{ %p3_p1 = scmp.ne.s32.totalorder %s2_s2, 0 }",
            copy(guard="(%p3_p1),"),
            "{ %91 = dma.done.wait (%p3_p1), [#allocation1], 16 }",
            "{ %92 = vsyncadd (%p3_p1), [#allocation1], 4294967280 }",
        ]

    assert run(program(1)).dma_count == 1
    off = run(program(0))
    assert (off.dma_count, off.cycles) == (0, 6)


def test_a_branch_to_a_region_that_nobody_marks_ends_the_program(run):
    done = run(["{ %4 = sbr.rel target = $region99 }", *["{}"] * 4, "{ %5 = shalt.err }", "{}"])
    assert done.cycles == 6


def test_a_loop_that_never_ends_is_an_error(tmp_path):
    path = tmp_path / "1-op-03-final_bundles.txt"
    path.write_text("0 : { %4 = sbr.rel target = $region1 } /* Start region 1 */\n")
    with pytest.raises(ExecutionError, match="may never end"):
        execute(parse_dump(path), {}, {}, MACHINE, limit_seconds=0.01)


def test_an_empty_copy_need_not_be_waited_for(run):
    """A kernel that copies what is left of a page may have nothing left: no wait counts that."""
    done = run([OPERAND, copy(), copy(size=0), *wait()])
    assert (done.dma_count, done.hbm_read_bytes) == (2, 16 * MACHINE.granule_bytes)


# --- errors ---


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([OPERAND, copy(), *wait(count=17)], "deadlock: sync flag 64 is 16, waited for 17, no copy due"),
        ([OPERAND, copy(1), *wait(2)], "deadlock: sync flag 65 is 0"),
        ([OPERAND, copy(), "{}"], "1 copies on sync flag 64 are never waited for"),
        ([OPERAND, copy(1), copy(2), *wait(1)], "sync flag 65 are never waited for"),
        (["{ %s1_s1 = smov 262144 }", "{ %s2_s2 = sld [smem:[%s1_s1]] }"], "SMEM index 262144 is out of range"),
        (["{ %s1_s1 = smov 4294967295 }", "{ %1 = sst [smem:[%s1_s1]] 3 }"], "SMEM index 4294967295 is out of range"),
        ([OPERAND, copy(kind="hbm_to_smem", size=40000), *wait(count=40000)], "a copy writes SMEM words"),
        (
            ["{ %1 = shalt.err }"],
            r"1-op-03-final_bundles.txt: .*the program halts itself at bundle 0x0 \(shalt.err, line 1\)",
        ),
        (["{ %p1_p1 = scmp.eq.s32.totalorder 1, 1 }", "{ %1 = shalt.err (%p1_p1) }"], "halts itself at bundle 0x1"),
    ],
)
def test_what_cannot_be_timed_is_an_error(run, program, message):
    with pytest.raises(ExecutionError, match=message):
        run(program)


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ("%s1_s1 = sfoo.u32 1, 2", "unknown scalar instruction: sfoo.u32"),
        ("%p1_p1 = pfoo %p2_p2", "unknown scalar instruction: pfoo"),
        ("%s1_s1 = sadd.s32 1", "too few operands: sadd.s32"),
        ("%s1_s1 = sadd.s32 1, what", "unknown operand 'what': sadd.s32"),
        ("%s1_s1 = sadd.s32 1, [#allocation77]", "unknown symbol #allocation77"),
        ("%1 = sbr.abs target = $region1", "unknown control, sync or DMA instruction: sbr.abs"),
        ("%1 = sbr.rel somewhere", "unknown branch without a target: sbr.rel"),
        ("%1 = dma.hbm_to_cmem hbm=%s1_s0", "unknown control, sync or DMA instruction: dma.hbm_to_cmem"),
        ("%1 = dma.hbm_to_vmem hbm=%s1_s0, vmem=%s2_s2", "unknown DMA without size_in_granules, dst_syncflagno"),
        ("%1 = dma.done.wait.all [#allocation1], 1", "unknown sync instruction: dma.done.wait.all"),
        ("%1 = vwait.lt [#allocation1], 1", "unknown sync instruction: vwait.lt"),
        ("%1 = vsyncfoo [#allocation1]", "unknown control, sync or DMA instruction: vsyncfoo"),
        ("%s1_s1 = sdivrem.u32 7, 2", "unknown scalar instruction: sdivrem.u32"),
    ],
)
def test_an_unknown_instruction_is_named_with_its_file_and_line(run, slot, message):
    with pytest.raises(Untranslatable, match=rf"1-op-03-final_bundles\.txt:2: .*{message}"):
        run([OPERAND, f"{{ {slot} }}"])


def test_an_operand_of_an_unknown_space_is_an_error(run):
    with pytest.raises(ExecutionError, match=r"txt:1: unknown operand inlined_call_operand\.host"):
        run([OPERAND.replace("operand.hbm", "operand.host")])


def test_two_branches_in_one_delay_are_an_error(run):
    with pytest.raises(Untranslatable, match="branch in the delay slots of another"):
        run(["{ %1 = sbr.rel target = $region1 } /* Start region 1 */"] * 2 + ["{}"] * 5)


# --- values that cannot be known ---

UNKNOWN = "{ %s7_s7 = spop %5 }"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            ["{ %p1_p1 = scmp.eq.s32.totalorder %s7_s7, 0 }", "{ %2 = shalt.err (%p1_p1) }"],
            "a branch, predicate or",
        ),
        (
            [
                "{ %p1_p1 = scmp.gt.f32.partialorder %s7_s7, 0.0 }",
                "{ %2 = sbr.rel (%p1_p1) target = $region1 } /* Start region 1 */",
                *["{}"] * 4,
            ],
            "a branch, predicate or",
        ),
        ([copy(size="%s7_s7")], "an address or size"),
        (["{ %1 = sst [smem:[%s7_s7]] 3 }"], "a value that no scalar input gives"),
        (["{ %s1_s1 = sld [smem:[#allocation3 + %s7_s7]] }"], "a value that no scalar input gives"),
        (["{ %1 = vsyncadd [#allocation1], %s7_s7 }"], "an address or size"),
    ],
)
def test_an_unknown_value_may_not_steer(run, program, message):
    with pytest.raises(ExecutionError, match=f"in the block at bundle 0x[03]: .*{message}"):
        run([OPERAND, UNKNOWN, *program])


def test_an_unknown_value_may_be_computed_with(run):
    binary = ["sadd.s32", "ssub.s32", "smul.u32", "smulhi.u32", "sand.u32", "sor.u32", "sxor.u32", "sshll.u32"]
    binary += ["sshrl.u32", "sshra.s32", "smin.u32", "smax.u32", "smin.s32", "smax.s32", "sadd.f32", "sshllo.u32"]
    program = [OPERAND, UNKNOWN]
    program += [f"{{ %s8_s8 = {opcode} %s7_s7, 3 }}" for opcode in binary]
    program += [f"{{ %s8_s8 = {opcode} 3, %s7_s7 }}" for opcode in binary]
    program += [
        "{ %p1_p1 = scmp.lt.s32.totalorder %s7_s7, 3 }",
        "{ %p2_p2 = scmp.eq.u32.totalorder 3, 3 }",
        "{ %p3_p3 = pand %p1_p1, %p2_p2  ;;  %p4_p4 = pnand %p2_p2, !%p1_p1  ;;  %p5_p5 = pneg %p1_p1 }",
        "{ %s9_s9 = smov (%p1_p1), 4  ;;  %s6_s6 = smov (!%p1_p1, %s8_s8), 1.0 }",
        "{ %s5_s5 = scalar_select /*predicate=*/%p3_p3, /*on_true=*/1, /*on_false=*/2 }",
        "{ %1 = sst [smem:[#allocation3]] %s7_s7 }",
        "{ %s4_s4 = sld [smem:[#allocation3]] }",
        "{ %6 = sdivrem.u32 %s7_s7, 3 /* kDivAndRem */ }",
        "{ %s3_s3 = spop.drf %6 }",
        "{ %7 = vpush %v1_v1 }",
    ]
    assert run(program).cycles == len(program)


# --- scalars ---

M1 = 2**32 - 1


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (f"sadd.s32 {M1}, 3", 2),
        ("ssub.s32 3, 5", M1 - 1),
        (f"smul.u32 {M1}, 2", M1 - 1),
        (f"smulhi.u32 {M1}, {M1}", M1 - 1),
        ("sand.u32 12, 10", 8),
        ("sor.u32 12, 10", 14),
        ("sxor.u32 12, 10", 6),
        (f"sshll.u32 {M1}, 4", M1 - 15),
        (f"sshrl.u32 {M1}, 28", 15),
        (f"sshra.s32 {M1 - 15}, 2", M1 - 3),
        ("sshra.s32 16, 2", 4),
        (f"smin.u32 {M1}, 3", 3),
        (f"smax.u32 {M1}, 3", M1),
        (f"smin.s32 {M1}, 3", M1),
        (f"smax.s32 {M1}, 3", 3),
        ("sadd 2, 3", 5),
        ("smov -1", M1),
        ("smov $0x1f", 31),
        ("smov [#allocation3 + $0x2]", 4098),
        ("scalar_lea.smem 5, 3", 8),
        ("scalar_lea.vmem %s3_s3, 16 [#allocation0]", 19),
        ("scalar_lea.vmem (%p1_p1), %s3_s3, %s3_s3 [#allocation0]", 6),
        ("scalar_lea.vmem (%p2_p2), %s3_s3, %s3_s3 [#allocation0]", 77),
        ("smov.u32 (%p1_p1, %s3_s3), 9", 9),
        ("smov.u32 (%p2_p2, %s3_s3), 9", 3),
        ("smov.u32 (!%p2_p2, %s3_s3), 9", 9),
        ("smov (%p1_p1), 9", 9),
        ("smov (!%p1_p1), 9", 77),
        ("scalar_select /*predicate=*/%p1_p1, /*on_true=*/8, /*on_false=*/9", 8),
        ("scalar_select /*predicate=*/%p2_p2, /*on_true=*/8, /*on_false=*/9", 9),
        ("sld [smem:[#allocation3 + $0x1]]", 55),
        ("sld [smem:[#allocation3 + %s3_s3]]", 56),
        ("sld [smem:[#allocation3 + %s3_s3]] (%p2_p2)", 77),
        ("sld [smem:[#allocation4]]", 0),
    ],
)
def test_scalar_arithmetic(run, instruction, expected):
    def program(value: int) -> list[str]:
        return [
            "{ %s3_s3 = smov 3  ;;  %s8_s8 = smov 77 }",
            "{ %p1_p1 = scmp.eq.s32.totalorder %s3_s3, 3  ;;  %p2_p2 = scmp.eq.s32.totalorder %s3_s3, 4 }",
            "{ %1 = sst [smem:[#allocation3 + $0x1]] 55 }",
            "{ %1 = sst [smem:[#allocation3 + %s3_s3]] (%p1_p1), 56 }",
            "{ %1 = sst [smem:[#allocation3 + %s3_s3]] (%p2_p2), 57 }",
            f"{{ %s8_s8 = {instruction} }}",
            f"{{ %p9_p9 = scmp.ne.u32.totalorder %s8_s8, {value} }}",
            "{ %1 = shalt.err (%p9_p9) }",
        ]

    assert run(program(expected)).cycles == 8
    with pytest.raises(ExecutionError, match="halts itself"):
        run(program(expected + 1))


@pytest.mark.parametrize(
    ("comparison", "true"),
    [
        (f"scmp.lt.s32.totalorder {M1}, 0", True),
        (f"scmp.lt.u32.totalorder {M1}, 0", False),
        (f"scmp.ge.s32.totalorder 0, {M1}", True),
        ("scmp.le.s32.totalorder 4, 4", True),
        ("scmp.gt.u32.totalorder 4, 4", False),
        ("scmp.eq.u32.totalorder 4, 4", True),
        ("scmp.ne.s32.totalorder 4, 4", False),
        (f"sc.u32 {M1}, 1", True),
        (f"sc.u32 {M1}, 0", False),
        ("pand %p1_p1, %p2_p2", False),
        ("pand %p1_p1, !%p2_p2", True),
        ("por %p1_p1, %p2_p2", True),
        ("pnand %p1_p1, %p1_p1", False),
        ("pnor %p2_p2, %p2_p2", True),
        ("pxor %p1_p1, %p2_p2", True),
        ("pneg %p1_p1", False),
        ("pmov %p1_p1", True),
        ("pmov %p2_p2", False),
    ],
)
def test_predicates(run, comparison, true):
    def program(halts_when: str) -> list[str]:
        return [
            "{ %p1_p1 = scmp.eq.s32.totalorder 3, 3  ;;  %p2_p2 = scmp.eq.s32.totalorder 3, 4 }",
            f"{{ %p9_p9 = {comparison} }}",
            f"{{ %1 = shalt.err ({halts_when}%p9_p9) }}",
        ]

    assert run(program("!" if true else "")).cycles == 3
    with pytest.raises(ExecutionError, match="halts itself"):
        run(program("" if true else "!"))


def test_registers_are_read_before_any_is_written(run):
    swap = "{ %s1_s1 = smov %s2_s2  ;;  %s2_s2 = smov %s1_s1  ;;  %1 = sst [smem:[#allocation3]] %s1_s1 }"
    program = ["{ %s1_s1 = smov 1  ;;  %s2_s2 = smov 2 }", swap, "{ %s3_s3 = sld [smem:[#allocation3]] }"]
    check = [
        "{ %s4_s4 = sshll.u32 %s1_s1, 8  ;;  %s5_s5 = sshll.u32 %s2_s2, 4 }",
        "{ %s4_s4 = sor.u32 %s4_s4, %s5_s5 }",
        "{ %s4_s4 = sor.u32 %s4_s4, %s3_s3 }",
        f"{{ %p9_p9 = scmp.ne.u32.totalorder %s4_s4, {0x211} }}",
        "{ %1 = shalt.err (%p9_p9) }",
    ]
    assert run([*program, *check]).cycles == 8


@pytest.mark.parametrize(
    ("kind", "pops", "expected"), [("kDiv", 1, 14), ("kRem", 1, 2), ("kDivAndRem", 1, 14), ("kDivAndRem", 2, 2)]
)
def test_a_division_is_popped_quotient_first(run, kind, pops, expected):
    program = [
        f"{{ %6 = sdivrem.u32 100, 7 /* {kind} */ }}",
        *["{ %s3_s3 = spop.drf %6 }"] * pops,
        f"{{ %p9_p9 = scmp.ne.u32.totalorder %s3_s3, {expected} }}",
        "{ %1 = shalt.err (%p9_p9) }",
    ]
    assert run(program).cycles == len(program)


def test_a_division_popped_once_too_often_is_an_error(run):
    with pytest.raises(ExecutionError, match="popped twice"):
        run(["{ %6 = sdivrem.u32 100, 7 /* kRem */ }", *["{ %s3_s3 = spop.drf %6 }"] * 2])


@pytest.mark.parametrize("slot", ["%6 = sdivrem.u32 100, 0 /* kDiv */", "%s3_s3 = sshll.u32 1, %s4_s4"])
def test_what_the_chip_gives_is_not_known(run, slot):
    """A division by zero or a shift by more than 31 places is computed with, and an error where it steers."""
    program = ["{ %s4_s4 = smov 32 }", f"{{ {slot} }}"]
    if "sdivrem" in slot:
        program.append("{ %s3_s3 = spop.drf %6 }")
    assert run(program).cycles == len(program)
    with pytest.raises(ExecutionError, match="a branch, predicate or"):
        run([*program, "{ %p9_p9 = scmp.ne.u32.totalorder %s3_s3, 1 }", "{ %1 = shalt.err (%p9_p9) }"])


# --- sync flags ---


def test_a_flag_is_read_by_a_move_and_a_pop(run):
    def program(expected: int) -> list[str]:
        return [
            "{ %1 = vsyncadd [#allocation1], 5 }",
            "{ %1 = vsyncadd [#allocation1], 4294967294 }",
            "{ %6 = vsyncmov [#allocation1] }",
            "{ %s3_s3 = vpop.sfrf %6 }",
            f"{{ %p9_p9 = scmp.ne.u32.totalorder %s3_s3, {expected} }}",
            "{ %1 = shalt.err (%p9_p9) }",
        ]

    assert run(program(3)).cycles == 6
    with pytest.raises(ExecutionError, match="halts itself at bundle 0x5"):
        run(program(5))


def test_a_flag_is_set_to_zero(run):
    program = [
        "{ %1 = vsyncadd [#allocation1], 5 }",
        "{ %1 = vsyncpa [#allocation1], 0 }",
        "{ %6 = vsyncmov [#allocation1] }",
        "{ %s3_s3 = vpop.sfrf %6 }",
        "{ %p9_p9 = scmp.ne.u32.totalorder %s3_s3, 0 }",
        "{ %1 = shalt.err (%p9_p9) }",
    ]
    assert run(program).cycles == 6


def test_a_counting_semaphore_waits_for_no_less_than_zero(run):
    def program(signalled: int) -> list[str]:
        return [
            f"{{ %1 = vsyncadd [#allocation1], {signalled} }}",
            "{ %2 = vsyncadd [#allocation1], 4294967294 }",
            "{ %3 = vwait.ge.trace [#allocation1], 0 }",
        ]

    assert run(program(2)).cycles == 2 + 1
    with pytest.raises(ExecutionError, match="deadlock: sync flag 64 is -1, waited for 0"):
        run(program(1))


def test_a_wait_settles_only_copies_that_are_done(run):
    """Between two waits the flag holds what has arrived by then, not what is on its way."""
    program = [
        OPERAND,
        copy(1, size=16),
        copy(1, size=160),
        "{ %3 = dma.done.wait [#allocation1], 16 }",
        "{ %6 = vsyncmov [#allocation1] }",
        "{ %s3_s3 = vpop.sfrf %6 }",
        "{ %p9_p9 = scmp.ne.u32.totalorder %s3_s3, 16 }",
        "{ %1 = shalt.err (%p9_p9) }",
        "{ %3 = dma.done.wait [#allocation1], 176 }",
    ]
    assert run(program).cycles == 1 + 16 + 160 + 100 + 6


# --- operands whose values are known ---


@pytest.mark.parametrize("index", [0, 5, 63])
def test_prefetched_words_steer_a_loop(run, index):
    words = np.arange(100, 164, dtype=np.int32)
    program = [
        OPERAND,
        copy(kind="hbm_to_smem", size=8),
        *wait(count=8),
        f"{{ %s3_s3 = sld [smem:[#allocation3 + ${index:#x}]] }}",
        f"{{ %p9_p9 = scmp.ne.u32.totalorder %s3_s3, {100 + index} }}",
        "{ %1 = shalt.err (%p9_p9) }",
    ]
    run(program, {0: words})
    with pytest.raises(ExecutionError, match="halts itself"):
        run(program, {0: words + 1})
    with pytest.raises(ExecutionError, match="a branch, predicate or address depends on a value"):
        run(program)


def test_words_past_the_operand_are_not_known(run):
    program = [
        OPERAND,
        copy(kind="hbm_to_smem", size=8),
        *wait(count=8),
        "{ %s3_s3 = sld [smem:[#allocation3 + $0x8]] }",
        "{ %p9_p9 = scmp.ne.u32.totalorder %s3_s3, 0 }",
        "{ %1 = shalt.err (%p9_p9) }",
    ]
    with pytest.raises(ExecutionError, match="a value that no scalar input gives"):
        run(program, {0: np.zeros(8, np.int32)})
    assert run(program, {0: np.zeros(9, np.int32)}).dma_count == 1


def test_a_part_of_an_operand_is_copied_from_where_it_lies(run):
    program = [
        OPERAND,
        "{ %s1_s0 = sadd.s32 1, %s1_s0 }",  # a pointer counts granules of 8 words
        copy(kind="hbm_to_smem", size=1),
        *wait(count=1),
        "{ %s3_s3 = sld [smem:[#allocation3]] }",
        "{ %p9_p9 = scmp.ne.u32.totalorder %s3_s3, 8 }",
        "{ %1 = shalt.err (%p9_p9) }",
    ]
    assert run(program, {0: np.arange(16, dtype=np.int32)}).hbm_read_bytes == 32


def test_an_operand_in_a_register(run):
    program = [
        OPERAND.replace("operand.hbm", "operand.<no memory space>"),
        "{ %p9_p9 = scmp.ne.s32.totalorder %s1_s0, 4294967293 }",
        "{ %1 = shalt.err (%p9_p9) }",
    ]
    assert run(program, {0: np.array([-3], np.int32)}).cycles == 3
    with pytest.raises(ExecutionError, match="a branch, predicate or"):
        run(program)


def test_split_arguments():
    assert split_arguments("(%p1_p1, %s2_s2), [smem:[#a + 1], x], 3") == [
        "(%p1_p1, %s2_s2)",
        "[smem:[#a + 1], x]",
        "3",
    ]
    assert split_arguments("") == []


# --- golden dumps ---


def load_regenerate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("regenerate", GOLDEN / "regenerate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["regenerate"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


REGENERATE = load_regenerate()
CASES = REGENERATE.GOLDEN
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", CASES)
def test_golden_bytes_and_cycles(case, chip):
    """Bytes follow from the Python of regenerate.py, but for those of the scalars, of which it has a bound."""
    known = CASES[case]
    cost = module_cost(GOLDEN / case / chip, load_machine(chip), known.scalars)
    (kernel,) = (op for op in cost.ops if op.is_kernel)
    scalar_bytes = sum(op.hbm_read_bytes for op in cost.ops) - known.read_bytes
    assert 0 <= scalar_bytes <= known.scalar_bytes
    assert kernel.hbm_written_bytes == known.written_bytes
    assert sum(op.hbm_written_bytes for op in cost.ops) - known.written_bytes in (0, known.rearranged_bytes)
    chunks = (known.read_bytes + known.written_bytes) // (REGENERATE.CHUNK * REGENERATE.ROW_BYTES)
    assert kernel.execution.dma_count - chunks in ((1,) if known.scalars else (0,))
    assert round(cost.cycles, 3) == EXPECTED[case][chip]
    again = module_cost(GOLDEN / case / chip, load_machine(chip), known.scalars)
    assert again.cycles.hex() == cost.cycles.hex()


@pytest.mark.parametrize("rule", ["calibrated", "compiler"])
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", CASES)
def test_golden_cycles_are_bundles_stalls_and_waits(case, chip, rule):
    """Every cycle has one owner. An empty bundle in a branch's delay is the branch's and no bundle's."""
    cost = module_cost(GOLDEN / case / chip, load_machine(chip, rule), CASES[case].scalars)
    ((name, kernel),) = ((op.op.name, op.execution) for op in cost.ops if op.is_kernel)
    dump = parse_dump(next((GOLDEN / case / chip).glob(f"0-{name}-*-final_bundles.txt")))
    issued = sum(len(kernel.block_bundles[address]) * runs for address, runs in kernel.bundle_runs.items())
    empty = sum(
        cycles for (at, cause), cycles in kernel.stalls.items() if cause == "branch" and not dump.bundles[at].slots
    )
    assert {cause for _, cause in kernel.stalls} <= set(CAUSES)
    if rule == "compiler":
        empty += sum(
            runs * sum(passed_over(dump.bundles[at]) for at in kernel.block_bundles[address])
            for address, runs in kernel.bundle_runs.items()
        )
    assert kernel.cycles == issued - empty + sum(kernel.stalls.values()) + kernel.dma_wait_cycles
    assert kernel.dma_wait_cycles == sum(wait.cycles for wait in kernel.waits.values())


@pytest.mark.parametrize("chip", CHIPS)
def test_golden_trips_follow_the_scalars(chip):
    """Other values in the same schedule give other trip counts."""
    chunk = REGENERATE.CHUNK * REGENERATE.ROW_BYTES
    read = []
    for scalars in (np.array([9, 2, 8, 3], np.int32), np.array([8, 4, 6, 6], np.int32)):
        cost = module_cost(GOLDEN / "division" / chip, load_machine(chip), {0: scalars})
        read.append(sum(op.hbm_read_bytes for op in cost.ops) // chunk)
    assert read == [9 // 2 + 9 % 2 + 8 // 3 + 8 % 3, 8 // 4 + 6 // 6]


@pytest.mark.parametrize("chip", CHIPS)
def test_golden_without_the_scalars_is_an_error(chip):
    with pytest.raises(ExecutionError, match="a value that no scalar input gives"):
        module_cost(GOLDEN / "nested_loops" / chip, load_machine(chip), {})


def test_slots_of_each_unit_count_every_run(run):
    done = run([*LOOP, "> {}", "> {}", "> {}", "> {} /* End region 7 */", "{}"])
    rows = [(1, 0), (1, 2), (1, 0), (1, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 7)]
    assert done.slot_uses(rows).tolist() == [1 + 3 * 5, 2 * 5 + 7]


def test_golden_slot_uses_are_no_more_than_the_units_can_issue():
    folder = GOLDEN / "nested_loops" / "v5e"
    cost = module_cost(folder, load_machine("v5e"), CASES["nested_loops"].scalars)
    (kernel,) = cost.ops
    (path,) = folder.glob("*utilization.txt")
    capacity, _ = parse_utilization(path)
    assert set(kernel.slot_uses) == set(capacity)
    assert 0 < kernel.slot_uses["SALU"] < capacity["SALU"] * kernel.cycles
