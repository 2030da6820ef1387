"""The only code that runs a kernel file: an isolated process that hands over artifacts and nothing else.

    python -I worker.py REQUEST.json

It traces kernel_fn once a workload on abstract shapes, so it sees no data, and exports two programs from that one
jaxpr: the TPU lowering, and the same with every pallas_call interpreted, for the CPU. Both are written to the private
folder that the request names, with a result.json that says what happened. Nothing that it prints is read.
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

# What would make the checked program another than the timed one, or take work out of both.
FORBIDDEN_PRIMITIVES = ("platform_index", "pure_callback", "io_callback", "debug_callback", "python_callback")


class WorkerFailure(Exception):
    """A failed candidate: status and reason go to the verdict."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def load_kernel(path: Path) -> ModuleType:
    """Executes a kernel file as module `kernel`."""
    spec = importlib.util.spec_from_file_location("kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel"] = module
    spec.loader.exec_module(module)
    return module


def where(error: BaseException, path: Path) -> str:
    """`Type: message (kernel.py:123)`, the innermost line that is the kernel file's own."""
    own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    line = f" ({path.name}:{own[-1]})" if own else ""
    message = str(error).strip().replace(str(path), path.name)  # not where this run's private folder was
    return f"{type(error).__name__}: {message[:2000]}{line}"


def write_result(request: dict[str, Any], result: dict[str, Any]) -> None:
    """Leaves a stage's `result.json` in the folder that its request names, whole or not at all."""
    partial = Path(request["out"]) / "result.json.part"
    partial.write_text(json.dumps(result))
    partial.rename(partial.with_suffix(""))


def trace(request: dict[str, Any]) -> dict[str, Any]:
    """Artifacts of every workload. Raises WorkerFailure."""
    import jax
    from jax import export
    from jax.extend import core as jex_core

    from judge import jax_shims

    jax_shims.check_version()
    jax_shims.patch_interpreter()
    path = Path(request["kernel"])
    out = Path(request["out"])
    try:
        kernel = load_kernel(path)
        kernel_fn = kernel.kernel_fn
    except (Exception, SystemExit) as error:
        raise WorkerFailure("FAIL_CRASH", f"importing the kernel file raised {where(error, path)}") from error
    device = jax_shims.topology_device(request["topology"])
    results = {}
    for name, inputs in request["workloads"].items():
        shapes = [jax.ShapeDtypeStruct(tuple(array["shape"]), array["dtype"]) for array in inputs]
        with jax_shims.on_chip(device):
            try:
                jaxpr, outputs = jax.make_jaxpr(kernel_fn, return_shape=True)(*shapes)
            except (Exception, SystemExit) as error:
                raise WorkerFailure("FAIL_CRASH", f"workload {name}: kernel_fn raised {where(error, path)}") from error
            forbidden = jax_shims.find_primitives(jaxpr, FORBIDDEN_PRIMITIVES)
            if forbidden:
                raise WorkerFailure(
                    "FAIL_CONTRACT",
                    f"workload {name}: kernel_fn uses {', '.join(forbidden)}: the program that is checked on the CPU "
                    "must be the one that runs on the chip, with no callbacks",
                )
            leaves, tree = jax.tree.flatten(outputs)
            donated = jax_shims.donated_arguments(jaxpr, len(shapes))

            def lower(closed: Any, platform: str, donated: tuple[int, ...] = donated, shapes: Any = shapes) -> bytes:
                function = jax.jit(jex_core.jaxpr_as_fun(closed), donate_argnums=donated)
                return bytes(export.export(function, platforms=[platform])(*shapes).serialize())

            try:
                (out / f"{name}.tpu").write_bytes(lower(jaxpr, "tpu"))
            except Exception as error:
                raise WorkerFailure("FAIL_COMPILE", f"workload {name}: TPU lowering: {where(error, path)}") from error
            try:
                (out / f"{name}.cpu").write_bytes(lower(jax_shims.interpreted(jaxpr), "cpu"))
            except Exception as error:
                raise WorkerFailure(
                    "FAIL_COMPILE", f"workload {name}: lowering for the CPU, to be checked: {where(error, path)}"
                ) from error
        results[name] = {
            "donated": list(donated),
            "outputs": [{"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for leaf in leaves],
            "tree": str(tree),
        }
    return {"status": "PASS", "workloads": results}


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from judge import jax_shims

    jax_shims.set_environment()
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = trace(request)
    except WorkerFailure as failure:
        result = {"status": failure.status, "reason": str(failure)}
    write_result(request, result)


if __name__ == "__main__":
    main()
