"""judge/worker.py for a peer's kernel: the package of it is reached without what its own __init__ imports.

`tpu_inference/__init__.py` wants vLLM and torch and sets flags of the whole process; the kernel's modules need neither.
They ask which device is attached, and none is: they are told the chip that is judged for. Two modules of the package
that do need vLLM have one function each that the kernels call; those are here.
"""

import json
import logging
import sys
import types
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from judge import jax_shims, worker

PACKAGE = "tpu_inference"
# device → key of the package's tables of tuned block sizes
DEVICES = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e", "TPU7x": "TPU v7"}
FOLDER = Path(sys.prefix) / "peers"  # apart from what is imported by name: the wheel brings a `tests` too


def reach_package() -> None:
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(FOLDER / PACKAGE)]
    sys.modules[PACKAGE] = package
    for name, function in (("logger", init_logger), ("utils", get_device_name)):
        module = types.ModuleType(f"{PACKAGE}.{name}")
        setattr(module, function.__name__, function)
        sys.modules[module.__name__] = module


def restore_reciprocal() -> None:
    """The kernel for head_dim 64 calls pallas.tpu.reciprocal, which in the pinned jax is in pallas alone."""
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    tpu.reciprocal = pallas.reciprocal  # type: ignore[attr-defined]


def init_logger(name: str) -> logging.Logger:
    """A logger with the two methods that vLLM's has besides."""
    logger = logging.getLogger(name)
    for method in ("info", "warning"):
        setattr(logger, f"{method}_once", getattr(logger, method))
    return logger


def get_device_name() -> str:
    """The name of the attached chip in those tables."""
    import jax

    return DEVICES[jax.devices()[0].device_kind]


def tell_chip(topology: str) -> None:
    import jax

    jax.devices = lambda *_: [jax_shims.topology_device(topology)]


if __name__ == "__main__":
    jax_shims.set_environment()
    reach_package()
    restore_reciprocal()
    tell_chip(json.loads(Path(sys.argv[1]).read_text())["topology"])
    worker.main()
