"""The analysis and its text on the golden dumps, with source lines set in; `prepare.py --explain` as users run it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from judge import explain, explain_text, explanation, roofline
from judge.chips import CHIPS, load_chip
from judge.compile import program_sha256
from judge.contract import check_source
from judge.llo.machine import load_machine
from judge.llo.module import ModuleCost, module_cost
from judge.llo.parse import parse_dump
from tests.golden.regenerate import GOLDEN as KERNELS

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SOURCE = "import jax\n\n    copy.wait()  # here\n"
CASES = tuple(KERNELS)
WAIT = "dma.done.wait [#allocation3], 512"


def explained(folder: Path, case: str, chip: str = "v5e") -> tuple[ModuleCost, explanation.Explanation]:
    facts = load_chip(chip)
    cost = module_cost(folder, load_machine(chip), KERNELS[case].scalars)
    figures = roofline.figures(
        seconds=cost.seconds,
        flops=1.0,
        compulsory_bytes=4096.0,
        moved_bytes=cost.hbm_bytes,
        peak_flops=1e12,
        chip=facts,
    )
    return cost, explanation.explain(folder, cost, figures, facts, SOURCE)


def copied(tmp_path: Path, case: str, *replacements: tuple[str, str]) -> Path:
    """The golden dump of v5e with passages replaced."""
    folder = tmp_path / "module"
    shutil.copytree(GOLDEN / case / "v5e", folder)
    (dump,) = folder.glob("*final_bundles.txt")
    text = dump.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    dump.write_text(text)
    return folder


def location(file: str, line: int) -> str:
    return f' /* loc("{file}":{line}:1 to :9) */'


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", CASES)
def test_every_cycle_is_accounted_for(case, chip):
    cost, one = explained(GOLDEN / case / chip, case, chip)
    assert sum(one.cycles_by_cause.values()) == pytest.approx(cost.cycles)
    assert min(one.cycles_by_cause.values()) >= 0
    beside = sum(op.cycles for op in one.xla_ops)
    assert one.cycles_by_cause[explanation.XLA_OPS] == pytest.approx(beside)
    assert sum(line.issue_cycles + line.stall_cycles for line in one.lines) == pytest.approx(cost.cycles - beside)
    assert sum(line.issue_cycles for line in one.lines) == pytest.approx(one.cycles_by_cause["issue"])
    assert sum(wait.cycles for wait in one.waits) == one.cycles_by_cause["DMA wait"]
    assert all(0 <= percent <= 100 for percent in one.occupancy_pct.values())


def test_copies_bytes_and_buffers():
    cost, one = explained(GOLDEN / "semaphores" / "v5e", "semaphores")
    known = KERNELS["semaphores"]
    assert one.hbm_bytes == known.read_bytes + known.written_bytes == 2 * 8 * 512 * 4
    assert one.compulsory_bytes == pytest.approx(4096)
    assert (one.dma_count, one.dma_mean_bytes) == (2, 8 * 512 * 4)
    assert one.hbm_gb_per_s == pytest.approx(one.hbm_bytes / cost.seconds / 1e9)
    assert [buffer.size_bytes for buffer in one.vmem] == [72 * 128 * 4, 8 * 512 * 4]
    assert [wait.count for wait in one.waits if wait.copies] == [1, 1]
    assert {wait.copy_kinds for wait in one.waits if wait.copies} == {("hbm_to_vmem", "vmem_to_hbm")}
    (scratch,) = (f"{buffer.shape} {buffer.tag}" for buffer in one.vmem if buffer.tag.startswith("scratch"))
    assert {wait.buffers for wait in one.waits if wait.copies} == {(scratch,)}
    assert f": {scratch}, hbm_to_vmem and vmem_to_hbm of 16 KiB" in "\n".join(explain_text.render("one", one, None))
    assert one.bound == "DMA-bound"
    assert one.xla_ops == []


def test_a_wait_is_charged_to_its_line(tmp_path):
    plain = explained(GOLDEN / "semaphores" / "v5e", "semaphores")[1]
    assert [line.text for line in plain.lines] == [explanation.NO_SOURCE]
    folder = copied(tmp_path, "semaphores", (WAIT, WAIT + location("/tmp/x/trace/kernel.py", 3)))
    one = explained(folder, "semaphores")[1]
    assert one.cycles_by_cause == plain.cycles_by_cause
    waits = [wait for wait in one.waits if wait.copies]
    (line,) = (line for line in one.lines if line.line is not None)
    assert {wait.line for wait in waits} == {3}
    assert (line.line, line.text, line.issue_cycles) == (3, "copy.wait()  # here", 2)
    assert line.stall_cycles == sum(wait.cycles for wait in waits) > 0
    assert line == one.lines[0]


def test_other_files_are_no_kernel_lines(tmp_path):
    folder = copied(tmp_path, "semaphores", (WAIT, WAIT + location("/site-packages/jax/primitives.py", 3)))
    one = explained(folder, "semaphores")[1]
    assert all(line.line is None for line in one.lines)
    assert {line.text for line in one.lines} == {"in primitives.py", explanation.NO_SOURCE}


def test_lines_of_one_bundle_share_its_cycles(tmp_path):
    old = "%26 = vsyncadd [#allocation4], 3  ;;  %s145_s11 = smov 0"
    marked = [part + location("k/kernel.py", i) for i, part in enumerate(old.split("  ;;  "), 1)]
    one = explained(copied(tmp_path, "semaphores", (old, "  ;;  ".join(marked))), "semaphores")[1]
    assert {line.line: line.issue_cycles for line in one.lines if line.line} == {1: 0.5, 2: 0.5}


def test_source_lines_of_slots_and_what_is_none(tmp_path):
    path = tmp_path / "1-op-03-final_bundles.txt"
    path.write_text(
        f"0 : {{ %1 = sbr.rel (%p1_p0){location('/a b/kernel.py', 12)} target = $region3  ;;  %2 = sfence }}\n"
        '0x1 : { %s1_s0 = sphi %s2_s1 /* phi copy :: loc("k.py":3:9 to :26) */  ;;  '
        '%3 = shalt.err (!%p2_p1) /* BoundsCheck /* loc("k.py":4:1 to 5:2) :: operand 1 */ */ }\n'
        '0x2 : { %4 = vwait.ge [#allocation1], 0 /* note */ /* loc("kernel.py":7:1 to 9:2) */ } /* Start region 3 */\n'
    )
    slots = [slot for bundle in parse_dump(path).bundles for slot in bundle.slots]
    assert [slot.source for slot in slots] == [("kernel.py", 12), None, None, None, ("kernel.py", 7)]
    assert [slot.rest for slot in slots] == [
        "(%p1_p0) target = $region3",
        "",
        "%s2_s1",
        "(!%p2_p1)",
        "[#allocation1], 0",
    ]


def test_source_lines_do_not_change_the_hash_of_a_program(tmp_path):
    plain = program_sha256(GOLDEN / "semaphores" / "v5e")
    marked = copied(tmp_path, "semaphores", (WAIT, WAIT + location("/tmp/kernel.py", 3)))
    assert program_sha256(marked) == plain
    other = copied(tmp_path / "other", "semaphores", (WAIT, WAIT.replace("512", "513")))
    assert program_sha256(other) != plain


def test_spills_count_as_often_as_they_run(tmp_path):
    folder = copied(tmp_path, "nested_loops")
    cost, one = explained(folder, "nested_loops")
    assert (one.spills_executed, one.fills_executed, one.hot_fill_pct) == (0, 0, 0)
    execution = cost.ops[-1].execution
    assert execution is not None
    block, runs = execution.bundle_runs.most_common(1)[0]
    assert runs > 1
    (table,) = folder.glob("*utilization.txt")
    lines = table.read_text().splitlines()
    units, first = lines[1].split(", "), lines.index("== UTILIZATION:") + 1
    row = lines[first + block].split()
    for unit, slots in (("VLOAD", "2"), ("VLOAD:FILL", "1"), ("VSTORE:SPILL", "1")):
        row[units.index(unit)] = slots
    lines[first + block] = " ".join(row)
    table.write_text("\n".join(lines) + "\n")
    one = explained(folder, "nested_loops")[1]
    assert (one.spills_executed, one.fills_executed) == (runs, runs)
    assert 0 < one.hot_fill_pct <= 50


def test_what_changed():
    one = explained(GOLDEN / "semaphores" / "v5e", "semaphores")[1]
    assert explanation.changes(one, one) == {}
    now = dataclasses.replace(one, dma_count=7, cycles_by_cause=one.cycles_by_cause | {"XLU": 5.0})
    assert explanation.changes(now, one) == {"XLU cycles": (0.0, 5.0), "dma_count": (2, 7)}
    assert "XLU cycles 0 → 5, dma_count 2 → 7" in "\n".join(explain_text.render("default", now, one))


@pytest.mark.parametrize("case", CASES)
def test_a_workload_fits_its_part_of_the_screen(case):
    one = explained(GOLDEN / case / "v5e", case)[1]
    lines = explain_text.render("default", one, one)
    assert len(lines) <= 16
    assert max(map(len, lines)) <= 120


# --- the command ---


def test_another_problem_is_not_compared(tmp_path):
    text = (ROOT / "tests" / "kernels" / "scaled_add.py").read_text()
    path = tmp_path / "kernel.py"
    path.write_text(text)
    subject = explain.kernel_file(ROOT, path, "v5e")
    assert subject.champion is None
    assert "another problem" in subject.note
    assert "not compared" in explain.kernel_file(tmp_path, path, "v5e").note  # no repository
    assert subject.source.definitions == check_source(text.encode(), "kernel.py").definitions


def test_explaining_experiments(project, tmp_path_factory):
    none = project.prepare("--explain", "--json")
    assert none.code == 2
    assert "run ./ratchet.sh first" in none.err
    assert project.ratchet("as it is").code == 0
    kept = tmp_path_factory.mktemp("kept")
    alone = project.prepare("--explain", "--keep", str(kept))
    assert alone.code == 0, alone.out + alone.err
    assert "nothing to compare with" in alone.out
    assert list(kept.glob("compile/default/*-final_bundles.txt"))
    project.edit("BLOCK = 32", "BLOCK = 64")
    project.ratchet("larger blocks")
    state = project.state()
    done = project.prepare("--explain", "--json")
    assert done.code == 0, done.out + done.err
    assert project.state() == state
    found = json.loads(done.out.splitlines()[-1])
    assert found["subject"].startswith("experiment 2 ")
    assert found["champion"].startswith("row 1 ")
    one = found["workloads"]["default"]
    assert sum(one["cycles_by_cause"].values()) == pytest.approx(one["cycles"])
    text = project.kernel.read_text().splitlines()
    assert any(line["line"] and "out_ref[...] =" in text[line["line"] - 1] for line in one["lines"])
    assert found["changes"]["default"]["dma_count"]["champion"] > one["dma_count"] > 0


@pytest.mark.parametrize(
    ("replaced", "status"),
    [
        (("KERNEL_NAME =", "NAME ="), "FAIL_CONTRACT"),
        (("def body(", "def body(("), "FAIL_CONTRACT"),
        (("BLOCK = 32", "BLOCK = 1 // 0"), "FAIL_CRASH"),
    ],
)
def test_what_cannot_be_explained(project, replaced, status):
    project.edit(*replaced)
    done = project.prepare("--explain", "--kernel", "kernel.py", "--json")
    assert done.code == 1, done.out + done.err
    found = json.loads(done.out.splitlines()[-1])
    assert found["status"] == status
    assert found["reason"]
    assert "Traceback" not in done.out + done.err


@pytest.mark.parametrize("arguments", [("--explain", "--audit"), ("--explain", "--mode", "chip")])
def test_options_that_exclude_each_other(project, arguments):
    done = project.prepare(*arguments)
    assert done.code == 2
    assert "error:" in done.err
