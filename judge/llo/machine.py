"""What a chip's TensorCore costs, as data: `judge/data/llo/<chip>.toml`, each number with source and confidence."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data" / "llo"


@dataclass(frozen=True, kw_only=True)
class DmaCost:
    """A copy of n bytes takes latency_cycles + n / bytes_per_cycle; the second term is time on the shared path."""

    latency_cycles: float
    bytes_per_cycle: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One TensorCore's schedule costs."""

    chip: str
    clock_hz: float
    granule_bytes: int  # unit of DMA sizes, addresses and sync-flag counts
    hbm_pointer_bytes: int  # unit of an HBM operand's register
    branch_delay_bundles: int  # bundles after sbr.rel that still issue
    merges_empty_bundles: bool  # a printed {} may stand for several cycles behind a branch
    wait_cycles: float  # a dma.done.wait whose flag is already high enough
    dma: dict[str, DmaCost]


def load_machine(chip: str) -> Machine:
    """The machine file of `chip`. Raises KeyError or FileNotFoundError where a number or the file is missing."""
    with (DATA / f"{chip}.toml").open("rb") as file:
        data = tomllib.load(file)
    return Machine(
        chip=chip,
        clock_hz=data["clock_hz"]["value"],
        granule_bytes=data["granule_bytes"]["value"],
        hbm_pointer_bytes=data["hbm_pointer_bytes"]["value"],
        branch_delay_bundles=data["branch_delay_bundles"]["value"],
        merges_empty_bundles=data["merges_empty_bundles"]["value"],
        wait_cycles=data["wait_cycles"]["value"],
        dma={
            kind: DmaCost(latency_cycles=cost["latency_cycles"], bytes_per_cycle=cost["bytes_per_cycle"])
            for kind, cost in data["dma"].items()
        },
    )
