"""A traced program → the two that are judged: one for the chip, and the same for the CPU. Runs no kernel file.

    python -I lower.py REQUEST.json

From the one jaxpr that the worker handed over for a workload come the TPU lowering, which is compiled and timed, and
the same jaxpr with every pallas_call interpreted and its float32 products as coarse as the chip's, lowered for the CPU,
which is checked (not where only figures are asked for). What would make one differ from the other, or hide work from
both, is FAIL_CONTRACT here.
"""

import json
import sys
from pathlib import Path
from typing import Any

# What would make the checked program another than the timed one, or take work out of both.
FORBIDDEN_PRIMITIVES = (
    *("platform_index", "pure_callback", "io_callback", "debug_callback", "debug_print", "python_callback"),
    *("ffi_call", "infeed", "outfeed", "semaphore_read", "device_put", "custom_partitioning"),
    # Exact on the CPU and approximate on the chip; other numbers on each.
    *("approx_top_k", "rng_bit_generator", "rng_uniform"),
)
MAX_CONSTANT_BYTES = 1 << 20


class Refusal(Exception):
    """A failed candidate: status and reason go to the verdict."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def check_program(program: Any, inputs: list[dict[str, Any]], *, flops: float, needs_pallas: bool) -> None:
    """Raises Refusal where a traced program is not one that can be judged."""
    from judge import jax_shims

    shapes = [(tuple(array["shape"]), array["dtype"]) for array in inputs]
    traced = [(tuple(aval.shape), str(aval.dtype)) for aval in program.in_avals]
    if shapes != traced:
        raise Refusal("FAIL_CONTRACT", f"the traced program takes {traced}, the workload's inputs are {shapes}")
    forbidden = jax_shims.find_primitives(program, FORBIDDEN_PRIMITIVES)
    if forbidden:
        raise Refusal(
            "FAIL_CONTRACT",
            f"kernel_fn uses {', '.join(forbidden)}: the program that is checked on the CPU must be the one that runs "
            "on the chip, with no callbacks",
        )
    constants = jax_shims.constant_bytes(program)
    if constants > MAX_CONSTANT_BYTES:
        raise Refusal(
            "FAIL_CONTRACT", f"{constants} bytes of constants are baked in, at most {MAX_CONSTANT_BYTES} may be"
        )
    if jax_shims.interpreted_calls(program):
        raise Refusal("FAIL_CONTRACT", "a pallas_call with interpret set: no kernel would be compiled for the chip")
    if not needs_pallas:
        return
    if not jax_shims.find_primitives(program, jax_shims.PALLAS_CALLS):
        raise Refusal(
            "FAIL_CONTRACT",
            'kernel_fn has no Pallas kernel; a baseline that is meant to be plain XLA declares NEEDS = ("no pallas",)',
        )
    beside = jax_shims.matmul_flops_beside_kernels(program)
    if 2 * beside > flops:
        raise Refusal(
            "FAIL_CONTRACT",
            f"matrix products beside the Pallas kernel do {beside:.6g} of the workload's {flops:.6g} FLOPs: the kernel "
            "itself has to do the work",
        )


def lower(request: dict[str, Any]) -> dict[str, Any]:
    """The workload's artifacts, one a platform, and which arguments it donates. Raises Refusal."""
    import jax
    from jax import export
    from jax.extend import core

    from judge import jax_shims, wire
    from judge.worker import where, work

    out, kernel = Path(request["out"]), Path(request["kernel"])
    with jax_shims.on_chip(jax_shims.topology_device(request["topology"])):
        try:
            program = wire.loads(Path(request["program"]).read_bytes())
        except wire.WireError as error:
            raise Refusal("FAIL_CRASH", str(error)) from error
        check_program(program, request["inputs"], flops=request["flops"], needs_pallas=request["needs_pallas"])
        shapes = [jax.ShapeDtypeStruct(tuple(array["shape"]), array["dtype"]) for array in request["inputs"]]
        donated = jax_shims.donated_arguments(program, len(shapes))

        def write(closed: Any, platform: str, what: str) -> None:
            function = jax.jit(core.jaxpr_as_fun(closed), donate_argnums=donated)
            try:
                with work():
                    data = export.export(function, platforms=[platform])(*shapes).serialize()
            except Exception as error:
                raise Refusal("FAIL_COMPILE", f"{what}: {where(error, kernel)}") from error
            (out / platform).write_bytes(bytes(data))

        write(program, "tpu", "TPU lowering")
        if "cpu" in request["platforms"]:
            try:
                checked = jax_shims.interpreted(jax_shims.rounding_operands(program))
            except NotImplementedError as error:
                raise Refusal("FAIL_CONTRACT", f"it cannot be checked on the CPU: {error}") from error
            write(checked, "cpu", "lowering for the CPU, to be checked")
    return {"status": "PASS", "donated": list(donated)}


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from judge import containment, jax_shims
    from judge.worker import write_result

    jax_shims.set_environment()
    request = json.loads(Path(sys.argv[1]).read_text())
    containment.enter(containment.Need(readable=(request["out"],), writable=(request["out"],)))
    jax_shims.check_version()
    jax_shims.patch_interpreter()
    try:
        result = lower(request)
    except Refusal as refusal:
        result = {"status": refusal.status, "reason": f"workload {request['workload']}: {refusal}"}
    write_result(request, result)


if __name__ == "__main__":
    main()
