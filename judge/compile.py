"""Artifact → real TPU compiler → facts and dumps, in a process of its own (libtpu reads its flags once).

    python -I compile.py REQUEST.json

For each workload it leaves, in `<out>/<workload>/`: the scheduled HLO, the HLO proto, the final bundles of every HLO
op, and `facts.json` (memory, program hash). `<out>/result.json` says whether all compiled; what did not is the
candidate's fault and carries the compiler's own message.
"""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

KEPT_DUMPS = ("final_bundles.txt", "per-bundle-utilization.txt", "registers-and-allocations.txt")


def program_sha256(folder: Path) -> str:
    """Hash of what the chip would run: every op's final bundles without comments, and the scheduled HLO's constants.

    Source lines, names of files and time stamps are in the comments and metadata, so that an edit that compiles to
    the same program has the same hash.
    """
    from judge.llo.parse import split_comments  # the judge's path is not set yet where this file is a program

    digest = hashlib.sha256()
    for dump in sorted(folder.glob("*-final_bundles.txt"), key=lambda path: op_of_dump(path)):
        if "schedule-analysis" in dump.name:
            continue
        digest.update(op_of_dump(dump).encode() + b"\0")
        code, _, _ = split_comments(dump.read_text())
        digest.update(" ".join(code.split()).encode())
    hlo = re.sub(r", (metadata|backend_config)=\{.*", "", (folder / "hlo.txt").read_text())
    entry = hlo[hlo.find("\n%") :]
    digest.update(re.sub(r"#.*|\"[^\"]*\"", "", entry).encode())
    return digest.hexdigest()


def op_of_dump(path: Path) -> str:
    """`1795-copy.2-03-final_bundles.txt` → `copy.2`."""
    match = re.match(r"^\d+-(.+)-\d+-[a-z].*$", path.name)
    return match[1] if match else path.name


def compile_all(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles every workload's TPU artifact for the chip. Returns the result that main() writes."""
    import jax
    from jax import export
    from jax.sharding import SingleDeviceSharding

    from judge import jax_shims
    from judge.worker import work

    jax_shims.check_version()
    out = Path(request["out"])
    device = jax_shims.topology_device(request["topology"])
    sharding = SingleDeviceSharding(device)
    seconds = {}
    for name, workload in request["workloads"].items():
        started = time.monotonic()
        try:
            exported = export.deserialize(bytearray(Path(workload["artifact"]).read_bytes()))
            shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in exported.in_avals]
            with jax_shims.on_chip(device), work():
                function = jax.jit(exported.call, donate_argnums=tuple(workload["donated"]))
                compiled = function.lower(*shapes).compile()
        except jax.errors.JaxRuntimeError as error:
            return {"status": "FAIL_COMPILE", "reason": f"workload {name}: the TPU compiler says: {_message(error)}"}
        except Exception as error:
            what = f"{type(error).__name__}: {_message(error)}"
            return {"status": "FAIL_COMPILE", "reason": f"workload {name}: the TPU program cannot be loaded: {what}"}
        folder = out / name
        folder.mkdir()
        _collect(Path(request["dump"]), folder)
        executable, memory = compiled.runtime_executable(), compiled.memory_analysis()
        assert executable is not None and memory is not None
        (folder / "hlo.txt").write_text(compiled.as_text())
        (folder / "module.pb").write_bytes(executable.hlo_modules()[0].as_serialized_hlo_module_proto())
        facts = {
            "argument_bytes": memory.argument_size_in_bytes,
            "output_bytes": memory.output_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "program_sha256": program_sha256(folder),
        }
        (folder / "facts.json").write_text(json.dumps(facts))
        seconds[name] = time.monotonic() - started
    return {"status": "PASS", "seconds": seconds}


def _collect(dump: Path, folder: Path) -> None:
    """Moves the dumps of the compilation that just ended out of the process-wide folder."""
    for path in sorted(dump.iterdir()):
        if path.name.endswith(KEPT_DUMPS) and "schedule-analysis" not in path.name:
            path.rename(folder / path.name)
        else:
            path.unlink()


def _message(error: BaseException) -> str:
    """The compiler's message: what it wanted, what it had, the largest allocations; the op by its name alone."""
    text = re.sub(r"(%[\w.\-]+) = .*?stack_frame_id=\d+\}", r"\1", str(error))
    return re.sub(r"\n\s*\n+", "\n", text).strip()[:2000]


def main() -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from judge import jax_shims
    from judge.worker import write_result

    request = json.loads(Path(sys.argv[1]).read_text())
    jax_shims.set_environment()
    Path(request["dump"]).mkdir(parents=True, exist_ok=True)
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={request['dump']} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final "
        "--xla_mosaic_enable_llo_source_annotations=true"  # which line of the kernel file each slot comes from
    )
    write_result(request, compile_all(request))


if __name__ == "__main__":
    main()
