"""judge/worker.py for a peer's kernel: the package of it is reached without what its own __init__ imports.

`tpu_inference/__init__.py` wants vLLM and torch and sets flags of the whole process; the kernel's modules need neither.
They ask which device is attached, and none is: they are told the chip that is judged for.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from judge import jax_shims, worker

PACKAGE = "tpu_inference"


def reach_package() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return  # the kernel file's own import says what is missing
    package = types.ModuleType(PACKAGE)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[PACKAGE] = package


def tell_chip(topology: str) -> None:
    import jax

    jax.devices = lambda *_: [jax_shims.topology_device(topology)]


if __name__ == "__main__":
    jax_shims.set_environment()
    reach_package()
    tell_chip(json.loads(Path(sys.argv[1]).read_text())["topology"])
    worker.main()
