"""judge/llo/parse.py on hand-written lines and on the golden dumps of every chip."""

from pathlib import Path

import pytest

from judge.chips import CHIPS
from judge.llo.parse import Dump, ParseError, parse_allocations, parse_dump, parse_utilization

GOLDEN = Path(__file__).resolve().parent / "golden"
KEY = "= control target key start\nLB: loop body\nPF: predicated region fallthrough\n= control target key end\n\n"


def parsed(tmp_path: Path, text: str) -> Dump:
    path = tmp_path / "1-op-03-final_bundles.txt"
    path.write_text(KEY + text)
    return parse_dump(path)


def test_bundles_slots_and_registers(tmp_path):
    dump = parsed(
        tmp_path,
        "     0   :  { %s1_s0 = smov 3  ;;  %v2_v61 = vld [vmem:[#allocation0 + $0x8] sm:$0xff]  ;;  %7 = sfence }\n"
        "   0x1 LB: > > { %p3_p10 = scmp.ge.s32.totalorder %s1_s0, 5 }\n"
        "   0x2   :  {}\n"
        "   0x3 PF:  { %vm4_vm2 = vcmask 15  ;;  %3 = sbr.rel (!%p3_p10) target = $region7 }\n",
    )
    assert [bundle.address for bundle in dump.bundles] == [0, 1, 2, 3]
    assert [bundle.label for bundle in dump.bundles] == ["", "LB", "", "PF"]
    assert [bundle.depth for bundle in dump.bundles] == [0, 2, 0, 0]
    assert [bundle.line for bundle in dump.bundles] == [6, 7, 8, 9]
    first = dump.bundles[0].slots
    assert [(slot.register, slot.result, slot.opcode, slot.rest) for slot in first] == [
        ("s0", "s1", "smov", "3"),
        ("v61", "v2", "vld", "[vmem:[#allocation0 + $0x8] sm:$0xff]"),
        (None, "7", "sfence", ""),
    ]
    assert dump.bundles[2].slots == ()
    assert [slot.register for slot in dump.bundles[3].slots] == ["vm2", None]


def test_named_arguments_survive_their_comments(tmp_path):
    dump = parsed(tmp_path, "0 : { %1 = dma.hbm_to_vmem /*hbm=*/%s2_s1, /*size_in_granules=*/16 /* note */ }\n")
    assert dump.bundles[0].slots[0].rest == "hbm=%s2_s1, size_in_granules=16"


@pytest.mark.parametrize("kind", ["kDiv", "kRem", "kDivAndRem"])
def test_kind_of_division_survives_its_comment(tmp_path, kind):
    dump = parsed(tmp_path, f"0 : {{ %1 = sdivrem.u32 %s2_s1, %s3_s2 /* {kind} */ }}\n")
    assert dump.bundles[0].slots[0].rest == f"%s2_s1, %s3_s2 , kind={kind}"


def test_kind_of_division_is_told_beside_its_source(tmp_path):
    dump = parsed(
        tmp_path,
        '0 : { %1 = sdivrem.u32 %s2_s1, 3 /* loc("/t/kernel.py":260:9 to :18) :: kDivAndRem */  ;;  %2 = sfence }\n',
    )
    slot = dump.bundles[0].slots[0]
    assert (slot.rest, slot.source) == ("%s2_s1, 3 , kind=kDivAndRem", ("kernel.py", 260))


def test_comments_nest_and_span_lines(tmp_path):
    dump = parsed(
        tmp_path,
        "0 : { %1 = shalt.err (!%p2_p1) /* BoundsCheck for %9 = dma.hbm_to_vmem /*hbm=*/%s1, /* deeper }\n"
        "*/ hlo: {fusion}\n"
        " */ } /* Start region 4 */\n"
        "0x1 : {} /* End region 4 */\n",
    )
    assert len(dump.bundles) == 2
    assert [slot.opcode for slot in dump.bundles[0].slots] == ["shalt.err"]
    assert dump.bundles[0].slots[0].rest == "(!%p2_p1)"
    assert dump.region_address == {4: 0}


def test_a_slot_names_the_line_that_it_comes_from(tmp_path):
    dump = parsed(
        tmp_path,
        '0 : { %v2_v1 = vadd.f32 %v1_v0, %v1_v0 /* loc("/a/b c/kernel.py":12:8 to :30) */  ;;  %7 = sfence  ;;  '
        '%v3_v2 = vld /* loc("kernel.py":7:0) */ [vmem:[%s1_s1] sm:$0xff] /* note */ }\n'
        "0x1 : { %8 = sfence /* loc(unknown) */ }\n"
        '0x2 : { %9 = shalt.err (!%p2_p1) /* BoundsCheck /* loc("other.py":3:1) */ more */ }\n',
    )
    slots = [slot for bundle in dump.bundles for slot in bundle.slots]
    assert [slot.source for slot in slots] == [("kernel.py", 12), None, ("kernel.py", 7), None, None]
    assert [slot.rest for slot in slots] == ["%v1_v0, %v1_v0", "", "[vmem:[%s1_s1] sm:$0xff]", "", "(!%p2_p1)"]


def test_braces_inside_a_slot(tmp_path):
    dump = parsed(tmp_path, "0 : { %s1_s0 = inlined_call_operand.hbm [shape: f32[8], index: 0, shape index: {}] }\n")
    assert dump.bundles[0].slots[0].rest.endswith("shape index: {}]")


def test_regions_that_start_and_end(tmp_path):
    dump = parsed(
        tmp_path,
        "0 : { %1 = sfence } /* Start region 1 :: Start region 2 */\n"
        "0x1 : { %2 = sfence } /* Start region 3 :: End region 3 :: End region 2 */\n"
        "0x2 : { %3 = sfence } /* Start/End empty region 5 */\n"
        "0x3 : { %4 = sfence } /* Start region 6 :: End region 6 */\n",
    )
    assert dump.region_address == {1: 0, 2: 0, 3: 1, 5: 2, 6: 3}
    assert [bundle.opens_region for bundle in dump.bundles] == [True, True, False, True]
    assert [bundle.ends for bundle in dump.bundles] == [(), (2,), (), ()]


def test_several_regions_may_end_at_once(tmp_path):
    dump = parsed(
        tmp_path,
        "0 : { %1 = sfence } /* Start region 1 :: Start region 2 :: Start region 3 */\n"
        "0x1 : {} /* End region 3 */\n"
        "0x2 : { %2 = sfence } /* Start region 4 :: End region 4 :: End region 2 :: End region 1 */\n",
    )
    assert [bundle.ends for bundle in dump.bundles] == [(), (3,), (2, 1)]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("0 : {}\n0x2 : {}\n", 7, "address 0x2 where 0x1 was expected"),
        ("0x1 : {}\n", 6, "address 0x1 where 0x0 was expected"),
        ("0 : {}\n0x1 : {}\n0x1 : {}\n", 8, "address 0x1"),
        ("0 : {}\nnow something else\n", 7, "not a bundle: 'now something else'"),
        ("0 : { %1 = sfence\n", 6, "not a bundle"),
        ("0 : { s1 = smov 3 }\n", 6, "not an instruction: 's1 = smov 3'"),
        ("0 : { %s1_s0 = 3 }\n", 6, "not an instruction"),
        ("0 : {} */\n", 6, "a comment ends that never began"),
    ],
)
def test_text_that_does_not_fit_is_an_error_with_file_and_line(tmp_path, text, line, message):
    with pytest.raises(ParseError, match=r"1-op-03-final_bundles\.txt") as error:
        parsed(tmp_path, text)
    assert f":{line}: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("", "no bundles"), ("0 : {} /* on and on\n", "a comment never ends")])
def test_a_dump_that_stops_short(tmp_path, text, message):
    with pytest.raises(ParseError, match=message):
        parsed(tmp_path, text)


def test_allocations(tmp_path):
    path = tmp_path / "allocations.txt"
    path.write_text(
        "a heading\n"
        "  #allocation0 [shape = 'f32[8,128]{1,0:T(8,128)}', space=vmem, size = 0x1000, scoped, tag = 'input window']\n"
        "  #allocation1 [shape = 'u8[0]{0}', space=vmem, size = 0, scoped, tag = 'nothing']\n"
        "  #allocation2 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x44, fixed_abs, tag = 'assertion arg 0']\n"
        "  #allocation3 [shape = 's32[]', space=sflag, size = 0x4, offset = 0, fixed_abs]\n"
        "  #allocation4_spill [shape = 'u32[]', space=smem, size = 0x4, scoped]\n"
        "  %s1 = smov [#allocation0]\n"
    )
    found = parse_allocations(path)
    assert [(a.name, a.space, a.size_bytes, a.tag, a.fixed, a.offset_bytes) for a in found.values()] == [
        ("allocation0", "vmem", 4096, "input window", False, 0),
        ("allocation1", "vmem", 0, "nothing", False, 0),
        ("allocation2", "smem", 4, "assertion arg 0", True, 0x44),
        ("allocation3", "sflag", 4, "", True, 0),
        ("allocation4_spill", "smem", 4, "", False, 0),
    ]


def test_an_allocation_that_does_not_fit_is_an_error_with_file_and_line(tmp_path):
    path = tmp_path / "allocations.txt"
    path.write_text("\n  #allocation0 [shape = 'f32[8]', space=vmem]\n")
    with pytest.raises(ParseError, match=r"allocations\.txt:2: not an allocation"):
        parse_allocations(path)


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "utilization.txt"
    path.write_text(text)
    return path


def test_utilization(tmp_path):
    text = "== CAPACTIY:\nMXU, XLU, VLOAD:FILL\n  4   3   2\n== UTILIZATION:\n0 0 0\n1 2 0\n\n"
    capacity, rows = parse_utilization(table(tmp_path, text))
    assert capacity == {"MXU": 4, "XLU": 3, "VLOAD:FILL": 2}
    assert rows == [(0, 0, 0), (1, 2, 0)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "== CAPACTIY:\nMXU, XLU\n",
        "== CAPACTIY:\nMXU, XLU\n 4 3 2\n== UTILIZATION:\n0 0\n",
        "== CAPACTIY:\nMXU, XLU\n 4 3\n",
        "== CAPACTIY:\nMXU, XLU\n 4 3\n== UTILIZATION:\n0 0\n0\n",
        "== CAPACTIY:\nMXU, XLU\n 4 3\n== UTILIZATION:\n0 0 0\n",
        "== CAPACTIY:\nMXU, XLU\n 4 3\n== UTILIZATION:\n0 many\n",
    ],
)
def test_a_table_that_does_not_fit_is_an_error_with_its_file(tmp_path, text):
    with pytest.raises(ParseError, match=r"utilization\.txt"):
        parse_utilization(table(tmp_path, text))


@pytest.mark.parametrize("chip", CHIPS)
def test_golden_dumps_of_every_chip(chip):
    dumps = sorted(GOLDEN.glob(f"*/{chip}/*-final_bundles.txt"))
    assert len(dumps) >= 6
    for path in dumps:
        dump = parse_dump(path)
        stem = path.name.removesuffix("03-final_bundles.txt")
        capacity, rows = parse_utilization(path.with_name(stem + "01-final_hlo-static-per-bundle-utilization.txt"))
        allocations = parse_allocations(path.with_name(stem + "00-pre-finalize-registers-and-allocations.txt"))
        assert len(rows) == len(dump.bundles) > 20
        assert all(used <= most for row in rows for used, most in zip(row, capacity.values(), strict=True))
        assert any(allocation.space == "sflag" and not allocation.fixed for allocation in allocations.values())
        copies = [slot for bundle in dump.bundles for slot in bundle.slots if slot.opcode.startswith("dma.hbm_to_vmem")]
        assert copies and all("size_in_granules=" in slot.rest for slot in copies)
