"""The only code that runs a candidate's kernel file: an isolated, contained process that traces and does nothing else.

    python -I worker.py REQUEST.json

It traces kernel_fn for one workload on abstract shapes, so it sees no data, and hands the jaxpr over as data
(wire.py, channel.py). It lowers nothing: what jax does in a process that has run the kernel file is not relied on.
Nothing that it prints is read.
"""

import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


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


_WORK: list[tuple[float, float]] = []


@contextmanager
def work() -> Iterator[None]:
    """Around what any judge would have to do, compile or run a program: the rest of the time is this judge's own."""
    started = time.monotonic()
    try:
        yield
    finally:
        _WORK.append((started, time.monotonic()))


def write_result(request: dict[str, Any], result: dict[str, Any]) -> None:
    """Leaves a stage's `result.json` in the folder that its request names, whole or not at all."""
    partial = Path(request["out"]) / "result.json.part"
    partial.write_text(json.dumps({**result, "work": _WORK}))
    partial.rename(partial.with_suffix(""))


def trace(request: dict[str, Any]) -> tuple[str, bytes]:
    """Output tree and traced program of one workload. Raises WorkerFailure."""
    import jax

    from judge import jax_shims, wire

    path, name = Path(request["kernel"]), request["workload"]
    device = jax_shims.topology_device(request["topology"])
    try:
        kernel_fn = load_kernel(path).kernel_fn
    except (Exception, SystemExit) as error:
        raise WorkerFailure("FAIL_CRASH", f"importing the kernel file raised {where(error, path)}") from error
    shapes = [jax.ShapeDtypeStruct(tuple(array["shape"]), array["dtype"]) for array in request["inputs"]]
    with jax_shims.on_chip(device):
        try:
            jaxpr, outputs = jax.make_jaxpr(kernel_fn, return_shape=True)(*shapes)
        except (Exception, SystemExit) as error:
            raise WorkerFailure("FAIL_CRASH", f"workload {name}: kernel_fn raised {where(error, path)}") from error
    try:
        return str(jax.tree.structure(outputs)), wire.dumps(jaxpr)
    except wire.WireError as error:
        raise WorkerFailure("FAIL_CONTRACT", f"workload {name}: {error}") from error


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from judge import channel, containment, jax_shims

    jax_shims.set_environment()
    request = json.loads(Path(sys.argv[1]).read_text())
    containment.enter(containment.Need(readable=(request["out"],)), max_file_bytes=containment.MAX_LOG_BYTES)
    jax_shims.check_version()
    jax_shims.patch_interpreter()
    try:
        tree, program = trace(request)
        message = channel.Message(status="PASS", tree=tree, program=program)
    except WorkerFailure as failure:
        message = channel.Message(status=failure.status, reason=str(failure))
    channel.send(request["channel"], message)


if __name__ == "__main__":
    main()
