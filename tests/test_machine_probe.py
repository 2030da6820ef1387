"""benchmarks/machine_probe.py: what a critical path says of latencies, cadences and copies."""

from collections import Counter, defaultdict

from benchmarks.machine_probe import Finding, collect, probe

PATH = """Length to end: 300, %1_v1 = vadd.f32 %8_v8, %9_v9
Length to end: 298, %2_v2 = vmul.f32 %1_v1, %9_v9
Length to end: 297, %3 = vadd.xlane.f32.xlu0 %7_v7
Length to end: 289, %4 = vadd.xlane.f32.xlu0 %6_v6
Length to end: 288, %5 = vadd.xlane.f32.xlu1 %5_v5
Length to end: 173, %6_v6 = vpop.xlane.xlu1 %5
a line of another kind
Length to end: 172, %7 = dma.hbm_to_vmem /*hbm=*/%1_s1, /*size_in_granules=*/64, /*dst_syncflagno=*/%2_s2
Length to end: 52, %8 = dma.done.wait %2_s2, 64
""".splitlines()


def collected(lines):
    seen, copies = defaultdict(Counter), defaultdict(dict)
    collect(lines, seen, copies)
    return seen, copies


def test_a_line_that_reads_the_one_before_tells_its_latency():
    seen, _ = collected(PATH)
    assert seen["latency.valu"] == {2: 1}
    assert seen["latency.reduce"] == {115: 1}


def test_neighbours_on_one_unit_tell_its_cadence_and_other_units_nothing():
    seen, _ = collected(PATH)
    assert seen["cadence.reduce_to_reduce"] == {8: 1}


def test_weights_and_transposed_rows_tell_latencies_of_their_units():
    seen, _ = collected(
        """Length to end: 90, %1 = vmatpush3.bf16.xpose.msra.mxu0 %7_v7
Length to end: 83, %2 = vmatmul.mubr.bf16.vlgmr.msra.gmra.mxu0 %8_v8
Length to end: 80, %3 = vxpose.xlu1.b32.cont [2/3] /*vx=*/%8_v8
Length to end: 76, %4 = vxpose.xlu1.b32.end [3/3] /*vx=*/%9_v9
Length to end: 12, %5_v5 = vpop.trf.xlu1
Length to end: 11, %6 = vmatpush.msra.mxu0 %7_v7
Length to end: 10, %7 = vmatmul.f32.vlgmr.msrb.gmra.mxu0 %7_v7""".splitlines()
    )
    assert seen["latency.push_xpose_bf16"] == {7: 1}
    assert seen["cadence.transpose_to_transpose"] == {4: 1}
    assert seen["latency.transpose"] == {64: 1}
    assert "latency.push_f32" not in seen  # other weights


def test_the_least_counts_and_for_transposes_the_most(tmp_path):
    adds = [f"Length to end: {left}, %1_v1 = vadd.f32 %8_v8, %9_v9" for left in (9, 9)]
    slow, fast = ([adds[0], f"Length to end: {9 - d}, %2_v2 = vmul.f32 %1_v1, %9_v9"] for d in (5, 2))
    ends = [
        [f"Length to end: {d + 9}, %4 = vxpose.xlu1.b32.end %9_v9", "Length to end: 9, %5_v5 = vpop.trf.xlu1"]
        for d in (4, 20, 44)
    ]
    (tmp_path / "k_critical_path.txt").write_text(
        "\n".join(slow * 9 + fast * 4 + [line for pair in ends for line in pair] * 4)
    )
    findings = {one.name: one for one in probe("v5e", tmp_path.iterdir())}
    assert (findings["latency.valu"].derived, findings["latency.transpose"].derived) == (2, 44)


def test_a_copy_and_its_wait_tell_the_copys_time_by_size():
    _, copies = collected(PATH)
    assert copies == {"hbm_to_vmem": {64 * 32: 120}}


def test_what_was_seen_too_seldom_is_not_derived_and_what_repeats_is(tmp_path):
    (tmp_path / "k_critical_path.txt").write_text("\n".join(PATH[:2] * 4))
    findings = {one.name: one for one in probe("v5e", tmp_path.iterdir())}
    assert (findings["latency.valu"].derived, findings["latency.valu"].verdict) == (2, "agrees")
    assert findings["latency.reduce"].verdict == "not seen"


def test_a_number_that_differs_disagrees():
    assert Finding(chip="v5e", name="latency.valu", committed=2, derived=3, seen=9).verdict == "DISAGREES"
    assert Finding(chip="v5e", name="dma.hbm_to_vmem.bytes_per_cycle", committed=491, derived=490, seen=2).verdict == (
        "agrees"
    )
