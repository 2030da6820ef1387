"""What judge.trace writes, read back by jax's protobuf code and by XProf itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.profiler
import pytest
import xprof.profile_data
from xprof.convert.raw_to_tool_data import xspace_to_tool_data

from judge import trace
from judge.trace import Event, ModuleTrace, write_run

OP = '%attention.2 = bf16[64,128]{1,0} custom-call(bf16[64,128] %q), custom_call_target="tpu_custom_call"'
OP_STATS: dict[str, int | float | str] = {
    "flops": 40_000_000,
    "model_flops": 30_000_000,
    "bytes_accessed": 200_000,
    "hlo_category": "custom-call",
    "tf_op": "jit(f)/pallas_call",
    "source": "kernel.py:99",
}


def op(duration_ps: int, start_ps: int = 0, **metadata_stats: int) -> Event:
    return Event(
        name=OP,
        display_name="attention.2",
        start_ps=start_ps,
        duration_ps=duration_ps,
        metadata_stats={**OP_STATS, **metadata_stats},
    )


def dma(start_ps: int, duration_ps: int) -> Event:
    return Event(name="HBM→VMEM k", start_ps=start_ps, duration_ps=duration_ps, stats={"bytes": 4096, "queue": "in"})


def module(name: str, program_id: int, duration_ps: int = 1_000_000, **lines: list[Event]) -> ModuleTrace:
    return ModuleTrace(
        name=name,
        program_id=program_id,
        duration_ps=duration_ps,
        lines={"XLA Ops": [op(duration_ps)]} | {line.replace("_", " "): events for line, events in lines.items()},
    )


def write(tmp_path: Path, *modules: ModuleTrace, run: str = "run", **options: Any) -> Path:
    chip: dict[str, Any] = {"device_type": "TPU v5e", "peak_tflops": 197.0, "peak_hbm_gb_per_s": 819.0, "notes": ()}
    return write_run(tmp_path, run, modules=modules, **(chip | options))


def tool(path: Path, name: str) -> Any:
    """What XProf computes from the file for one of its pages."""
    data, _ = xspace_to_tool_data([str(path)], name, {"hosts": [trace.HOST], "use_saved_result": False})
    return json.loads(data)


def table(page: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one of XProf's tables, by column id."""
    return [{col["id"]: cell["v"] for col, cell in zip(page["cols"], row["c"], strict=True)} for row in page["rows"]]


def device_lines(path: Path) -> dict[str, list[tuple[str, float, float]]]:
    """Line → (name, start_ns, duration_ns) of its events, to the picosecond."""
    plane = xprof.profile_data.ProfileData.from_file(str(path)).planes[0]
    return {line.name: [(e.name, e.start_ns, e.duration_ns) for e in line.events] for line in plane.lines}


# --- the bytes --------------------------------------------------------------------------------------------------------


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message, by the wire format alone."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = 8 if wire == 1 else varint()
        yield number, message[at : at + size]
        at += size


def unordered(xspace: bytes) -> list[tuple[int, Any]]:
    """The fields of an XSpace; those of a plane sorted, because protobuf writes its maps in any order."""
    return [
        (number, sorted(fields(value), key=repr) if number == 1 and isinstance(value, bytes) else value)
        for number, value in fields(xspace)
    ]


EXPECTED = """
planes { id: 1 name: "/device:TPU:0"
  lines { id: 1 name: "Steps" events { metadata_id: 1 offset_ps: 0 duration_ps: 1000000
    stats { metadata_id: 1 int64_value: 1 } stats { metadata_id: 2 str_value: "decode" }
    stats { metadata_id: 3 int64_value: 0 } stats { metadata_id: 4 str_value: "decode" } } }
  lines { id: 2 name: "XLA Modules" events { metadata_id: 2 offset_ps: 0 duration_ps: 1000000
    stats { metadata_id: 3 int64_value: 0 } stats { metadata_id: 5 int64_value: 0 }
    stats { metadata_id: 6 int64_value: 7 } } }
  lines { id: 3 name: "XLA Ops" events { metadata_id: 3 offset_ps: 0 duration_ps: 999999
    stats { metadata_id: 10 int64_value: -300 } stats { metadata_id: 11 double_value: 0.5 }
    stats { metadata_id: 12 str_value: "é" } } }
  event_metadata { key: 1 value { id: 1 name: "decode" } }
  event_metadata { key: 2 value { id: 2 name: "decode(7)" } }
  event_metadata { key: 3 value { id: 3 name: "%add.1 = f32[] add()" display_name: "add.1"
    stats { metadata_id: 7 int64_value: 300 } stats { metadata_id: 6 int64_value: 7 }
    stats { metadata_id: 8 int64_value: 3 }
    stats { metadata_id: 9 bytes_value: "\\n\\007\\010\\001\\020\\001\\030\\254\\002" } } }
  stat_metadata { key: 1 value { id: 1 name: "_r" } }
  stat_metadata { key: 2 value { id: 2 name: "graph_type" } }
  stat_metadata { key: 3 value { id: 3 name: "group_id" } }
  stat_metadata { key: 4 value { id: 4 name: "step_name" } }
  stat_metadata { key: 5 value { id: 5 name: "run_id" } }
  stat_metadata { key: 6 value { id: 6 name: "program_id" } }
  stat_metadata { key: 7 value { id: 7 name: "bytes_accessed" } }
  stat_metadata { key: 8 value { id: 8 name: "symbol_id" } }
  stat_metadata { key: 9 value { id: 9 name: "memory_access_breakdown" } }
  stat_metadata { key: 10 value { id: 10 name: "low" } }
  stat_metadata { key: 11 value { id: 11 name: "half" } }
  stat_metadata { key: 12 value { id: 12 name: "text" } }
  stat_metadata { key: 13 value { id: 13 name: "device_type_string" } }
  stat_metadata { key: 14 value { id: 14 name: "peak_teraflops_per_second" } }
  stat_metadata { key: 15 value { id: 15 name: "peak_hbm_bw_gigabytes_per_second" } }
  stats { metadata_id: 13 str_value: "TPU v5e" }
  stats { metadata_id: 14 double_value: 197 }
  stats { metadata_id: 15 double_value: 819 }
}
planes { id: 2 name: "/host:CPU"
  stat_metadata { key: 1 value { id: 1 name: "matrix_unit_utilization_percent" } }
  stats { metadata_id: 1 double_value: 50 }
}
planes { id: 3 name: "/host:metadata"
  event_metadata { key: 7 value { id: 7 name: "decode(7)" stats { metadata_id: 1 bytes_value: "proto" } } }
  stat_metadata { key: 1 value { id: 1 name: "Hlo Proto" } }
}
warnings: "BANNER · one note · another"
hostnames: "SIMULATED"
"""


def test_bytes_are_those_jax_writes_for_the_same_xspace(tmp_path: Path) -> None:
    event = Event(
        name="%add.1 = f32[] add()",
        display_name="add.1",
        start_ps=0,
        duration_ps=999_999,
        stats={"low": -300, "half": 0.5, "text": "é"},
        metadata_stats={"bytes_accessed": 300, "program_id": 7},
    )
    one = ModuleTrace(
        name="decode", program_id=7, duration_ps=1_000_000, lines={"XLA Ops": [event]}, hlo_proto=b"proto"
    )
    path = write(tmp_path, one, notes=["one note", "another"], mxu_util_pct=50)
    text = EXPECTED.replace("BANNER", trace.BANNER)
    expected = jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    assert unordered(path.read_bytes()) == unordered(expected)


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    modules = [module("decode", 1, DMA=[dma(0, 10), dma(5, 10)]), module("prefill", 2, MXU_Instructions=[dma(0, 7)])]
    first, second = (write(tmp_path, *modules, run=run).read_bytes() for run in ("first", "second"))
    assert first == second


# --- what jax reads ---------------------------------------------------------------------------------------------------


def test_jax_reads_planes_lines_times_and_stats(tmp_path: Path) -> None:
    path = write(tmp_path, module("decode", 1, DMA=[dma(2_000, 5_000)]), module("prefill", 2, 3_000_000))
    planes = list(jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes()).planes)
    assert [plane.name for plane in planes] == ["/device:TPU:0", "/host:CPU"]
    assert dict(planes[0].stats) == {
        "device_type_string": "TPU v5e",
        "peak_teraflops_per_second": 197.0,
        "peak_hbm_bw_gigabytes_per_second": 819.0,
    }
    lines = {line.name: list(line.events) for line in planes[0].lines}
    assert list(lines) == ["Steps", "XLA Modules", "XLA Ops", "DMA"]
    assert [event.name for event in lines["XLA Modules"]] == ["decode(1)", "prefill(2)"]
    assert [(event.start_ns, event.duration_ns) for event in lines["XLA Ops"]] == [(0, 1000), (2000, 3000)]
    assert dict(lines["DMA"][0].stats) == {"bytes": 4096, "queue": "in"}
    assert (lines["DMA"][0].start_ns, lines["DMA"][0].duration_ns) == (2, 5)


def test_picoseconds_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path, module("a", 1), module("b", 2, DMA=[dma(1, 1234)]))
    [(_, start_ns, duration_ns)] = device_lines(path)["DMA"]
    assert (start_ns, duration_ns) == pytest.approx((2000.001, 1.234), abs=1e-6)


def test_overlapping_events_go_to_further_rows_and_nested_ones_stay(tmp_path: Path) -> None:
    events = [dma(0, 10_000), dma(2_000, 3_000), dma(5_000, 10_000), dma(12_000, 5_000), dma(15_000, 1_000)]
    lines = device_lines(write(tmp_path, module("decode", 1, DMA=events), module("prefill", 2, DMA=[dma(0, 1_000)])))
    starts = {line: [start for _, start, _ in events] for line, events in lines.items() if line.startswith("DMA")}
    assert starts == {"DMA": [0, 2, 12, 15, 2000], "DMA 2": [5]}


# --- what XProf shows -------------------------------------------------------------------------------------------------


def test_overview_says_that_the_run_is_simulated_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, module("decode", 1), notes=["a note"], mxu_util_pct=50.7, hbm_util_pct=61.0)
    pages = tool(path, "overview_page")
    assert [row["message"] for row in table(pages[-1])] == [f"{trace.BANNER} · a note"]
    assert pages[0]["p"]["mxu_utilization_percent"] == "50.7%"
    assert pages[0]["p"]["hbm_utilization_percent"] == "61.0%"


def test_trace_viewer_shows_the_host_the_tracks_and_the_steps(tmp_path: Path) -> None:
    path = write(tmp_path, module("decode", 1, DMA=[dma(0, 5_000)]), module("prefill", 2))
    events = tool(path, "trace_viewer@")["traceEvents"]
    names = {kind: [e["args"]["name"] for e in events if e["name"] == kind] for kind in ("process_name", "thread_name")}
    assert names["process_name"] == ["SIMULATED /device:TPU:0"]
    assert names["thread_name"][:4] == ["Steps", "XLA Modules", "XLA Ops", "DMA"]
    bars = [event["name"] for event in events if event["ph"] == "X"]
    assert {"decode 0", "prefill 1", "decode(1)", "attention.2", "HBM→VMEM k"} <= set(bars)


def test_op_tables_count_the_ops_and_only_those(tmp_path: Path) -> None:
    path = write(tmp_path, module("decode", 1, DMA=[dma(0, 500_000)], MXU_Instructions=[dma(0, 500_000)]))
    rows = table(tool(path, "hlo_stats"))
    assert [row["hlo_op_name"] for row in rows] == ["attention.2"]
    assert rows[0]["total_time"] == pytest.approx(1.0)  # µs
    assert rows[0]["model_flop_rate"] == pytest.approx(30_000)  # GFLOP/s
    assert rows[0]["hbm_bw"] == pytest.approx(200_000 / 1e-6 / 2**30)  # GiB/s
    metrics = tool(path, "op_profile")["byProgram"]["metrics"]
    assert metrics["bandwidthUtils"][0] == pytest.approx(0.2 / 0.819)
    assert metrics["flops"] == pytest.approx(40 / 197)


def test_xprof_finds_the_hlo(tmp_path: Path) -> None:
    compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), "float32")).compile()
    executable: Any = compiled.runtime_executable()
    proto = trace._blob(1, executable.hlo_modules()[0].as_serialized_hlo_module_proto())  # HloProto.hlo_module = 1
    one = ModuleTrace(name="decode", program_id=5, duration_ps=10, lines={"XLA Ops": [op(10)]}, hlo_proto=proto)
    program = tool(write(tmp_path, one), "op_profile")["byProgram"]["children"][0]
    assert program["name"].endswith("(5)")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_run_is_never_rewritten(tmp_path: Path) -> None:
    path = write(tmp_path, module("decode", 1))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="name a new run"):
        write(tmp_path, module("prefill", 1))
    assert path.read_bytes() == before
    assert path == tmp_path / "plugins" / "profile" / "run" / "SIMULATED.xplane.pb"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("judge.trace.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, module("decode", 1))
    assert not (tmp_path / "plugins" / "profile" / "run").exists()


@pytest.mark.parametrize("run", ["", ".", "..", "../x", "a/b", "a b", ".hidden"])
def test_run_names_stay_in_the_folder(tmp_path: Path, run: str) -> None:
    with pytest.raises(ValueError, match="run name"):
        write(tmp_path, module("decode", 1), run=run)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "at least one module"),
        ([module("a", 1), module("b", 1)], "one program_id"),
        ([module("a", 0)], "program_id 0"),
        ([module("a", 1, 0)], "duration 0"),
        ([module("a", 1, DMA=[dma(-1, 5)])], "not inside"),
        ([module("a", 1, DMA=[dma(5, -1)])], "not inside"),
        ([module("a", 1, DMA=[dma(999_999, 1_002)])], "not inside"),
        ([module("a", 1, Steps=[dma(0, 1)])], "write_run's own"),
        ([module("a", 1, XLA_Ops=[op(10), op(10, start_ps=5)])], "twice"),
        ([module("a", 1, XLA_Ops=[op(10), op(10, start_ps=10, flops=1)])], "differ in display_name or metadata_stats"),
        ([module("a", 1, DMA=[Event(name="x", start_ps=0, duration_ps=1, stats={"n": float("nan")})])], "is nan"),
        ([module("a", 1, DMA=[Event(name="x", start_ps=0, duration_ps=1, stats={"n": 2**63})])], "int64"),
    ],
)
def test_what_xprof_would_show_wrongly_is_refused(tmp_path: Path, modules: list[ModuleTrace], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, *modules)
    assert not list(tmp_path.iterdir())
