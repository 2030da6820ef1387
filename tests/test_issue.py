"""judge/llo/issue.py: hand-written schedules, each of which shows one reason for a bundle to come late."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from judge.chips import CHIPS
from judge.llo import execute as execute_module
from judge.llo.execute import Execution, execute
from judge.llo.issue import CAUSES, EmptyQueue, Issue, Run, Stretch, UnknownOpcode, opcode_class
from judge.llo.machine import Machine, load_machine
from judge.llo.parse import Dump, ParseError, parse_allocations, parse_dump

V5E, V6E, TPU7X = load_machine("v5e"), load_machine("v6e"), load_machine("tpu7x")
ALLOCATIONS = """
  #allocation0 [shape = 'f32[8,128]', space=vmem, size = 0x1000, scoped, tag = 'buffer']
  #allocation1 [shape = 's32[1]', space=sflag, size = 0x4, scoped, tag = 'a flag']
  #allocation3 [shape = 's32[128]', space=smem, size = 0x200, scoped, tag = 'words']
"""
LOAD = "%v1_v1 = vld [vmem:[#allocation0] sm:$0xff]"
STORE = "%9 = vst [vmem:[#allocation0] sm:$0xff] /*vst_source=*/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """One run of all bundles from a state in which nothing is on its way."""

    issue: Issue
    run: Run
    times: list[int]  # cycle in which each bundle issues
    stalls: list[tuple[int, str, int]]  # (bundle, cause, cycles)


def parsed(folder: Path, bundles: list[str]) -> Dump:
    """Each bundle is its slots, or `label > { slots } comments`."""
    lines = []
    for address, bundle in enumerate(bundles):
        before, _, after = (bundle if "{" in bundle else f"{{ {bundle} }}").partition("{")
        label, nesting = before.replace(">", "").strip(), "> " * before.count(">")
        lines.append(f"{address:#x} {label} : {nesting}{{{after}".replace("0x0 ", "0 ", 1))
    path = folder / "1-op-03-final_bundles.txt"
    path.write_text("\n".join(lines) + "\n")
    return parse_dump(path)


Times = Callable[..., Timed]  # (bundles, machine)
Runs = Callable[..., Execution]


@pytest.fixture
def timed(tmp_path: Path) -> Times:
    """Times bundles without branches; without waits, a cycle is a bundle's or a stall's."""

    def timed(bundles: list[str], machine: Machine = V6E) -> Timed:
        issue = Issue(parsed(tmp_path, bundles), machine)
        addresses = tuple(range(len(bundles)))
        run = issue.run(issue.add(Stretch(bundles=addresses, interest=addresses)), issue.start)
        assert run[2] == len(bundles) + sum(cycles for _, _, cycles in run.stalls)
        assert {cause for _, cause, _ in run.stalls} <= set(CAUSES)
        return Timed(issue=issue, run=run, times=run[3:], stalls=list(run.stalls))

    return timed


@pytest.fixture
def run(tmp_path: Path) -> Runs:
    def run(bundles: list[str], machine: Machine = V6E) -> Execution:
        (tmp_path / "allocations.txt").write_text(ALLOCATIONS)
        return execute(parsed(tmp_path, bundles), parse_allocations(tmp_path / "allocations.txt"), {}, machine)

    return run


def replaced(machine: Machine, cadences: dict[str, int] | None = None, /, **latencies: int) -> Machine:
    """`machine` with cadences and latencies of the test's own."""
    assert latencies.keys() <= machine.latencies.keys()  # no figure that nothing reads
    assert (cadences or {}).keys() <= machine.cadences.keys()
    return dataclasses.replace(
        machine, latencies=machine.latencies | latencies, cadences=machine.cadences | (cadences or {})
    )


# --- results ---


@pytest.mark.parametrize(
    ("producer", "consumer", "latency", "cause"),
    [
        ("%v2_v2 = vadd.f32 %v1_v1, %v1_v1", f"{STORE}%v2_v2", "valu", "VALU"),
        ("%v2_v2 = vpack.c.bf16 %v1_v1, %v1_v1", "%v3_v3 = vmul.f32 %v1_v1, %v2_v2", "valu", "VALU"),
        ("%v2_v2 = vperm.slane %v1_v1, 5", "%v3_v3 = vmul.f32 %v2_v2, 2.0", "valu", "VALU"),
        ("%v2_v2 = vld [vmem:[#allocation0 + $0x8] sm:$0xff]", "%v3_v3 = vadd.f32 %v1_v1, %v2_v2", "load", "load"),
        ("%v2_v2 = vmov 0.0", "%v3_v3 = vadd.f32 %v1_v1, %v2_v2", "move", "VALU"),
        (
            "%vm2_vm3 = vcmp.le.s32.totalorder %v1_v1, %v1_v1",
            "%v3_v3 = vsel /*vm=*/%vm2_vm3, /*on_true_vy=*/%v1_v1, /*on_false_vx=*/%v1_v1",
            "mask",
            "VALU",
        ),
        ("%s2_s2 = sadd.s32 1, %s1_s1", "%s3_s3 = sadd.s32 1, %s2_s2", "salu", "scalar"),
        ("%s2_s2 = smul.u32 3, %s1_s1", "%s3_s3 = sadd.s32 1, %s2_s2", "smul", "scalar"),
        (
            "%s2_s2 = sld [smem:[#allocation3]]",
            "%v3_v3 = vld [vmem:[#allocation0 + %s2_s2] sm:$0xff]",
            "sld",
            "scalar",
        ),
        ("%5 = sdivrem.u32 %s1_s1, 3 /* kDiv */", "%s2_s2 = spop.drf %5", "sdivrem", "scalar"),
        ("%p2_p2 = scmp.ge.s32.totalorder %s1_s1, 5", "%p3_p3 = pneg %p2_p2", "predicate", "scalar"),
        ("%p2_p2 = por %p1_p1, %p1_p1", "%p3_p3 = pand %p2_p2, !%p1_p1", "predicate_logic", "scalar"),
        ("%5 = vsyncmov [#allocation1]", "%s2_s2 = vpop.sfrf %5", "flag_read", "scalar"),
        ("%5 = vpush %v1_v1", "%s2_s2 = spop %5", "vpush", "XLU"),
        ("%5 = vpow2.f32 %v1_v1", "%v2_v2 = vpop.eup %5", "eup", "EUP"),
        ("%5 = vrcp.f32 %v1_v1", "%v2_v2 = vpop.eup %5", "eup", "EUP"),
        ("%5 = vadd.xlane.f32.xlu0 %v1_v1", "%v2_v2 = vpop.xlane.xlu0 %5", "reduce", "XLU"),
        ("%5 = vmax.index.xlane.f32.xlu0 %v1_v1", "%v2_v2 = vpop.xlane.xlu0 %5", "index_reduce", "XLU"),
        ("%5 = vperm.xlu1 %v1_v1", "%v2_v2 = vpop.permute.xlu1 %5", "permute", "XLU"),
        ("%5 = vrot.lane.b32.xlu1 %v1_v1, %s1_s1", "%v2_v2 = vpop.permute.xlu1 %5", "rotate", "XLU"),
    ],
)
@pytest.mark.parametrize("chip", CHIPS)
def test_a_result_is_waited_for(
    timed: Times, chip: str, producer: str, consumer: str, latency: str, cause: str
) -> None:
    """On the chip's own figure, and on one of 11 cycles: many of the chips' are 1, which no stall shows."""
    own = load_machine(chip)
    for machine, cycles in ((own, own.latency(latency)), (replaced(own, **{latency: 11}), 11)):
        done = timed([producer, consumer], machine)
        assert done.times == [0, cycles]
        assert done.stalls == ([(1, cause, cycles - 1)] if cycles > 1 else [])
        hidden = timed([producer, *["%v60_v60 = vmov 0.0"] * (cycles + 3), consumer], machine)
        assert (hidden.times[-1], hidden.stalls) == (cycles + 4, [])  # time that passes anyway is not paid twice


def test_a_chain_of_results_adds_up(timed: Times) -> None:
    machine = replaced(V6E, load=5, valu=3)
    chain = [LOAD, "%v2_v2 = vadd.f32 %v1_v1, %v1_v1", "%v3_v3 = vmul.f32 %v2_v2, %v2_v2", f"{STORE}%v3_v3"]
    assert timed(chain, machine).times == [0, 5, 5 + 3, 5 + 3 + 3]


def test_work_in_between_hides_a_latency(timed: Times) -> None:
    chain = ["%v2_v2 = vadd.f32 %v1_v1, %v1_v1", "%v3_v3 = vadd.f32 %v1_v1, %v1_v1", f"{STORE}%v2_v2"]
    assert timed(chain, replaced(V6E, valu=2)).stalls == []
    assert timed(chain, replaced(V6E, valu=4)).times == [0, 1, 4]


def test_bundles_issue_in_order(timed: Times) -> None:
    """One that needs nothing still waits behind one that does."""
    done = timed(["%5 = vpow2.f32 %v1_v1", "%v2_v2 = vpop.eup %5", "%s1_s1 = smov 3"])
    assert done.times == [0, V6E.latency("eup"), V6E.latency("eup") + 1]


def test_registers_are_read_before_they_are_written(timed: Times) -> None:
    """A slot of the same bundle that writes the register, and a later one that writes it anew, delay nothing."""
    machine = replaced(V6E, valu=9)
    done = timed(["%v2_v2 = vadd.f32 %v1_v1, %v1_v1 ;; %v3_v3 = vadd.f32 %v2_v2, %v2_v2"], machine)
    assert done.times == [0]
    again = ["%v2_v2 = vadd.f32 %v1_v1, %v1_v1", "%v4_v2 = vmov 0.0", f"{STORE}%v4_v2"]
    assert timed(again, machine).times == [0, 1, 1 + machine.latency("move")]


def test_the_slot_that_waits_longest_is_to_blame(timed: Times) -> None:
    machine = replaced(V6E, valu=5, load=8)
    pair = ["%v2_v2 = vadd.f32 %v1_v1, %v1_v1", "%v3_v3 = vld [vmem:[#allocation0] sm:$0xff]"]
    done = timed([*pair, f"{STORE}%v2_v2 ;; %v4_v4 = vmul.f32 %v3_v3, %v3_v3"], machine)
    assert done.times == [0, 1, 1 + 8]
    assert done.stalls == [(2, "load", 1 + 8 - 2)]


@pytest.mark.parametrize(
    "guarded",
    [
        "%s2_s2 = smov (%p2_p2), 9",
        "%s2_s2 = sadd.s32 (%p2_p2), 1, %s1_s1",
        "%s2_s2 = sld [smem:[#allocation3]] (!%p2_p2)",
        "%9 = sbr.rel (!%p2_p2) target = $region7",
        "%9 = shalt.err (%p2_p2)",
        "%9 = dma.done.wait (%p2_p2), [#allocation1], 16",
    ],
)
def test_a_guard_is_free(timed: Times, guarded: str) -> None:
    machine = replaced(V6E, predicate=7)
    assert timed(["%p2_p2 = scmp.ge.s32.totalorder %s1_s1, 5", guarded], machine).times == [0, 1]


def test_a_predicate_that_is_an_operand_is_waited_for(timed: Times) -> None:
    picks = "%s2_s2 = scalar_select /*predicate=*/%p2_p2, /*on_true=*/1, /*on_false=*/2"
    done = timed(["%p2_p2 = scmp.ge.s32.totalorder %s1_s1, 5", picks])
    assert done.times == [0, V6E.latency("predicate")]


@pytest.mark.parametrize("slot", ["%s2_s2 = sphi %s1_s1", "%v2_v2 = vphi %v1_v1", "%p2_p2 = sphi %p1_p1"])
def test_an_alias_neither_waits_nor_takes_time(timed: Times, slot: str) -> None:
    ahead = "%s1_s1 = smul.u32 3, 3 ;; %v1_v1 = vadd.f32 %v0_v0, %v0_v0 ;; %p1_p1 = scmp.eq.s32.totalorder 1, 1"
    assert timed([ahead, slot], replaced(V6E, smul=9, valu=9, predicate=9)).times == [0, 1]


def test_each_rule_has_latencies_of_its_own(timed: Times) -> None:
    chain = ["%p2_p2 = por %p1_p1, %p1_p1", "%p3_p3 = pnand %p2_p2, %p1_p1"]
    for rule in ("calibrated", "compiler"):
        machine = load_machine("v5e", rule)
        assert timed(chain, machine).times == [0, machine.latency("predicate_logic")]
    assert timed(chain, load_machine("v5e", "compiler")).times == [0, 2]


# --- EUP and XLU ---


def test_the_eup_is_pipelined(timed: Times) -> None:
    pushes = ["%5 = vpow2.f32 %v1_v1", "%6 = vpow2.f32 %v1_v1"]
    done = timed([*pushes, "%v2_v2 = vpop.eup %5", "%v3_v3 = vpop.eup %6", f"{STORE}%v2_v2"])
    first = V6E.latency("eup")
    assert done.times == [0, 1, first, first + 1, first + 2]


def test_what_a_pop_leaves_is_ready_a_pop_later(timed: Times) -> None:
    machine = replaced(V6E, pop=4)
    done = timed(["%5 = vpow2.f32 %v1_v1", "%v2_v2 = vpop.eup %5", f"{STORE}%v2_v2"], machine)
    assert done.times == [0, machine.latency("eup"), machine.latency("eup") + 4]


XLU = {
    "reduce": "vadd.xlane.f32.{} %v1_v1",
    "index_reduce": "vmax.index.xlane.f32.{} %v1_v1",
    "permute": "vperm.{} %v1_v1",
    "pattern": "vset.pattern.permute.{} %v1_v1",
    "transpose": "vxpose.{}.b32.start [1/8] (short) /*vx=*/%v1_v1, /*width=*/128",
    "transpose_b16": "vxpose.{}.c.b16.start [1/8] /*vx=*/%v1_v1, /*width=*/128",
    "transpose_binary": "vxpose.binary.{}.c.b16.start [1/8] /*vx=*/%v1_v1, /*width=*/128",
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("first", XLU)
@pytest.mark.parametrize("second", [kind for kind in XLU if "_b" not in kind])
def test_an_xlu_takes_the_next_after_its_cadence(timed: Times, chip: str, first: str, second: str) -> None:
    """The figure depends on what it did last: changing from a reduction to a permutation costs more than going on."""
    machine = load_machine(chip)
    pair = [f"%5 = {XLU[first].format('xlu0')}", f"%6 = {XLU[second].format('xlu0')}"]
    cadence = machine.cadence(f"{first}_to_{second}")
    assert timed(pair, machine).times == [0, cadence]
    assert timed([pair[0], pair[1].replace("xlu0", "xlu1")], machine).times == [0, 1]  # each unit has its own


@pytest.mark.parametrize("chip", CHIPS)
def test_changing_from_reductions_to_permutations_costs_more_than_going_on(timed: Times, chip: str) -> None:
    machine = load_machine(chip)
    reduce, permute = (f"%5 = {XLU[kind].format('xlu0')}" for kind in ("reduce", "permute"))
    same, changed = machine.cadence("reduce_to_reduce"), machine.cadence("reduce_to_permute")
    assert changed > same
    assert timed([reduce, reduce, permute, permute], machine).times == [
        0,
        same,
        same + changed,
        same + changed + machine.cadence("permute_to_permute"),
    ]


def test_a_short_cadence_does_not_end_a_longer_one(timed: Times) -> None:
    """A reduction right behind a permutation: the index reduction still waits for what the permutation asked."""
    machine = replaced(
        V6E, {"permute_to_index_reduce": 40, "permute_to_reduce": 4, "reduce_to_index_reduce": 5, "reduce_to_reduce": 5}
    )
    permute, reduce, index = (f"%5 = {XLU[kind].format('xlu0')}" for kind in ("permute", "reduce", "index_reduce"))
    assert timed([permute, reduce, index], machine).times == [0, 4, 40]


def test_a_rotation_has_the_cadence_of_a_permutation(timed: Times) -> None:
    machine = replaced(V6E, {"permute_to_permute": 5, "permute_to_reduce": 7})
    rotate = "%5 = vrot.lane.b32.xlu0 %v1_v1, %s1_s1"
    assert timed([rotate, rotate, "%6 = vadd.xlane.f32.xlu0 %v1_v1"], machine).times == [0, 5, 5 + 7]


def test_an_xlu_may_have_a_latency_of_its_own(timed: Times) -> None:
    assert V5E.latencies["permute_xlu2"] != V5E.latencies["permute"]
    for unit, latency in (("xlu0", "permute"), ("xlu2", "permute_xlu2")):
        done = timed([f"%5 = vperm.{unit} %v1_v1", f"%v2_v2 = vpop.permute.{unit} %5"], V5E)
        assert done.times == [0, V5E.latencies[latency]]


def test_a_permutation_waits_for_its_pattern(timed: Times) -> None:
    machine = replaced(V6E, {"pattern_to_permute": 2}, pattern=9)
    done = timed(
        ["%7 = vset.pattern.permute.xlu0 %v1_v1", "%8 = vperm.xlu0 /*pattern=*/%7, /*source=*/%v1_v1"], machine
    )
    assert done.times == [0, 9]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("kind", "opcode"),
    [("transpose", "b32"), ("transpose_b16", "c.b16")],
)
def test_a_transpose_gives_its_rows_after_its_last(timed: Times, chip: str, kind: str, opcode: str) -> None:
    machine = load_machine(chip)
    rows = [
        f"%{5 + i} = vxpose.xlu0.{opcode}.{part} [{i + 1}/3] /*vx=*/%v1_v1, /*width=*/128"
        for i, part in enumerate(("start", "cont", "end"))
    ]
    done = timed([*rows, *[f"%v{i}_v{i} = vpop.trf.xlu0" for i in (2, 3, 4)]], machine)
    taken = [i * machine.cadence(f"{kind}_to_transpose") for i in range(3)]
    first = taken[-1] + machine.latency(kind)
    assert done.times == [*taken, *[first + i * machine.cadence("transpose_pop") for i in range(3)]]
    assert {cause for _, cause, _ in done.stalls} == {"XLU"}


def test_transposes_of_two_shapes_give_as_many_rows_as_they_are_wide(timed: Times) -> None:
    """Half as many registers where two rows of 16 bits share one: 4 and 2 of the 6 that are popped."""
    shapes = ("b32", 8), ("c.b16", 8)
    ends = [f"%{5 + i} = vxpose.xlu0.{t}.end [1/1] /*vx=*/%v1_v1, /*width=*/{w}" for i, (t, w) in enumerate(shapes)]
    pops = [f"%v{i}_v{i} = vpop.trf.xlu0" for i in range(2, 8)]
    done = timed([*ends, *pops])
    issue = done.issue
    assert [issue.results_of("xlu0.trf", shape) for shape in ("8", "4")] == [4, 2]
    second = done.times[1] + V6E.latency("transpose_b16")
    assert done.times[5] < done.times[6] == max(second, done.times[5] + V6E.cadence("transpose_pop"))


# --- MXU ---


def matmul(unit: int = 0, dtype: str = "bf16") -> str:
    return f"%7 = vmatmul.mubr.{dtype}.gmra.mxu{unit} %v1_v1"


def pop(register: int, unit: int = 0) -> str:
    return f"%v{register}_v{register} = vpop.f32.mrf.mxu{unit}"


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(
    ("dtype", "name"), [("bf16", "bf16"), ("f32", "f32"), ("s8", "int8"), ("f8e4m3fn", "fp8"), ("s4", "int4")]
)
def test_an_mxu_takes_the_next_vmatmul_after_its_cadence(timed: Times, chip: str, dtype: str, name: str) -> None:
    machine = load_machine(chip)
    cadence = machine.cadence(f"matmul_{name}")
    done = timed([matmul(0, dtype), matmul(0, dtype), matmul(1, dtype), matmul(0, dtype)], machine)
    assert done.times == [0, cadence, cadence + 1, 2 * cadence]
    assert done.stalls == [(1, "MXU", cadence - 1), (3, "MXU", cadence - 2)]


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_results_of_a_vmatmul_are_popped_in_order(timed: Times, chip: str) -> None:
    """A dump pops all that it pushes: here four results for the one vmatmul."""
    machine = load_machine(chip)
    done = timed([matmul(), *[pop(i) for i in range(2, 6)]], machine)
    first, spacing = machine.latency("matmul_bf16"), machine.cadence("mxu_pop_bf16")
    assert done.times == [0, *[first + i * spacing for i in range(4)]]


@pytest.mark.parametrize(
    ("bundles", "queue"),
    [
        ([pop(2), matmul()], "mxu0"),
        ([matmul(1), pop(2, 0), pop(3, 1)], "mxu0"),
        (["%v2_v2 = vpop.trf.xlu1"], r"xlu1\.trf"),
        (["%v2_v2 = vpop.eup %77"], "%77"),
        (["%v2_v2 = vpop.xlane.xlu0 %77"], "%77"),
    ],
)
def test_a_pop_of_what_nothing_pushed_has_no_time(timed: Times, bundles: list[str], queue: str) -> None:
    with pytest.raises(EmptyQueue, match=f"the bundle at 0x[01] pops {queue}, which nothing was pushed to"):
        timed(bundles)
    assert issubclass(EmptyQueue, ParseError)  # which the judge reports as a program that cannot be timed


def test_results_of_two_vmatmuls_follow_one_another(timed: Times) -> None:
    """The second's first comes no sooner than its latency, nor than `spacing` behind the first's last."""
    latency, spacing = V6E.latency("matmul_bf16"), V6E.cadence("mxu_pop_bf16")
    for cadence in (V6E.cadence("matmul_bf16"), 3):
        machine = replaced(V6E, {"matmul_bf16": cadence})
        done = timed([matmul(), matmul(), *[pop(i) for i in range(2, 6)]], machine)
        second = max(cadence + latency, latency + 2 * spacing)
        assert done.times == [0, cadence, latency, latency + spacing, second, second + spacing]


def test_a_latched_left_hand_side_gives_half_the_results_in_half_the_time(timed: Times) -> None:
    machine = load_machine("v5e")
    left, right = "%8 = vmatmul.lmr.bf16.gmra.16.mxu0", "%9 = vllmr.16.mxu0"
    done = timed([right, left, left, *[pop(i) for i in (2, 3)]], machine)
    latched, cadence = machine.latency("latch_lhs"), machine.cadence("matmul_bf16") // 2
    assert done.times[:3] == [0, latched, latched + cadence]
    assert done.times[3] == latched + machine.latency("matmul_bf16")
    assert done.issue.results_of("mxu0", "bf16.lmr") == 1


def test_each_mxu_has_a_result_queue_of_its_own(timed: Times) -> None:
    latency = V6E.latency("matmul_bf16")
    done = timed([matmul(0), "", "", matmul(1), pop(2, 1), pop(3, 0)])
    assert done.times == [0, 1, 2, 3, 3 + latency, 3 + latency + 1]


def test_a_pop_of_two_queues_takes_from_both(timed: Times) -> None:
    latency = V6E.latency("matmul_int8")
    pushes = [matmul(0, "s8"), matmul(1, "s8"), matmul(0, "s8")]
    both = "%v2_v2 = vpop.add.s32.mrf.mxu0.mxu1"
    done = timed([*pushes, both, "%v3_v3 = vpop.s32.mrf.mxu0"])
    cadence = V6E.cadence("matmul_int8")
    assert done.times == [0, 1, cadence, 1 + latency, max(2 + latency, cadence + latency)]


def test_a_vmatmul_of_wider_rows_gives_fewer_results(timed: Times) -> None:
    """Half as many rows of float32 as of bfloat16 make up one vmatmul: of three pops, the first is all of the first."""
    done = timed([matmul(0, "f32"), matmul(0, "bf16"), *[pop(i) for i in range(2, 5)]], V5E)
    second = V5E.cadence("matmul_f32")
    first = second + V5E.latency("matmul_bf16")
    assert done.times == [0, second, V5E.latency("matmul_f32"), first, first + V5E.cadence("mxu_pop_bf16")]


def test_results_that_nobody_pops_are_an_error_and_not_an_endless_run(tmp_path: Path) -> None:
    issue = Issue(parsed(tmp_path, [matmul()]), V5E)
    number = issue.add(Stretch(bundles=(0,) * 5000))
    with pytest.raises(UnknownOpcode, match="results of mxu0 are not popped"):
        issue.run(number, issue.start)


def test_a_vmatmul_with_new_weights_waits_for_them(timed: Times) -> None:
    push, latency = "%6 = vmatpush1.bf16.msra.mxu0 %v1_v1", V6E.latency("push_bf16")
    assert latency > 1
    new = "%7 = vmatmul.mubr.bf16.vlgmr.msra.gmra.mxu0 %v2_v2"
    assert timed([push, new]).times == [0, latency]
    assert timed([push, new.replace("mxu0", "mxu1")]).times == [0, 1]
    assert timed([push, matmul()]).times == [0, 1]  # goes on with the weights that are there


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("vmatpush{}.bf16.msra", "push_bf16"),
        ("vmatpush{}.msra", "push_f32"),
        ("vmatpush{}.s8.msra", "push_int8"),
        ("vmatpush{}.f8e4m3b11.bf16.msra", "push_fp8"),
        ("vmatpush{}.bf16.xpose.msra", "push_xpose_bf16"),
        ("vmatpush{}.xpose.msra", "push_xpose_f32"),
    ],
)
def test_weights_are_pushed_one_by_one_or_in_pairs(timed: Times, opcode: str, name: str) -> None:
    """Where an MXU takes pairs, the third push waits for the first, the fourth for the second."""
    cadences = {name: 7}
    pushes = [f"%{i} = {opcode}.mxu0 %v1_v1" for i in range(10, 15)]
    one_by_one = timed([push.format("") for push in pushes], replaced(V5E, cadences))
    assert not V5E.pushes_pairs and one_by_one.times == [0, 7, 14, 21, 28]
    pairs = timed([push.format("1") for push in pushes], replaced(V6E, cadences))
    assert V6E.pushes_pairs and pairs.times == [0, 1, 7, 8, 14]
    assert pairs.stalls == [(2, "MXU", 5), (4, "MXU", 5)]


def test_a_vmatprep_subr_is_half_of_a_pair(timed: Times) -> None:
    pair = ["%6 = vmatprep.subr.bf16.mxu0 %v1_v1", "%7 = vmatpush1.bf16.msra.mxu0 %v2_v2"]
    cadence = V6E.cadence("push_bf16")
    assert timed(pair * 2).times == [0, 1, cadence, cadence + 1]


def test_a_vmatprep_mubr_has_the_vmatmuls_cadence_and_delays_no_vmatmul(timed: Times) -> None:
    prep = "%6 = vmatprep.mubr.bf16.mxu0 %v1_v1"
    assert timed([prep, matmul(), prep]).times == [0, 1, V6E.cadence("matmul_bf16")]


@pytest.mark.parametrize(("dtype", "results"), [("bf16", 4), ("f32", 2)])
def test_addressed_results_may_be_popped_in_any_order(timed: Times, dtype: str, results: int) -> None:
    name = f"matmul_{dtype}"
    latency, spacing, cadence = TPU7X.latency(name), TPU7X.cadence(f"mxu_pop_{dtype}"), TPU7X.cadence(name)
    machine = replaced(TPU7X, {f"mxu_pop_{dtype}": 5})

    def push(buffer: int) -> str:
        return f"%7 = vmatmul.mubr.{dtype}.gmra.mrb[{buffer}].mxu0 %v1_v1"

    def popped(buffer: int, unit: int = 0) -> str:
        return f"%v2_v2 = vpop.f32.mrb[{buffer}].mxu{unit}"

    in_order = timed([push(8), *[popped(8 + i) for i in range(results)]], TPU7X)
    assert in_order.times == [0, *[latency + i * max(1, spacing) for i in range(results)]]
    last = (results - 1) * 5
    backwards = timed([push(8), popped(8 + results - 1), popped(8)], machine)
    assert backwards.times == [0, latency + last, latency + last + 1]
    assert timed([push(8), popped(8, unit=1), popped(8 + results)], machine).times == [0, 1, 2]  # not of this vmatmul
    second = timed([push(0), push(results), popped(results), popped(0)], machine)
    assert second.times == [0, cadence, cadence + latency, cadence + latency + 1]


def test_a_buffer_that_is_filled_anew_has_the_new_result(timed: Times) -> None:
    push = "%7 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v1_v1"
    done = timed([push, push, "%v2_v2 = vpop.f32.mrb[0].mxu0"], TPU7X)
    cadence = TPU7X.cadence("matmul_bf16")
    assert done.times == [0, cadence, cadence + TPU7X.latency("matmul_bf16")]


# --- from block to block ---


def loop(trips: int, first: str) -> list[str]:
    """Seven bundles a trip, the delay slots filled."""
    return [
        "%s1_s1 = smov 0",
        f"LB > {{ %s2_s1 = sadd.s32 1, %s2_s1 ;; {first} }} /* Start region 7 */",
        f"> {{ %p3_p0 = scmp.ge.s32.totalorder %s2_s1, {trips} }}",
        "> { %4 = sbr.rel (!%p3_p0) target = $region7 }",
        *[f"> {{ %s{i}_s{i} = smov {i} }}" for i in range(10, 14)],
        "%9 = sfence",
    ]


def test_a_vmatmul_holds_up_that_of_the_next_trip(run: Runs) -> None:
    """Trips of seven bundles, and a vmatmul in each that the MXU takes every 16 cycles."""
    cadence = V5E.cadence("matmul_bf16")
    assert cadence > 7
    done = run(loop(5, matmul()), V5E)
    assert done.stalls == {(1, "MXU"): 4 * (cadence - 7)}  # the first trip's finds the unit free
    assert done.cycles == 1 + 5 * 7 + 4 * (cadence - 7) + 1
    assert run(loop(5, "%7 = vlaneseq"), V5E).cycles == 1 + 5 * 7 + 1


def test_a_result_is_on_its_way_across_blocks(run: Runs) -> None:
    skipped = ["%9 = sbr.rel target = $region5", *["%s9_s9 = smov 1"] * 4, "%9 = shalt.err"]
    program = [matmul(), *skipped, "PF { %v2_v2 = vpop.f32.mrf.mxu0 } /* Start region 5 */"]
    done = run(program)
    latency = V6E.latency("matmul_bf16")
    assert done.stalls == {(7, "MXU"): latency - 6}
    assert done.cycles == latency + 1


def test_merged_empty_bundles_pass_time_for_results(run: Runs) -> None:
    """The delay of six behind a branch of which one bundle is printed hides as much of a latency."""
    program = [
        "%5 = vpow2.f32 %v1_v1",
        "%9 = sbr.rel target = $region5",
        "{}",
        "%9 = shalt.err",
        "PF { %v2_v2 = vpop.eup %5 } /* Start region 5 */",
    ]
    done = run(program, TPU7X)
    latency, delay = TPU7X.latency("eup"), TPU7X.branch_delay_bundles
    assert latency > 2 + delay
    assert done.cycles == latency + 1
    assert done.stalls == {(1, "branch"): delay - 1, (2, "branch"): 1, (4, "EUP"): latency - 2 - delay}


def test_empty_bundles_in_a_delay_are_lost_to_the_branch(run: Runs) -> None:
    done = run(
        ["%9 = sbr.rel target = $region5", "%s1_s1 = smov 1", *["{}"] * 3, "PF { %8 = sfence } /* Start region 5 */"]
    )
    assert done.cycles == 6
    assert done.stalls == {(address, "branch"): 1 for address in (2, 3, 4)}


COPY = [
    "{ %s1_s0 = inlined_call_operand.hbm [shape: s32[64], index: 0, kind: input, shape index: {}] }",
    "%90 = dma.hbm_to_vmem /*hbm=*/%s1_s0, /*size_in_granules=*/16, /*vmem=*/[#allocation0], "
    "/*dst_syncflagno=*/[#allocation1]",
]
WAIT = "%91 = dma.done.wait [#allocation1], 16"


def test_a_result_that_arrives_during_a_wait_costs_nothing_more(run: Runs) -> None:
    push, taken = "%5 = vpow2.f32 %v1_v1", "%v2_v2 = vpop.eup %5"
    latency = V6E.latency("eup")
    assert run([push, taken]).stalls == {(1, "EUP"): latency - 1}
    assert run([push, "%9 = vwait.ge [#allocation1], 0", taken]).stalls == {(2, "EUP"): latency - 2}  # no time passes
    done = run([*COPY, push, WAIT, taken])
    assert done.dma_wait_cycles > latency
    assert (done.stalls, done.cycles) == ({}, 5 + done.dma_wait_cycles)


def test_a_unit_and_a_queue_are_free_again_after_a_wait(run: Runs) -> None:
    done = run([*COPY, matmul(), WAIT, matmul(), *COPY[1:], "%92 = vsyncadd [#allocation1], -16", WAIT, pop(2), pop(3)])
    assert done.dma_wait_cycles > 2 * V6E.latency("matmul_bf16")
    assert (done.stalls, done.cycles) == ({}, 10 + done.dma_wait_cycles)


def test_what_is_on_its_way_is_carried_into_the_next_stretch(tmp_path: Path) -> None:
    issue = Issue(parsed(tmp_path, ["%5 = vpow2.f32 %v1_v1", "%v2_v2 = vpop.eup %5"]), V6E)
    push, popping = (issue.add(Stretch(bundles=(address,), interest=(address,))) for address in (0, 1))
    state, left = issue.run(push, issue.start)[1], V6E.latency("eup") - 1
    assert issue.run(popping, state)[3:] == [left]
    assert issue.run(popping, issue.later(state, 3))[3:] == [left - 3]
    assert issue.later(state, left) is issue.start  # all has arrived


# --- states and their memo ---


def test_the_same_state_has_the_same_run(tmp_path: Path) -> None:
    """As the blocks do it: look up, count, go on in the state that the run leaves."""
    issue = Issue(parsed(tmp_path, [matmul()]), V5E)
    number = issue.add(Stretch(bundles=(0,), interest=(0,)))
    idle = issue.later(issue.start, 100)
    assert idle is issue.start
    first = issue.run(number, issue.start)
    assert issue.start.get(number) is first and first[3:] == [0]
    busy = issue.later(first[1], 3)
    assert busy is not first[1] and issue.later(first[1], 3) is busy and issue.later(first[1], 0) is first[1]
    held_up = issue.run(number, busy)
    assert held_up[3:] == [V5E.cadence("matmul_bf16") - 1 - 3]
    first[0], held_up[0] = 5, 2
    assert issue.stalls() == {(0, "MXU"): 2 * (V5E.cadence("matmul_bf16") - 4)}


def test_stalls_count_every_run_and_gaps_belong_to_the_branch(tmp_path: Path) -> None:
    program = ["%5 = vpow2.f32 %v1_v1", "%v2_v2 = vpop.eup %5", "%6 = vadd.xlane.f32.xlu0 %v2_v2"]
    program += ["%v4_v4 = vpop.xlane.xlu0 %6", "%s5_s5 = sld [smem:[%s8_s8]]", "%s6_s6 = sadd.s32 1, %s5_s5"]
    issue = Issue(parsed(tmp_path, program), V6E)
    run = issue.run(issue.add(Stretch(bundles=tuple(range(6)), gaps={5: 2})), issue.start)
    run[0] = 3
    causes = {"EUP": (1, "eup"), "XLU": (3, "reduce"), "scalar": (5, "sld")}
    expected = {(at, cause): 3 * (V6E.latency(name) - 1) for cause, (at, name) in causes.items()}
    assert issue.stalls() == expected | {(5, "branch"): 3 * 2}
    assert 3 * run[2] == 3 * 6 + sum(issue.stalls().values())


def test_a_state_is_known_by_what_is_pending_alone(tmp_path: Path) -> None:
    """Two ways to the same residue lead to one state."""
    issue = Issue(parsed(tmp_path, ["%v2_v2 = vadd.f32 %v1_v1, %v1_v1", "%v3_v2 = vmul.f32 %v1_v1, %v1_v1"]), V6E)
    adds, multiplies = (issue.add(Stretch(bundles=(address,))) for address in (0, 1))
    left = issue.run(adds, issue.start)[1]
    assert left.pending == {"v2": V6E.latency("valu") - 1}
    assert issue.run(multiplies, issue.start)[1] is left
    assert issue.run(adds, left)[1] is left
    assert issue.later(left, 50) is issue.start


def test_long_loops_are_timed_once_a_state(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Issue] = []

    class Spy(Issue):
        def __init__(self, dump: Dump, machine: Machine) -> None:
            super().__init__(dump, machine)
            made.append(self)

    monkeypatch.setattr(execute_module, "Issue", Spy)
    trips, product = 3000, "%7 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v1_v1"
    machine = replaced(V6E, {"matmul_bf16": 10})
    done = run(loop(trips, product), machine)
    (issue,) = made
    per_stretch: Counter[int] = Counter()
    for number, one in issue.runs:
        per_stretch[number] += one[0]
    assert sorted(per_stretch.values()) == [1, 1, trips]
    assert len(issue.runs) <= 8  # the first trips, then always the same
    assert done.stalls == {(1, "MXU"): (trips - 1) * 3}
    assert done.cycles == 1 + trips * 7 + (trips - 1) * 3 + 1


def test_what_a_run_takes_does_not_depend_on_how_often_it_is_asked_for(run: Runs) -> None:
    first, second = (run(loop(9, matmul())) for _ in range(2))
    assert first == second


# --- opcodes ---


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("sdivrem.u32", "sdivrem"),
        ("sld", "sld"),
        ("smul.u32", "smul"),
        ("smulhi.u32", "smul"),
        ("smov", "salu"),
        ("scalar_lea.vmem", "salu"),
        ("scmp.lt.s32.totalorder", "predicate"),
        ("sc.u32", "predicate"),
        ("pnand", "predicate_logic"),
        ("vsyncmov", "flag_read"),
        ("vsyncadd", "none"),
        ("vst", "none"),
        ("vst.msk", "none"),
        ("sbr.rel", "none"),
        ("vwait.ge.trace", "none"),
        ("dma.hbm_to_vmem", "none"),
        ("dma.done.wait", "none"),
        ("vpush", "vpush"),
        ("vpush.ccrf", "vpush"),
        ("vpow2.f32", "eup"),
        ("vpow.bf16", "eup"),
        ("verf.f32", "eup"),
        ("vpop.eup", "pop"),
        ("vpop.sfrf", "pop"),
        ("vpop.f32.mrf.mxu3", "mxu_pop"),
        ("vpop.s32.mrf.mxu0", "mxu_pop"),
        ("vpop.f32.mrb", "mxu_pop"),
        ("vpop.add.s32.mrf.mxu0.mxu1", "mxu_pop"),
        ("vpop.trf.xlu1", "transpose_pop"),
        ("vpop.xlane.xlu1", "xlu_pop"),
        ("vpop.permute.xlu1", "xlu_pop"),
        ("vmatmul.msk.f8e4m3b11.bf16.gmra.mxu3", "matmul"),
        ("vmatmul.mubr.bf16.gmra.mrb", "matmul"),
        ("vmatprep.mubr.f8e4m3fn.mxu1", "matprep"),
        ("vmatprep.subr.mxu1", "pushprep"),
        ("vmatpush.bf16.xpose.msra.mxu3", "push"),
        ("vadd.xlane.f32.xlu2", "reduce"),
        ("vmax.index.xlane.f32.xlu1", "index_reduce"),
        ("vxpose.binary.xlu0.c.b16.cont", "transpose"),
        ("vset.pattern.permute.xlu2", "pattern"),
        ("vperm.xlu1", "permute"),
        ("vrot.lane.b32.xlu2", "permute"),
        ("vperm.slane", "valu"),
        ("vrot.slane", "valu"),
        ("vmax.f32", "valu"),
        ("vpack.c.f32.eXmY", "valu"),
        ("vunpack.c.l.s8.bf16", "valu"),
        ("vmul.u32.u64.high", "valu"),
        ("vclamps-f32", "valu"),
        ("vld.sshfl", "load"),
        ("vcmp.eq.f32.partialorder", "mask"),
        ("vmor", "mask"),
        ("vcmask", "mask"),
        ("vsmask.f32", "mask"),
        ("vlaneseq", "mask"),
        ("vmpackc.low", "mask"),
        ("vc.u32", "mask"),
        ("vsel", "move"),
        ("vmov", "move"),
        ("vstv", "move"),
        ("vmand", "mask"),
        ("vfoo.f32", None),
        ("vpop.foo", None),
        ("vmystery", None),
        ("custom", None),
    ],
)
def test_class_of_an_opcode(opcode: str, kind: str | None) -> None:
    assert opcode_class(opcode) == kind


@pytest.mark.parametrize(
    "slot", ["%v2_v2 = vfoo.f32 %v1_v1", "%5 = vpush %v1_v1 ;; %v2_v2 = vquux %v1_v1", "%5 = vpop.foo %4"]
)
def test_an_unknown_vector_instruction_is_named_with_its_file_and_line(timed: Times, run: Runs, slot: str) -> None:
    opcode = {"vfoo": "vfoo.f32", "vquu": "vquux", "vpop": "vpop.foo"}[slot.split(" = ")[-1][:4]]
    message = rf"^1-op-03-final_bundles\.txt:3: unknown vector instruction: {opcode} %"
    for doing in (timed, run):
        with pytest.raises(UnknownOpcode, match=message):
            doing([LOAD, "{}", slot])
    assert issubclass(UnknownOpcode, ParseError)  # which the judge reports as a program that cannot be timed


def test_an_unknown_instruction_is_an_error_where_it_never_runs(run: Runs) -> None:
    program = [
        "%9 = sbr.rel target = $region5",
        *["{}"] * 4,
        "%v2_v2 = vfoo %v1_v1",
        "PF { %8 = sfence } /* Start region 5 */",
    ]
    with pytest.raises(UnknownOpcode, match=":6: unknown vector instruction: vfoo"):
        run(program)
