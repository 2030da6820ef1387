"""An executed module as events for a trace viewer. Computes no results."""

from judge.llo.module import ModuleCost, OpCost
from judge.trace import Event, ModuleTrace

# Columns of the compiler's utilisation table → XProf's names of unit lines.
_UNIT_LINES = {
    "MXU Instructions": ("MXU", "MATMUL", "MATPUSH"),
    "VALU Instructions": ("VALU",),
    "EUP Instructions": ("EUP",),
    "XLU Instructions": ("XLU",),
    "VLD Instructions": ("VLOAD", "VLOAD:FILL"),
    "VST Instructions": ("VSTORE", "VSTORE:SPILL"),
    "SALU Instructions": ("SALU",),
}
_SHOWN = 5_000  # DMA and block events of one op; a trace viewer shows no more usefully


def module_trace(name: str, program_id: int, cost: ModuleCost, module_proto: bytes | None) -> ModuleTrace:
    """One workload's module: its ops in order, the DMAs that ran, and slots used a block on each unit's line."""
    ps_per_cycle = 1e12 / cost.machine.clock_hz
    lines: dict[str, list[Event]] = {line: [] for line in ("XLA Ops", "DMA", *_UNIT_LINES)}
    start = 0.0
    for op in cost.ops:
        lines["XLA Ops"].append(_op_event(op, start, ps_per_cycle))
        _add_execution(op, start, ps_per_cycle, lines)
        start += op.cycles
    return ModuleTrace(
        name=name,
        program_id=program_id,
        duration_ps=max(1, round(start * ps_per_cycle)),
        lines=lines,
        hlo_proto=_length_delimited(1, module_proto) if module_proto else None,
    )


def _op_event(op: OpCost, start: float, ps_per_cycle: float) -> Event:
    begin, end = round(start * ps_per_cycle), round((start + op.cycles) * ps_per_cycle)
    return Event(
        name=op.op.text[:1000],
        display_name=op.op.name,
        start_ps=begin,
        duration_ps=end - begin,
        metadata_stats={
            "hlo_category": "custom-call" if op.is_kernel else op.op.opcode,
            "bytes_accessed": op.hbm_read_bytes + op.hbm_written_bytes,
        },
    )


def _add_execution(op: OpCost, start: float, ps_per_cycle: float, lines: dict[str, list[Event]]) -> None:
    if op.execution is None:
        return
    end_ps = round((start + op.cycles) * ps_per_cycle)
    for dma in op.execution.dmas[:_SHOWN]:
        # Its turn on the shared path: thousands may be under way at once, and would fill a row each.
        begin = round((start + dma.transfer_cycle) * ps_per_cycle)
        finish = min(end_ps, round((start + dma.transferred_cycle) * ps_per_cycle))
        stats = {
            "bytes": dma.size_bytes,
            "sync_flag": dma.flag,
            "issued_before_ns": round((dma.transfer_cycle - dma.issue_cycle) * ps_per_cycle / 1e3, 3),
            "flag_raised_after_ns": round((dma.done_cycle - dma.transferred_cycle) * ps_per_cycle / 1e3, 3),
        }
        lines["DMA"].append(Event(name=dma.kind, start_ps=begin, duration_ps=max(0, finish - begin), stats=stats))
    for address, first, last in op.execution.blocks[:_SHOWN]:
        begin, finish = round((start + first) * ps_per_cycle), round((start + last) * ps_per_cycle)
        used = op.block_slots[address]
        for line, units in _UNIT_LINES.items():
            slots = sum(used.get(unit, 0) for unit in units)
            if slots:
                name = f"bundles from {address:#x}"
                lines[line].append(
                    Event(name=name, start_ps=begin, duration_ps=finish - begin, stats={"slots_used": slots})
                )


def _length_delimited(field: int, data: bytes) -> bytes:
    """A protobuf field of bytes: HloProto's hlo_module is field 1."""
    size, out = len(data), bytearray([field << 3 | 2])
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(out) + bytes([size]) + data
