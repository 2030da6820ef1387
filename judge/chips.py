"""Hardware facts, one TOML file a chip in `data/chips/`, each number with its source and confidence."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data" / "chips"
CHIPS = tuple(sorted(path.stem for path in DATA.glob("*.toml")))
DEFAULT_CHIP = "v5e"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts devices (a chip; on tpu7x, half of one)."""

    name: str
    topology: str  # smallest slice, for ahead-of-time compilation
    device_kind: str
    tensor_cores: int
    peak_flops_per_second: dict[str, float]  # by matmul input: bf16, int8, fp8
    hbm_bytes_per_second: float
    hbm_bytes: int
    vmem_bytes_per_core: int


def load_chip(name: str) -> Chip:
    """The facts of chip `name`. Raises ValueError that lists the known ones."""
    if name not in CHIPS:
        raise ValueError(f"unknown chip {name!r}; known: {', '.join(CHIPS)}")
    with (DATA / f"{name}.toml").open("rb") as file:
        data = tomllib.load(file)
    return Chip(
        name=name,
        topology=data["topology"],
        device_kind=data["device_kind"],
        tensor_cores=data["tensor_cores"],
        peak_flops_per_second={key: fact["value"] for key, fact in data["peak_flops_per_second"].items()},
        hbm_bytes_per_second=data["hbm_bytes_per_second"]["value"],
        hbm_bytes=data["hbm_bytes"]["value"],
        vmem_bytes_per_core=data["vmem_bytes_per_core"]["value"],
    )
