"""simulated timeline → `profile_dir/plugins/profile/<run>/SIMULATED.xplane.pb`, which `xprof --port=8791 DIR` shows.

Writes only: nothing is computed here beyond placing modules end to end and overlapping events on rows.  The file is an
XSpace protobuf written by hand, because the judge's parent process imports neither jax (slow) nor a protobuf runtime.

Source of the field numbers: `third_party/tsl/tsl/profiler/protobuf/xplane.proto` of openxla/xla; tests/test_trace.py
reads the result back with jax's own reader.  Source of the plane, line and stat names: seen to work in xprof 2.24.2.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

StatValue: TypeAlias = int | float | str
Stats: TypeAlias = Mapping[str, StatValue]

HOST: Final = "SIMULATED"
BANNER: Final = "SIMULATED: predicted by a cycle model, not measured; no TPU ran."
STEPS_LINE: Final = "Steps"
MODULES_LINE: Final = "XLA Modules"
OPS_LINE: Final = "XLA Ops"

MODULE_GAP_PS: Final = 1_000_000  # 1 µs: two modules stay apart when zoomed in
ROUNDING_PS: Final = 1_000  # how far an event may outlast its module: both times were rounded from cycles

_NO_STATS: Final[Stats] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One bar of a track: [start_ps, start_ps + duration_ps), counted from its module's start.

    `name` is the long name (for an XLA op, its HLO text), `display_name` the short one on the bar.  `metadata_stats`
    hold for every event of that name in its line and module; XProf reads an op's `flops`, `model_flops`,
    `bytes_accessed` (of HBM), `hlo_category`, `tf_op` and `source` there only.  `stats` are this event's own.
    """

    name: str
    start_ps: int
    duration_ps: int
    stats: Stats = field(default_factory=lambda: _NO_STATS)
    display_name: str = ""
    metadata_stats: Stats = field(default_factory=lambda: _NO_STATS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleTrace:
    """The timeline of one simulated execution: line name → events, lines in the order they are to be shown.

    XProf's own names for lines: "XLA Ops", "Pallas Primitives", "MXU Instructions" and the other units', "DMA"; each
    event of a line "_counters_" is a point of a graph, its one stat the value.  A line without events is left out.
    `name` is the workload's.  `program_id` (positive, within int64) tells the run's programs apart.  `hlo_proto` is a
    serialised xla.HloProto; HLO graphs and Memory Viewer need it.
    """

    name: str
    program_id: int
    duration_ps: int
    lines: Mapping[str, Sequence[Event]]
    hlo_proto: bytes | None = None


def write_run(
    profile_dir: Path,
    run: str,
    *,
    device_type: str,
    peak_tflops: float,
    peak_hbm_gb_per_s: float,
    modules: Sequence[ModuleTrace],
    notes: Sequence[str],
    mxu_util_pct: float | None = None,
    hbm_util_pct: float | None = None,
) -> Path:
    """profile_dir/plugins/profile/run/SIMULATED.xplane.pb, written whole or not at all; returns that path.

    Args:
      run: the run folder's name: letters, digits, `.`, `_`, `-`.
      device_type: the chip's name as XProf is to show it, such as "TPU v5e".
      peak_tflops: peak of the chip's matrix units, 10^12 FLOP/s; peak_hbm_gb_per_s: peak bandwidth, 10^9 bytes/s.
      modules: at least one; laid end to end, one step each.
      notes: shown with the banner at the top of XProf's Overview.
      mxu_util_pct, hbm_util_pct: the Overview's two utilisations, which XProf takes from hardware counters; it shows
        0.0 % for one that is not given.

    Raises:
      FileExistsError: the run exists.  XProf caches beside a run what it computed from it and goes on showing that.
      ValueError: a name, a time or a value that XProf would show wrongly.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", run):
        raise ValueError(f"run name {run!r}: letters, digits, '.', '_' and '-' only")
    device: Stats = {
        "device_type_string": device_type,
        "peak_teraflops_per_second": float(peak_tflops),
        "peak_hbm_bw_gigabytes_per_second": float(peak_hbm_gb_per_s),
    }
    counters = {"matrix_unit_utilization_percent": mxu_util_pct, "hbm_utilization_percent": hbm_util_pct}
    known = {name: float(value) for name, value in counters.items() if value is not None}
    return _write_new(profile_dir / "plugins" / "profile" / run, _xspace(_place(modules), device, known, notes))


def _write_new(folder: Path, payload: bytes) -> Path:
    """folder/SIMULATED.xplane.pb in a folder made for it; FileExistsError if there is one."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(f"{folder} exists: name a new run; XProf would go on showing the old one") from None
    path = folder / f"{HOST}.xplane.pb"
    partial = folder / f"{HOST}.partial"  # a name that XProf does not read
    try:
        partial.write_bytes(payload)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        folder.rmdir()
        raise
    return path


# --- the time axis ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placed:
    """A module, where it starts on the run's axis, and its step's number."""

    start_ps: int
    group: int
    module: ModuleTrace


def _place(modules: Sequence[ModuleTrace]) -> list[_Placed]:
    """start of module i = sum of the durations and gaps before it."""
    if not modules:
        raise ValueError("a run needs at least one module")
    if len({module.program_id for module in modules}) != len(modules):
        raise ValueError("two modules have one program_id: XProf would merge their ops")
    placed, start_ps = [], 0
    for group, module in enumerate(modules):
        _check(module)
        placed.append(_Placed(start_ps=start_ps, group=group, module=module))
        start_ps += module.duration_ps + MODULE_GAP_PS
    return placed


def _check(module: ModuleTrace) -> None:
    """ValueError unless the module has a duration and every event lies inside it."""
    if module.duration_ps <= 0 or not 0 < module.program_id < 2**63:
        raise ValueError(f"module {module.name!r}: duration {module.duration_ps} ps, program_id {module.program_id}")
    end_ps = module.duration_ps + ROUNDING_PS
    for line, events in module.lines.items():
        if line in (STEPS_LINE, MODULES_LINE):
            raise ValueError(f"module {module.name!r}: the line {line!r} is write_run's own")
        for event in events:
            if event.start_ps < 0 or event.duration_ps < 0 or event.start_ps + event.duration_ps > end_ps:
                raise ValueError(
                    f"module {module.name!r}, line {line!r}: {event.name[:80]!r} at {event.start_ps} ps for "
                    f"{event.duration_ps} ps is not inside the module's {module.duration_ps} ps"
                )


def _rows(events: Sequence[Event]) -> list[list[Event]]:
    """The first row that can take an event takes it; in a row, events follow one another or nest.

    Of two bars that overlap without nesting, Trace Viewer draws the later over the earlier.
    """
    rows: list[list[Event]] = []
    open_ends_ps: list[list[int]] = []  # per row, the ends of the events not yet over, outermost first
    for event in sorted(events, key=lambda event: (event.start_ps, -event.duration_ps)):
        start_ps = event.start_ps
        end_ps = start_ps + event.duration_ps
        for row, ends_ps in zip(rows, open_ends_ps, strict=True):
            while ends_ps and ends_ps[-1] <= start_ps:
                ends_ps.pop()
            if not ends_ps or end_ps <= ends_ps[-1]:
                row.append(event)
                ends_ps.append(end_ps)
                break
        else:
            rows.append([event])
            open_ends_ps.append([end_ps])
    return rows


# --- what XProf expects where -----------------------------------------------------------------------------------------


def _xspace(placed: Sequence[_Placed], device: Stats, counters: Stats, notes: Sequence[str]) -> bytes:
    """XSpace: planes = 1, warnings = 3, hostnames = 4."""
    planes = [_device_plane(placed, device), _host_plane(counters)]
    if any(one.module.hlo_proto is not None for one in placed):
        planes.append(_metadata_plane(placed))
    warning = " · ".join((BANNER, *notes))  # one warning: XProf shows several in no particular order
    return b"".join((*(_blob(1, plane) for plane in planes), _text(3, warning), _text(4, HOST)))


def _device_plane(placed: Sequence[_Placed], stats: Stats) -> bytes:
    """The simulated core; under exactly this name XProf takes the plane for a TPU's."""
    plane = _Plane(1, "/device:TPU:0")
    plane.add_line(STEPS_LINE, [plane.encode([_step(one)], one.start_ps, _EventTypes(plane)) for one in placed])
    plane.add_line(MODULES_LINE, [plane.encode([_module(one)], one.start_ps, _EventTypes(plane)) for one in placed])
    for line in dict.fromkeys(line for one in placed for line in one.module.lines):
        _add_rows(plane, line, placed)
    return plane.serialise(stats)


def _add_rows(plane: _Plane, line: str, placed: Sequence[_Placed]) -> None:
    """Row i of every module on one XLine; the first is named `line`, the others `line 2`, `line 3`, …"""
    rows = [_rows(one.module.lines.get(line, ())) for one in placed]
    row_count = max(map(len, rows))
    if line == OPS_LINE and row_count > 1:
        raise ValueError(f"{OPS_LINE} overlap without nesting: XProf would count that time twice")
    types = [_EventTypes(plane, one.module.program_id if line == OPS_LINE else None) for one in placed]
    for row in range(row_count):
        plane.add_line(
            line if row == 0 else f"{line} {row + 1}",
            [
                plane.encode(own[row], one.start_ps, kinds)
                for own, one, kinds in zip(rows, placed, types, strict=True)
                if row < len(own)
            ],
        )


def _step(one: _Placed) -> Event:
    """The step of a module.  XProf numbers steps itself and names a root (`_r`) `<graph_type> <number>`: "decode 0"."""
    stats: Stats = {"_r": 1, "graph_type": one.module.name, "group_id": one.group, "step_name": one.module.name}
    return Event(name=one.module.name, start_ps=0, duration_ps=one.module.duration_ps, stats=stats)


def _module(one: _Placed) -> Event:
    """The execution of a module, named as XProf names it."""
    stats: Stats = {"group_id": one.group, "run_id": one.group, "program_id": one.module.program_id}
    return Event(name=_program(one.module), start_ps=0, duration_ps=one.module.duration_ps, stats=stats)


def _program(module: ModuleTrace) -> str:
    """name(program_id): XProf finds a module's HLO by the number in brackets."""
    return f"{module.name}({module.program_id})"


def _host_plane(counters: Stats) -> bytes:
    """A host without events: XProf takes the counters from its stats, and without it warns of missing step markers."""
    return _Plane(2, "/host:CPU").serialise(counters)


def _metadata_plane(placed: Sequence[_Placed]) -> bytes:
    """The plane where XProf looks for HLO: per program one event metadata, with the program's id as its own."""
    plane = _Plane(3, "/host:metadata")
    for one in placed:
        if one.module.hlo_proto is not None:
            proto = plane.bytes_stat("Hlo Proto", one.module.hlo_proto)
            plane.add_event_metadata(one.module.program_id, _program(one.module), "", proto)
    return plane.serialise(_NO_STATS)


class _EventTypes:
    """The XEventMetadata of one line of one module: event name → id.

    Given a program_id the line holds ops, and XProf's op tables take only those with a `program_id` and a `symbol_id`
    on their metadata (with neither the device counts as idle); op profile takes bytes from `memory_access_breakdown`.
    """

    def __init__(self, plane: _Plane, program_id: int | None = None) -> None:
        self._plane = plane
        self._program_id = program_id
        self._known: dict[str, tuple[Event, bytes]] = {}

    def metadata_id(self, event: Event) -> bytes:
        """XEvent.metadata_id = 1; ValueError if an earlier event of that name had another display name or stats."""
        known = self._known.get(event.name)
        if known is None:
            known = self._known[event.name] = event, _int(1, self._add(event))
        elif known[0].display_name != event.display_name or known[0].metadata_stats != event.metadata_stats:
            raise ValueError(f"two events named {event.name[:80]!r} differ in display_name or metadata_stats")
        return known[1]

    def _add(self, event: Event) -> int:
        key = self._plane.next_event_metadata_id()
        ids = {} if self._program_id is None else {"program_id": self._program_id, "symbol_id": key}
        stats = self._plane.stats(5, {**event.metadata_stats, **ids})
        hbm_bytes = event.metadata_stats.get("bytes_accessed")
        if ids and isinstance(hbm_bytes, int) and hbm_bytes > 0:
            stats += self._plane.bytes_stat("memory_access_breakdown", _hbm_accesses(hbm_bytes))
        self._plane.add_event_metadata(key, event.name, event.display_name, stats)
        return key


def _hbm_accesses(hbm_bytes: int) -> bytes:
    """MemoryAccessBreakdown.memory_accessed = 1 of: operation_type = 1, memory_space = 2, bytes_accessed = 3.

    Source: op_metrics.proto of openxla/xprof (operation READ = 1) and its PerformanceInfo (space HBM = 1).  All is
    called READ because XProf adds reads and writes of HBM, and leaves out those of an unknown operation.
    """
    return _blob(1, _int(1, 1) + _int(2, 1) + _int(3, hbm_bytes))


# --- XPlane -----------------------------------------------------------------------------------------------------------


class _Plane:
    """One XPlane being written.  Ids count up in order of first use, so equal input gives equal bytes."""

    def __init__(self, plane_id: int, name: str) -> None:
        self._head = _int(1, plane_id) + _text(2, name)
        self._lines: list[bytes] = []
        self._event_metadata: list[bytes] = []
        self._stat_ids: dict[str, int] = {}

    def encode(self, events: Iterable[Event], base_ps: int, types: _EventTypes) -> bytes:
        """XLine.events = 4 of XEvent: metadata_id = 1, offset_ps = 2, duration_ps = 3, stats = 4."""
        chunks: list[bytes] = []
        for event in events:
            offset, duration = _varint(base_ps + event.start_ps), _varint(event.duration_ps)
            body = b"%b\x10%b\x18%b" % (types.metadata_id(event), offset, duration)
            if event.stats:
                body += self.stats(4, event.stats)
            chunks.append(b"\x22%b%b" % (_varint(len(body)), body))
        return b"".join(chunks)

    def add_line(self, name: str, encoded: Iterable[bytes]) -> None:
        """XLine: id = 1, name = 2, events = 4; timestamp_ns = 3 stays 0 (an epoch time overflows the viewer's axis)."""
        line_id = len(self._lines) + 1
        self._lines.append(_blob(3, _int(1, line_id) + _text(2, name) + b"".join(encoded)))

    def next_event_metadata_id(self) -> int:
        """XEventMetadata.id of the next one added."""
        return len(self._event_metadata) + 1

    def add_event_metadata(self, key: int, name: str, display_name: str, stats: bytes) -> None:
        """XEventMetadata: id = 1, name = 2, display_name = 4, stats = 5."""
        display = _text(4, display_name) if display_name else b""
        self._event_metadata.append(_map_entry(4, key, _int(1, key) + _text(2, name) + display + stats))

    def stats(self, number: int, stats: Stats) -> bytes:
        """Field `number` of XStat: metadata_id = 1 and a value."""
        return b"".join([_blob(number, self._stat_id(name) + _value(name, value)) for name, value in stats.items()])

    def bytes_stat(self, name: str, payload: bytes) -> bytes:
        """XEventMetadata.stats = 5 of XStat: metadata_id = 1, bytes_value = 6."""
        return _blob(5, self._stat_id(name) + _blob(6, payload))

    def serialise(self, stats: Stats) -> bytes:
        """XPlane: id = 1, name = 2, lines = 3, event_metadata = 4, stat_metadata = 5, stats = 6."""
        own_stats = self.stats(6, stats)
        stat_metadata = [_map_entry(5, key, _int(1, key) + _text(2, name)) for name, key in self._stat_ids.items()]
        return b"".join((self._head, *self._lines, *self._event_metadata, *stat_metadata, own_stats))

    def _stat_id(self, name: str) -> bytes:
        """XStat.metadata_id = 1: the XStatMetadata.id of a stat's name."""
        return _int(1, self._stat_ids.setdefault(name, len(self._stat_ids) + 1))


def _value(name: str, value: StatValue) -> bytes:
    """XStat's value: double_value = 2, int64_value = 4, str_value = 5; ValueError for a number they cannot show."""
    if isinstance(value, str):
        return _text(5, value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"stat {name!r} is {value}: leave out what is unknown")
        return b"\x11" + struct.pack("<d", value)  # wire type 1
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"stat {name!r} does not fit int64: {value}")
    return _int(4, value % 2**64)  # two's complement


# --- protobuf wire format ---------------------------------------------------------------------------------------------


def _map_entry(number: int, key: int, message: bytes) -> bytes:
    """map<int64, message>: repeated messages of key = 1, value = 2."""
    return _blob(number, _int(1, key) + _blob(2, message))


def _text(number: int, text: str) -> bytes:
    """Wire type 2, UTF-8."""
    return _blob(number, text.encode())


def _blob(number: int, payload: bytes) -> bytes:
    """Wire type 2: tag, length, bytes."""
    return _ONE_BYTE[number << 3 | 2] + _varint(len(payload)) + payload


def _int(number: int, value: int) -> bytes:
    """Wire type 0: tag, varint."""
    return _ONE_BYTE[number << 3] + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, least significant first, the high bit set on all but the last; value in [0, 2^64)."""
    if value < 0x80:
        return _ONE_BYTE[value]
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_ONE_BYTE: Final = tuple(bytes((value,)) for value in range(0x80))
