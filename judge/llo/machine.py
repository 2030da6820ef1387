"""What a chip's TensorCore costs, as data: `judge/data/llo/<chip>.toml`, each number with source and confidence."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from judge.llo.ici import Interconnect

DATA = Path(__file__).resolve().parent.parent / "data" / "llo"


@dataclass(frozen=True, kw_only=True)
class DmaCost:
    """A copy of n bytes in r contiguous runs holds the path for max(n / bytes_per_cycle, r × run_cycles); its flag is
    raised latency_cycles later."""

    latency_cycles: float
    bytes_per_cycle: float
    run_cycles: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One TensorCore's schedule costs."""

    chip: str
    rule: str  # of the DMA engine: calibrated or compiler
    clock_hz: float
    granule_bytes: int  # unit of DMA sizes, addresses and sync-flag counts
    hbm_pointer_bytes: int  # unit of an HBM operand's register
    branch_delay_bundles: int  # bundles after sbr.rel that still issue
    merges_empty_bundles: bool  # a printed {} may stand for several cycles behind a branch
    wait_cycles: int  # from the flag to the bundle behind the wait for it; one cycle where it was raised long before
    pushes_pairs: bool  # weights are pushed two at a time
    latencies: dict[str, int]  # instruction class → cycles until its result may be used
    cadences: dict[str, int]  # unit and class → cycles until the unit takes the next
    dma: dict[str, DmaCost]
    ici: Interconnect

    def latency(self, name: str, unit: str = "") -> int:
        """Cycles until the result may be used; a unit may have a figure of its own (`permute_xlu2`)."""
        return self.latencies.get(f"{name}_{unit}", self.latencies[name])

    def cadence(self, name: str) -> int:
        return self.cadences[name]

    def results_per_matmul(self, dtype: str) -> int:
        """Result registers that one vmatmul fills where they are addressed."""
        return {"bf16": 4, "f32": 2, "fp8": 8, "int8": 8, "int4": 16}[dtype]


RULES = ("calibrated", "compiler")


def load_machine(chip: str, rule: str = "calibrated") -> Machine:
    """The machine file of `chip`. Raises KeyError or FileNotFoundError where a number or the file is missing."""
    with (DATA / f"{chip}.toml").open("rb") as file:
        data = tomllib.load(file)
    return Machine(
        chip=chip,
        rule=rule,
        clock_hz=data["clock_hz"]["value"],
        granule_bytes=data["granule_bytes"]["value"],
        hbm_pointer_bytes=data["hbm_pointer_bytes"]["value"],
        branch_delay_bundles=data["branch_delay_bundles"]["value"],
        merges_empty_bundles=data["merges_empty_bundles"]["value"],
        wait_cycles=data["wait_cycles"]["value"],
        pushes_pairs=data["pushes_pairs"]["value"],
        latencies={
            name: number.get("calibrated", number["value"]) if rule == "calibrated" else number["value"]
            for name, number in data["latency"].items()
        },
        cadences={name: number["value"] for name, number in data["cadence"].items()},
        dma={
            kind: DmaCost(**{name: value for name, value in cost.items() if name not in ("confidence", "source")})
            for kind, cost in data["dma"][rule].items()
        },
        ici=Interconnect(
            link_bytes_per_second=data["ici_link_bytes_per_second"]["value"],
            hop_seconds=data["ici_hop_seconds"]["value"],
        ),
    )
