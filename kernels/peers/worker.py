"""judge/worker.py for a peer's kernel: the package of it is reached without what its own __init__ imports.

`tpu_inference/__init__.py` wants vLLM and torch and sets flags of the whole process; the kernel's modules need neither.
They ask which device is attached, and none is: they are told the chip that is judged for.
"""

import json
import sys
import types
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from judge import jax_shims, worker

PACKAGE = "tpu_inference"
FOLDER = Path(sys.prefix) / "peers"  # apart from what is imported by name: the wheel brings a `tests` too


def reach_package() -> None:
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(FOLDER / PACKAGE)]
    sys.modules[PACKAGE] = package


def tell_chip(topology: str) -> None:
    import jax

    jax.devices = lambda *_: [jax_shims.topology_device(topology)]


if __name__ == "__main__":
    jax_shims.set_environment()
    reach_package()
    tell_chip(json.loads(Path(sys.argv[1]).read_text())["topology"])
    worker.main()
