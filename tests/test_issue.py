"""judge/llo/issue.py: tiny schedules, each with one reason to wait; what is expected follows from the machine data."""

import dataclasses

import pytest

from judge.llo.issue import Issue, Stretch, UnknownOpcode, opcode_class
from judge.llo.machine import load_machine
from judge.llo.parse import parse_dump

V5E, V6E, TPU7X = (load_machine(chip) for chip in ("v5e", "v6e", "tpu7x"))


@pytest.fixture
def issue(tmp_path):
    """An Issue over bundles given as the text between their braces."""

    def issue(bundles, machine=V5E):
        path = tmp_path / "1-op-03-final_bundles.txt"
        lines = [f"{f'{i:#x}' if i else '0'} : {{ {text} }}" for i, text in enumerate(bundles)]
        path.write_text("\n".join(lines) + "\n")
        return Issue(parse_dump(path), machine)

    return issue


@pytest.fixture
def offsets(issue):
    """When each bundle issues, all in one stretch."""

    def offsets(bundles, machine=V5E):
        every = tuple(range(len(bundles)))
        timed = issue(bundles, machine)
        return timed.run(timed.add(Stretch(bundles=every, interest=every)), timed.start)[3:]

    return offsets


def filler(count):
    return ["%9_v60 = vmov 0.0"] * count


@pytest.mark.parametrize(
    ("producer", "consumer", "name"),
    [
        ("%1_v1 = vadd.f32 %8_v8, %8_v8", "%2_v2 = vadd.f32 %1_v1, %8_v8", "valu"),
        ("%1_v1 = vld [vmem:[%8_s8] sm:$0xff]", "%2_v2 = vadd.f32 %1_v1, %8_v8", "load"),
        ("%1_s1 = sld [smem:[%8_s8]]", "%2_s2 = sadd.s32 1, %1_s1", "sld"),
        ("%1_s1 = smul.u32 3, %8_s8", "%2_s2 = sadd.s32 1, %1_s1", "smul"),
        ("%1_p1 = scmp.eq.s32.totalorder %8_s8, 0", "%2_p2 = por %1_p1, %8_p8", "predicate"),
        ("%1_p1 = por %7_p7, %8_p8", "%2_p2 = pnand %1_p1, %8_p8", "predicate_logic"),
        ("%1 = vpow2.f32 %8_v8", "%2_v2 = vpop.eup %1", "eup"),
        ("%1 = vadd.xlane.f32.xlu0 %8_v8", "%2_v2 = vpop.xlane.xlu0 %1", "reduce"),
        ("%1 = vperm.xlu0 /*pattern=*/%7, /*source=*/%8_v8", "%2_v2 = vpop.permute.xlu0 %1", "permute"),
        ("%1 = vperm.xlu2 /*pattern=*/%7, /*source=*/%8_v8", "%2_v2 = vpop.permute.xlu2 %1", "permute_xlu2"),
        ("%1 = vpush %8_v8", "%2_s2 = spop %1", "vpush"),
    ],
)
def test_a_result_may_be_used_after_its_latency(offsets, producer, consumer, name):
    latency = V5E.latencies[name]
    assert offsets([producer, consumer]) == [0, latency]
    # time that passes anyway is not paid twice
    assert offsets([producer, *filler(latency + 3), consumer])[-1] == latency + 4


def test_a_guard_costs_nothing(offsets):
    compare, guarded = "%1_p1 = scmp.eq.s32.totalorder %8_s8, 0", "%2_s2 = sadd.s32 (%p1_p1), 1, %8_s8"
    assert offsets([compare, guarded.replace("%p1_p1", "%1_p1")]) == [0, 1]


def test_an_xlu_takes_the_next_after_its_cadence_each_unit_its_own(offsets):
    reduce = "%{} = vadd.xlane.f32.xlu{} %8_v8"
    cadence = V5E.cadence("reduce_to_reduce")
    assert offsets([reduce.format(i, 0) for i in range(3)]) == [0, cadence, 2 * cadence]
    assert offsets([reduce.format(i, i) for i in range(3)]) == [0, 1, 2]


def test_an_xlu_takes_longer_to_turn_from_reductions_to_permutes(offsets):
    program = ["%1 = vadd.xlane.f32.xlu0 %8_v8", "%2 = vperm.xlu0 /*pattern=*/%7, /*source=*/%8_v8"]
    assert offsets(program) == [0, V5E.cadence("reduce_to_permute")]
    assert V5E.cadence("reduce_to_permute") > V5E.cadence("reduce_to_reduce")


def test_matmuls_follow_at_their_cadence_and_results_are_popped_in_order(offsets):
    program = [f"%{i} = vmatmul.bf16.gmra.mxu0 %8_v8" for i in (1, 2)]
    program += [f"%{i}_v{i} = vpop.f32.mrf.mxu0" for i in (3, 4, 5, 6)]  # two a matmul, says the schedule
    cadence, first = V5E.cadence("matmul_bf16"), V5E.latency("matmul_bf16")
    spacing = V5E.cadence("mxu_pop_bf16")
    expected = [0, cadence, first, first + spacing, max(first + 2 * spacing, cadence + first)]
    assert offsets(program)[:5] == expected


def test_a_pop_that_adds_takes_a_result_of_each_unit(offsets):
    program = ["%1 = vmatmul.mubr.s8.gmra.mxu0 %8_v8  ;;  %2 = vmatmul.mubr.s8.gmra.mxu1 %8_v8"]
    program += ["%3_v3 = vpop.add.s32.mrf.mxu0.mxu1"]
    assert offsets(program, V6E) == [0, V6E.latency("matmul_int8")]


def test_results_that_nobody_pops_are_an_error_and_not_an_endless_run(issue):
    timed = issue(["%1 = vmatmul.bf16.gmra.mxu0 %8_v8"])
    number, state = timed.add(Stretch(bundles=(0,) * 5000)), timed.start
    with pytest.raises(UnknownOpcode, match="results of mxu0 are not popped"):
        timed.run(number, state)


def test_weights_are_pushed_in_pairs_where_the_chip_has_two_ports(offsets):
    program = [f"%{i} = vmatpush1.bf16.msra.mxu0 %8_v8" for i in range(4)]
    cycles = V6E.cadence("push_bf16")
    assert offsets(program, V6E) == [0, 1, cycles, cycles + 1]
    program = [f"%{i} = vmatpush.bf16.msra.mxu0 %8_v8" for i in range(3)]
    assert offsets(program) == [0, V5E.cadence("push_bf16"), 2 * V5E.cadence("push_bf16")]


def test_addressed_results_are_awaited_by_address(offsets):
    program = ["%1 = vmatmul.mubr.bf16.gmra.mrb [4].mxu0 %8_v8", "%2_v2 = vpop.f32.mrb [4].mxu0"]
    assert offsets(program, TPU7X) == [0, TPU7X.latency("matmul_bf16")]
    assert offsets([program[0], "%2_v2 = vpop.f32.mrb [0].mxu0"], TPU7X) == [0, 1]


def test_a_transpose_gives_its_rows_behind_the_last(offsets):
    program = ["%1 = vxpose.xlu0.b32.start [1/2] /*vx=*/%8_v8", "%2 = vxpose.xlu0.b32.end [2/2] /*vx=*/%8_v8"]
    program += ["%3_v3 = vpop.trf.xlu0", "%4_v4 = vpop.trf.xlu0"]
    end, first = V5E.cadence("transpose_to_transpose"), V5E.latency("transpose")
    assert offsets(program) == [0, end, end + first, end + first + V5E.cadence("transpose_pop")]


def test_what_is_on_its_way_is_carried_into_the_next_stretch(issue):
    timed = issue(["%1 = vpow2.f32 %8_v8", "%2_v2 = vpop.eup %1"])
    first, second = (timed.add(Stretch(bundles=(i,), interest=(i,))) for i in (0, 1))
    state = timed.run(first, timed.start)[1]
    assert state is not timed.start
    assert timed.run(second, state)[3] == V5E.latency("eup") - 1
    waited = timed.later(state, 3)
    assert timed.run(second, waited)[3] == V5E.latency("eup") - 1 - 3
    assert timed.later(state, 1000) is timed.start  # all has arrived


def test_a_stretch_is_timed_once_a_state(issue):
    timed = issue(["%1_v1 = vadd.f32 %8_v8, %8_v8", "%2_v2 = vadd.f32 %1_v1, %8_v8"])
    number = timed.add(Stretch(bundles=(0, 1)))
    run = timed.run(number, timed.start)
    assert timed.start.get(number) is run and len(timed.runs) == 1


def test_bundles_and_stalls_are_all_the_cycles_and_each_stall_has_a_cause(issue):
    program = ["%1 = vpow2.f32 %8_v8", "%2_v2 = vpop.eup %1", "%3 = vadd.xlane.f32.xlu0 %2_v2"]
    program += ["%4_v4 = vpop.xlane.xlu0 %3", "%5_s5 = sld [smem:[%8_s8]]", "%6_s6 = sadd.s32 1, %5_s5"]
    timed = issue(program)
    run = timed.run(timed.add(Stretch(bundles=tuple(range(6)), gaps={5: 2})), timed.start)
    run[0] = 3
    stalls = timed.stalls()
    assert sum(stalls.values()) == 3 * (run[2] - 6)
    assert {cause for _, cause in stalls} == {"EUP", "XLU", "scalar", "branch"}
    assert stalls[1, "EUP"] == 3 * (V5E.latency("eup") - 1)


def test_an_unknown_instruction_is_named_with_file_and_line(issue):
    timed = issue(["%1_v1 = vmov 0.0", "%2_v2 = vfrobnicate.f32 %1_v1"])
    with pytest.raises(UnknownOpcode, match=r"1-op-03-final_bundles.txt:2: .*vfrobnicate"):
        timed.run(timed.add(Stretch(bundles=(0, 1))), timed.start)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("vmax.index.xlane.f32.xlu1", "index_reduce"),
        ("vrot.lane.b32.xlu2", "permute"),
        ("vrot.slane", "valu"),
        ("vpop.f32.mrb", "mxu_pop"),
        ("vpop.sfrf", "pop"),
        ("vst.msk", "none"),
        ("vstv", "move"),
        ("vmand", "mask"),
        ("vpow.bf16", "eup"),
        ("vmatprep.subr.bf16.mxu0", "pushprep"),
        ("scalar_lea.hbm", "salu"),
        ("vfrobnicate", None),
    ],
)
def test_opcode_classes(opcode, expected):
    assert opcode_class(opcode) == expected


def test_the_compilers_rule_has_the_compilers_latencies(offsets):
    program = ["%1_p1 = por %7_p7, %8_p8", "%2_p2 = pnand %1_p1, %8_p8"]
    assert offsets(program, load_machine("v5e", "compiler")) == [0, 2]
    assert offsets(program, dataclasses.replace(V5E, latencies=V5E.latencies | {"predicate_logic": 5})) == [0, 5]
