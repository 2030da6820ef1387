"""judge/llo/module.py: whole modules, hand-written ones and kernels that the real compiler compiles for every chip."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from judge.chips import CHIPS, load_chip
from judge.compile import op_of_dump
from judge.llo.execute import ExecutionError
from judge.llo.ici import collective_seconds
from judge.llo.machine import load_machine
from judge.llo.module import _in_memory, _words, module_cost, parse_entry
from judge.llo.parse import ParseError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
V5E = load_machine("v5e")
ENTRY = """HloModule jit_f

%fused (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (a: f32[8]) -> f32[8] {
"""


def regenerate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("regenerate", GOLDEN / "regenerate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["regenerate"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def cost_of(folder: Path, entry: str, integers: dict[int, np.ndarray] | None = None):
    (folder / "hlo.txt").write_text(ENTRY + entry + "}\n")
    return module_cost(folder, V5E, integers or {})


def test_entry_in_order_with_operands():
    text = (
        "  %a = s32[4]{0} parameter(0), sharding={replicated}\n"
        "  %b.1 = (f32[8]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%a), cross_program_prefetch_index=0\n"
        '  ROOT %c = f32[8]{0} custom-call(%a, /*index=1*/%b.1), custom_call_target="x", calls=%fused\n'
    )
    ops = parse_entry(ENTRY + text + "}\nignored\n")
    assert [(op.name, op.opcode, op.operands) for op in ops] == [
        ("a", "parameter", ()),
        ("b.1", "copy-start", ("a",)),
        ("c", "custom-call", ("a", "b.1")),
    ]
    assert ops[1].type == "(f32[8]{0:T(128)S(1)}, u32[]{:S(2)})"


@pytest.mark.parametrize(
    ("text", "message"),
    [("HloModule m\n", "no entry computation"), (ENTRY + "  nonsense\n}\n", "not an HLO instruction: nonsense")],
)
def test_text_that_is_no_module(text, message):
    with pytest.raises(ExecutionError, match=message):
        parse_entry(text)


def test_free_ops_cost_nothing(tmp_path):
    entry = (
        "  %a = f32[8]{0} parameter(0)\n"
        "  %b = f32[2,4]{1,0} bitcast(%a)\n"
        '  %c = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"\n'
        "  ROOT %t = (f32[2,4]{1,0}) tuple(%b)\n"
    )
    cost = cost_of(tmp_path, entry)
    assert (cost.cycles, cost.hbm_bytes, cost.copy_count, cost.vmem_bytes, cost.ops) == (0, 0, 0, 0, ())


def test_an_asynchronous_copy_is_charged_in_full_where_it_starts(tmp_path):
    entry = (
        "  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)\n"
        "  %s = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)\n"
        "  ROOT %d = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)\n"
    )
    cost = cost_of(tmp_path, entry)
    read = V5E.dma["hbm_to_vmem"]
    assert cost.cycles == read.latency_cycles + 64 * 128 * 2 / read.bytes_per_cycle
    assert cost.seconds == cost.cycles / V5E.clock_hz
    assert (cost.hbm_bytes, cost.copy_count) == (64 * 128 * 2, 1)
    (op,) = cost.ops
    assert (op.hbm_read_bytes, op.hbm_written_bytes, op.is_kernel) == (64 * 128 * 2, 0, False)


def test_a_copy_back_writes_hbm(tmp_path):
    cost = cost_of(tmp_path, "  %s = (s32[64]{0}, s32[64]{0:S(1)}, u32[]{:S(2)}) copy-start(%a)\n")
    assert (cost.ops[0].hbm_read_bytes, cost.ops[0].hbm_written_bytes) == (0, 256)


def test_an_asynchronous_slice_is_charged_by_its_result(tmp_path):
    cost = cost_of(tmp_path, "  %s = ((f32[64]{0}), f32[16]{0:S(1)}, u32[]{:S(2)}) slice-start(%a)\n")
    assert cost.hbm_bytes == 64


@pytest.mark.parametrize("kind", ["f32[1]{0:T(128)S(6)}", "s32[1]{0:T(128)}"])
def test_a_scalar_operand_is_fetched_by_one_copy(tmp_path, kind):
    cost = cost_of(tmp_path, f"  %c = {kind} copy(%a)\n")
    read = V5E.dma["hbm_to_vmem"]
    assert cost.cycles == read.latency_cycles + 4 / read.bytes_per_cycle


def test_a_scalar_of_the_top_level_program_costs_the_fetch_of_its_operands(tmp_path):
    entry = "  %k = s32[]{:T(128)} constant(8)\n  %b = s32[]{:T(128)} bitcast(%a)\n"
    entry += "  %n = s32[]{:T(128)S(6)} add(%b, %k)\n  %m = s32[]{:T(128)S(6)} select(%n, %n, %n)\n"
    entry += "  %d = s32[]{:T(128)} bitcast(%a)\n  %o = s32[]{:T(128)S(6)} select(%b, %d, %b)\n"
    first, second, third = cost_of(tmp_path, entry).ops
    read = V5E.dma["hbm_to_vmem"]
    assert first.cycles == read.latency_cycles + 4 / read.bytes_per_cycle
    assert second.cycles == 1
    assert third.cycles == 2 * first.cycles


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("  %n = s32[8]{0:S(6)} add(%a, %a)\n", r"n \(add\) has no bundles and no known cost"),
        ("  %n = s32[]{:T(128)} add(%a, %a)\n", r"n \(add\) has no bundles and no known cost"),
        ("  %f = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused\n", r"f \(fusion\) has no bundles and no known cost"),
        ("  %f = f32[8]{0} copy(%a)\n", r"f \(copy\) has no bundles"),
        ('  %f = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"\n', r"f \(custom-call\) has no"),
        ("  %s = (f32[8]{0:S(1)}, f32[8]{0:S(1)}, u32[]) copy-start(%a)\n", "s copies within VMEM"),
        ("  %s = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%a)\n", "s copies to or from host memory"),
        ("  %s = (token[], f32[8]{0:S(1)}, u32[]) copy-start(%a)\n", "s: unknown element type token"),
        ("  %s = f32[8]{0} copy-start(%a)\n", "s: cannot read the size"),
    ],
)
def test_an_op_of_unknown_cost_is_named(tmp_path, entry, message):
    with pytest.raises(ExecutionError, match=message):
        cost_of(tmp_path, entry)


def copied(tmp_path: Path, case: str = "table_2d") -> Path:
    shutil.copytree(GOLDEN / case / "v5e", tmp_path / "module")
    return tmp_path / "module"


def test_scalars_pass_through_copies_of_the_entry(tmp_path):
    folder, known = copied(tmp_path), regenerate().GOLDEN["table_2d"]
    hlo = folder / "hlo.txt"
    text = hlo.read_text().replace("custom-call(%args_0_.1,", "custom-call(%done,")
    copy = "  %done = s32[4,3]{1,0:T(4,128)} bitcast(%args_0_.1)\n  ROOT"
    hlo.write_text(text.replace("  ROOT", copy))
    assert "%done" in parse_entry(hlo.read_text())[-1].text
    assert (
        module_cost(folder, V5E, known.scalars).cycles
        == module_cost(GOLDEN / "table_2d" / "v5e", V5E, known.scalars).cycles
    )


def test_constants_of_the_entry_are_known(tmp_path):
    folder = copied(tmp_path, "nested_loops")
    hlo = folder / "hlo.txt"
    text = hlo.read_text().replace("custom-call(%args_0_.1,", "custom-call(%k,")
    hlo.write_text(text.replace("  ROOT", "  %k = s32[4]{0:T(128)} constant({3, 0, 5, 1})\n  ROOT"))
    with_parameter = module_cost(GOLDEN / "nested_loops" / "v5e", V5E, regenerate().GOLDEN["nested_loops"].scalars)
    assert module_cost(folder, V5E, {}).cycles == with_parameter.cycles


@pytest.mark.parametrize(
    "last, expected",
    [
        ("s32[4]{0:T(128)} slice(%long), slice={[2:6]}", [3, 0, 5, 1]),
        ("s32[2]{0:T(128)} broadcast(%one), dimensions={}", [7, 7]),
        ("s32[2,2]{1,0:T(2,128)} broadcast(%one), dimensions={}", None),
        ("s32[2]{0:T(128)} broadcast(%long), dimensions={0}", None),
        ("s32[7,1]{1,0:T(1,128)} reshape(%long)", [n for word in (9, 9, 3, 0, 5, 1, 9) for n in [word] + 127 * [0]]),
        ("s32[1,7]{1,0:T(1,128)} reshape(%long)", [9, 9, 3, 0, 5, 1, 9] + 121 * [0]),
        ("s32[1,7,1]{2,1,0:T(1,128)} reshape(%long)", None),
        ("s32[7]{0:T(128)} reshape(%rows)", None),
    ],
)
def test_slices_broadcasts_and_rows_of_known_scalars_are_known(last, expected):
    entry = f"""ENTRY %main () -> s32[4] {{
  %long = s32[7]{{0:T(128)}} constant({{9, 9, 3, 0, 5, 1, 9}})
  %one = s32[]{{:T(128)}} constant(7)
  %rows = s32[1,7]{{1,0:T(1,128)}} reshape(%long)
  ROOT %last = {last}
}}
"""
    ops = {op.name: op for op in parse_entry(entry)}
    words = _words(ops, "last", {})
    assert (None if words is None else words.tolist()) == expected


def test_computed_scalars_are_not_known(tmp_path):
    folder = copied(tmp_path, "nested_loops")
    scalars = regenerate().GOLDEN["nested_loops"].scalars
    with pytest.raises(ExecutionError, match="a value that no scalar input gives"):
        module_cost(folder, V5E, {0: scalars[0].astype(np.int16)})


def test_a_kernel_reports_its_memory_and_spills(tmp_path):
    folder, known = copied(tmp_path), regenerate().GOLDEN["table_2d"]
    cost = module_cost(folder, V5E, known.scalars)
    assert (cost.vmem_bytes, cost.spill_slots) == (16384 + 72 * 128 * 4, 0)
    (table,) = folder.glob("*utilization.txt")
    lines = table.read_text().splitlines()
    units = lines[1].split(", ")
    row = lines[4].split()
    row[units.index("VLOAD:FILL")], row[units.index("VSTORE:SPILL")] = "2", "1"
    lines[4] = " ".join(row)
    table.write_text("\n".join(lines) + "\n")
    assert module_cost(folder, V5E, known.scalars).spill_slots == 3


def test_dumps_and_tables_that_disagree_are_an_error(tmp_path):
    folder, known = copied(tmp_path), regenerate().GOLDEN["table_2d"]
    (table,) = folder.glob("*utilization.txt")
    table.write_text(table.read_text() + "0 0 0 0 0 0 0 0 0 0\n")
    with pytest.raises(ExecutionError, match=r"\d+ bundles, but \d+ rows"):
        module_cost(folder, V5E, known.scalars)
    table.unlink()
    with pytest.raises(ParseError, match="utilization"):
        module_cost(folder, V5E, known.scalars)


def test_one_program_stands_for_ops_that_differ_in_name_alone(tmp_path):
    folder, known = copied(tmp_path), regenerate().GOLDEN["table_2d"]
    hlo = folder / "hlo.txt"
    entry = hlo.read_text()
    kernel = next(line for line in entry.splitlines() if "ROOT" in line)
    twin = kernel.replace("ROOT ", "").replace("%table_2d.1", "%table_2d.2")
    hlo.write_text(entry.replace(kernel, f"{twin}\n{kernel}"))
    with pytest.raises(ExecutionError, match=r"table_2d\.2 \(custom-call\) has no bundles"):  # kernels are never twins
        module_cost(folder, V5E, known.scalars)
    fusions = hlo.read_text().replace("custom-call(", "fusion(").replace("), custom_call_target", "), calls")
    hlo.write_text(fusions)
    twice = module_cost(folder, V5E, known.scalars)
    assert [op.op.name for op in twice.ops] == ["table_2d.2", "table_2d.1"]
    assert twice.ops[0].cycles == twice.ops[1].cycles == twice.cycles / 2


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("1795-copy.2-03-final_bundles.txt", "copy.2"),
        ("1-a-b.1-00-pre-finalize-registers-and-allocations.txt", "a-b.1"),
        ("other", "other"),
    ],
)
def test_op_of_dump(name, op):
    assert op_of_dump(Path(name)) == op


# --- what the real compiler emits ---


def regenerated(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs regenerate.py in a process of its own: libtpu reads its flags once."""
    command = [sys.executable, "-W", "error", str(GOLDEN / "regenerate.py"), "--out", str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def compiled(folder: Path, *flags: str) -> dict[str, dict[str, float]]:
    folder.mkdir(exist_ok=True)
    done = regenerated(folder, *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "expected.json").read_text())


def test_cycles_are_rewritten_from_the_dumps_that_are_there(tmp_path):
    """Of the chips that are asked for; nothing else changes."""
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    wrong = {name: dict.fromkeys(cycles, -1.0) for name, cycles in expected.items()}
    (folder / "expected.json").write_text(json.dumps(wrong))
    assert compiled(folder, "--cycles-only", "--chips", "v5e") == {
        name: cycles | {"v5e": expected[name]["v5e"]} for name, cycles in wrong.items()
    }
    for path in sorted(GOLDEN.glob("*/*/*.txt")):
        assert (folder / path.relative_to(GOLDEN)).read_text() == path.read_text()


def test_cycles_of_dumps_that_are_not_there_are_an_error_that_writes_nothing(tmp_path):
    done = regenerated(tmp_path, "--cycles-only")
    assert done.returncode == 2 and "no dumps in" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_goldens_are_what_the_compiler_emits(tmp_path):
    assert compiled(tmp_path / "now") == json.loads((GOLDEN / "expected.json").read_text())
    for path in sorted(GOLDEN.glob("*/*/*.txt")):
        assert (tmp_path / "now" / path.relative_to(GOLDEN)).read_text() == path.read_text()


SPMD = """
import os, sys
from judge import jax_shims
jax_shims.set_environment()
out = sys.argv[1]
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={out} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
)
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices), ("x",))
def body(x):
    return jax.lax.psum(x + 1.0, "x"), jax.lax.all_gather(x * 2.0, "x", tiled=True)
function = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=(P(), P()), check_vma=False))
shape = jax.ShapeDtypeStruct((4096, 512), np.float32, sharding=NamedSharding(mesh, P("x")))
open(out + "/hlo.txt", "w").write(function.lower(shape).compile().as_text())
"""


@pytest.mark.slow
def test_a_module_of_four_chips_has_its_collectives_in_closed_form(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SPMD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    cost = module_cost(tmp_path, V5E, {})
    collectives = {op.op.opcode.removesuffix("-start"): op for op in cost.ops if op.execution is None}
    shard_bytes = 4096 * 512 * 4 // 4
    for kind, size_bytes in (("all-reduce", shard_bytes), ("all-gather", 4 * shard_bytes)):
        assert collectives[kind].cycles == collective_seconds(kind, size_bytes, 4, V5E.ici) * V5E.clock_hz
    around = [op for op in cost.ops if op.execution is not None]
    assert {op.op.opcode for op in around} >= {"fusion"} and all(op.cycles > 0 for op in around)
    # the ring moves three quarters of the gathered bytes over two links: 70 µs, and two hops
    assert collectives["all-gather"].cycles / V5E.clock_hz == pytest.approx(6291456 / 90e9 + 2e-6)


@pytest.mark.slow
def test_kernels_of_many_kinds_on_every_chip(tmp_path):
    """Matmuls of three types, flash attention, normalisation, loops, XLA ops around: bytes follow from the grid."""
    cycles = compiled(tmp_path / "fresh", "--fresh")
    cases = regenerate().FRESH
    assert set(cycles) == set(cases)
    for name, case in cases.items():
        assert set(cycles[name]) == set(CHIPS)
        for chip in CHIPS:
            cost = module_cost(tmp_path / "fresh" / name / chip, load_machine(chip), case.scalars)
            kernel = [op for op in cost.ops if op.is_kernel]
            assert len(kernel) == 1, (name, chip)
            assert kernel[0].hbm_read_bytes - case.read_bytes in (0, 512), (name, chip)
            assert kernel[0].hbm_written_bytes == case.written_bytes, (name, chip)
            assert round(cost.cycles, 3) == cycles[name][chip]
            seconds = cost.hbm_bytes / load_chip(chip).hbm_bytes_per_second
            assert cost.seconds > 0.95 * seconds, (name, chip)
            if name == "xla_around":
                assert {op.op.opcode for op in cost.ops if not op.is_kernel} >= {"fusion"}, chip
            elif not case.scalars:
                assert cost.copy_count == 0, (name, chip)


@pytest.mark.parametrize(
    ("type_text", "row"),
    [("s32[3,2]{1,0:T(4,128)}", [1, 2]), ("s32[3,2]{0,1:T(2,128)}", [1, 3, 5])],
)
def test_scalars_lie_in_memory_as_the_parameter_s_layout_says(type_text, row):
    """The compiler takes narrow matrices column by column: s32[100,2]{0,1} is what a kernel of `a.T` reads as it is."""
    words = _in_memory(np.array([[1, 2], [3, 4], [5, 6]], np.int32), type_text)
    assert words[: len(row)].tolist() == row and not words[len(row) : 128].any()


@pytest.mark.parametrize("type_text", ["s32[2,3,4]{2,1,0}", "s32[2,3,4]{0,2,1}", "nothing"])
def test_scalars_of_more_dimensions_are_not_known(type_text):
    assert _in_memory(np.zeros((2, 3, 4), np.int32), type_text) is None


@pytest.mark.parametrize(
    ("type_text", "transposed"), [("s32[20,300]{1,0:T(8,128)S(1)}", False), ("s32[300,20]{0,1:T(8,128)}", True)]
)
def test_long_rows_of_scalars_lie_in_tiles(type_text, transposed):
    """So on each chip: a loop that runs as often as word [9, 200] says takes longer with that word alone."""
    values = np.zeros((20, 300), np.int32)
    values[0, 127], values[0, 128], values[9, 200], values[17, 299] = 1, 2, 3, 4
    words = _in_memory(values.T if transposed else values, type_text)
    # Three rows of three tiles of 8 x 128 words.
    places = {127: 1, 1024: 2, (3 + 1) * 1024 + 128 + 72: 3, (6 + 2) * 1024 + 128 + 43: 4}
    assert words.size == 9 * 1024
    assert {int(place): int(words[place]) for place in np.flatnonzero(words)} == places


@pytest.mark.parametrize("type_text", ["s32[200,2]{0,1}", "s32[200,2]", "s32[200,2]{0,1:T(2,64)}"])
def test_scalars_of_wide_columns_without_tiles_of_128_are_not_known(type_text):
    assert _in_memory(np.zeros((200, 2), np.int32), type_text) is None
