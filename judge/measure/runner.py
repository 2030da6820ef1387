"""Times compiled artifacts on the attached device, in a process of its own.

    python -I runner.py REQUEST.json

Candidate and champion take turns, call by call, so that drift hits both. Each call gets copies of the inputs that
nobody else uses, and is timed from its start until its last output is ready. The inputs have the scalars whose time
counts and data that nobody knew before, and what the candidate's last timed call gives is compared with the oracle: on
a chip a program can tell where it runs, by the last bits of a reciprocal for one.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

WARM_UP_CALLS = 3
TIMED_CALLS = 30
PROFILED_CALLS = 3


def load(workload: dict[str, Any], device: Any) -> Callable[[list[Any]], tuple[float, Any]]:
    """A function that runs one artifact on host arrays and returns the seconds of the call and its outputs."""
    import jax
    from jax import export

    from judge import jax_shims

    exported = export.deserialize(bytearray(Path(workload["artifact"]).read_bytes()))
    donated = tuple(workload["donated"])
    if device.platform == "cpu":
        run = jax_shims.compile_cpu(exported.call, exported.in_avals, donated)
    else:
        run = jax.jit(exported.call, donate_argnums=donated).lower(*exported.in_avals).compile()
    resident: dict[int, Any] = {}

    def call(inputs: list[Any]) -> tuple[float, Any]:
        for i, array in enumerate(inputs):
            if i in donated or i not in resident:
                resident[i] = jax.device_put(jax.numpy.array(array, copy=True), device)
        arguments = [resident[i] for i in range(len(inputs))]
        jax.block_until_ready(arguments)
        started = time.perf_counter()
        outputs = run(*arguments)
        jax.block_until_ready(outputs)
        return time.perf_counter() - started, outputs

    return call


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Samples in seconds: workload → program → list."""
    import jax

    from judge import oracle
    from judge.worker import load_kernel

    devices = [device for device in jax.devices() if device.platform == request["device"]]
    if not devices:
        return {"status": "NO_DEVICE", "reason": f"no {request['device']} device is attached"}
    sealed = load_kernel(Path(request["sealed"]))
    workloads = oracle.workloads_of(sealed)
    samples: dict[str, dict[str, list[float]]] = {}
    for name in request["programs"]["candidate"]:
        published = oracle.inputs_of(sealed, oracle.TIMED_SEED, workloads[name])
        inputs = oracle.timed_inputs(sealed, workloads[name], published, request["secret"])
        calls = {label: load(program[name], devices[0]) for label, program in request["programs"].items()}
        samples[name] = {label: [] for label in calls}
        for i in range(WARM_UP_CALLS + TIMED_CALLS):
            for label, call in calls.items():
                seconds, outputs = call(inputs)
                if i >= WARM_UP_CALLS:
                    samples[name][label].append(seconds)
                if label == "candidate":
                    last = outputs
        _compare(sealed, inputs, last, f"workload {name}, a timed call")
        _profile(calls["candidate"], inputs, request, devices[0])
    return {"status": "PASS", "device_kind": devices[0].device_kind, "samples": samples}


def _compare(sealed: ModuleType, inputs: list[Any], outputs: Any, where: str) -> None:
    """Raises Mismatch where the device's outputs are not those of the reference on the CPU."""
    import jax
    import numpy as np

    from judge import oracle

    with jax.default_device(jax.devices("cpu")[0]):
        want, _ = oracle.reference(sealed, inputs)
    oracle.compare_all(sealed, [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)], want, inputs, where)


def _profile(call: Callable[[list[Any]], Any], inputs: list[Any], request: dict[str, Any], device: Any) -> None:
    """Records three more calls, untimed, with the device's own profiler; --deep adds synchronisation."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 1
    options.python_tracer_level = 0
    options.raise_error_on_start_failure = True
    if device.platform == "tpu":
        mode = "TRACE_COMPUTE_AND_SYNC" if request["deep"] else "TRACE_COMPUTE"
        options.advanced_configuration = {"tpu_trace_mode": mode}
    with jax.profiler.trace(request["profile"], profiler_options=options):
        for _ in range(PROFILED_CALLS):
            call(inputs)


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
    from judge import oracle
    from judge.worker import write_result

    request = json.loads(Path(sys.argv[1]).read_text())
    if request["device"] == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        result = measure(request)
    except oracle.Mismatch as mismatch:
        result = {"status": "FAIL_CORRECTNESS", "reason": str(mismatch)}
    except Exception as error:
        result = {"status": "FAIL_CRASH", "reason": f"{type(error).__name__}: {str(error)[:2000]}"}
    write_result(request, result)


if __name__ == "__main__":
    main()
