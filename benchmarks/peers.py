"""Ours and the production kernels under the same judge: time, MBU, MFU and the ratio to the better peer, by shape.

    .venv/bin/python benchmarks/peers.py [--chip CHIP] [--shape NAME] [--kernel NAME] [--write DIR]

Every kernel gets the same problem (kernel.py's definitions with the shape's heads and lengths), compiler, chip and
executor; only the stages that give figures run. tpu-inference is no dependency: `.venv/bin/python -m pip install
--no-deps --target .venv/peers tpu-inference` brings it; without it its lines say so. `--write DIR` leaves each judged
file there.

A peer gets two things that a candidate does not, both in its favour: more time for the compiler, and, where XLA gives
a transposition to the SparseCore, for which the judge has no cost and which it therefore refuses, that for nothing.
Its line then says "at least".
"""

import argparse
import ast
import math
import re
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from judge import contract, pipeline  # noqa: E402
from judge.chips import CHIPS, load_chip  # noqa: E402
from judge.llo import module  # noqa: E402
from judge.roofline import Figures  # noqa: E402
from kernels.shapes import SHAPES, Shape, problem  # noqa: E402

PEERS = ROOT / "kernels" / "peers"
OURS, NAMES = "ours", ("ours", "rpa_v3", "jax_rpa")
OWN_SIZES = "SMALLER = 1"  # in a wrapper that can divide them
PATIENCE = pipeline.Limits(compile_seconds=1800.0)  # for a peer; RPA v3 takes the compiler more than 400 s in places
AT_LEAST = "at_least"  # the fact that a verdict's time leaves something out


def with_peer(text: str, peer: str) -> str:
    """The problem of `text` with a peer's kernel: what the sealed definitions need of it, then the wrapper."""
    tree, wrapper = ast.parse(text), ast.parse((PEERS / f"{peer}.py").read_text())
    theirs = _names(wrapper.body)
    kept: set[int] = set()
    wanted = (set(contract.SEALED) | set(contract.REQUIRED)) - theirs
    while wanted:
        name = wanted.pop()
        for number, node in enumerate(tree.body):
            if number not in kept and name in _names([node]):
                kept.add(number)
                wanted |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - theirs
    nodes = [node for number, node in enumerate(tree.body) if number in kept]
    imports = [node for node in wrapper.body if isinstance(node, ast.Import | ast.ImportFrom)]
    rest = [node for node in wrapper.body[1:] if node not in imports]
    return ast.unparse(ast.Module(body=[*imports, *nodes, *rest], type_ignores=[])) + "\n"


def _names(nodes: list[ast.stmt]) -> set[str]:
    """What these statements of a module define."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def on_sparse_core(hlo: str) -> bool:
    """Whether it has asynchronous calls, and each changes a layout on the SparseCore."""
    starts = [op for op in module.parse_entry(hlo) if op.opcode == "call-start"]
    return bool(starts) and all('"offload":"OFFLOAD_DATA_FORMATTING"' in op.text for op in starts)


class PeerJudging(pipeline.Judging):
    """The judge with kernels/peers/worker.py to trace: a peer's package is not one that a kernel file could import."""

    def _predict(self, traced, verdict):  # type: ignore[no-untyped-def]
        if not any(on_sparse_core((self.folder / "compile" / name / "hlo.txt").read_text()) for name in traced):
            return super()._predict(traced, verdict)
        for name in traced:
            verdict.facts[name][AT_LEAST] = 1
        with mock.patch.multiple(
            module,
            _FREE=module._FREE | {"call-start", "call-done"},
            _FREE_CUSTOM_CALLS=(*module._FREE_CUSTOM_CALLS, "PrepareAsyncCallStart", "PrepareAsyncCallDone"),
        ):
            return super()._predict(traced, verdict)

    def _start(self, script, folder, request, pipe=None):  # type: ignore[no-untyped-def]
        return super()._start(str(PEERS / script) if script == "worker.py" else script, folder, request, pipe)


def judged(text: str, name: str, chip: str, base: str) -> pipeline.Verdict:
    """A kernel's figures on the problem of `base`, which is the oracle's: a peer's package is not imported there."""
    candidate = contract.check_source(text.encode(), "kernel.py")
    sealed = contract.check_source(f"{base}\nNEEDS = {candidate.needs!r}\n".encode(), "problem.py")
    judging, limits = (pipeline.Judging, pipeline.Limits()) if name == OURS else (PeerJudging, PATIENCE)
    task = pipeline.Task(candidate=candidate, sealed=sealed, chip=load_chip(chip), mode="model", limits=limits)
    with pipeline.private_folder() as folder:
        return judging(task, folder, lambda text: None).run_to_cycles()


def cell(verdict: pipeline.Verdict) -> str:
    if verdict.total is None:
        reason = re.sub(r"^workload \w+: |\S*-final_bundles.txt: ", "", " ".join(verdict.reason.split()))
        return f"{verdict.status}: {reason[:120]}"
    (figures,) = verdict.workloads.values()
    line = f"{figures.latency_ms:9.4f} ms  MBU {figures.mbu_pct:5.1f} %  MFU {figures.mfu_pct:5.1f} %"
    return "at least " + line if is_bound(verdict) else line


def is_bound(verdict: pipeline.Verdict) -> bool:
    return any(AT_LEAST in facts for facts in verdict.facts.values())


def row(shape: Shape, chip: str, names: list[str], folder: Path | None) -> float | None:
    """Judges the kernels on one shape, prints a line each; prints and returns the better peer's time over ours."""
    ours, peers = None, []
    base = problem(shape)
    for name in names:
        text = f"{base}\nNEEDS = ()\n" if name == OURS else with_peer(base, name)
        if folder is not None:
            (folder / f"{shape.name} {name}.py".replace(" ", "_").replace("/", "-")).write_text(text)
        verdict = judged(text, name, chip, base)
        if "memory space vmem" in verdict.reason and OWN_SIZES in text:
            print(f"{chip:6} {shape.name:28} {name:8} with half of its own block sizes, for which VMEM is too small:")
            verdict = judged(text.replace(OWN_SIZES, "SMALLER = 2"), name, chip, base)
        print(f"{chip:6} {shape.name:28} {name:8} {cell(verdict)}", flush=True)
        figures: Figures | None = next(iter(verdict.workloads.values()), None)
        if figures is None or figures.latency_ms is None:
            continue
        if name == OURS:
            ours = figures.latency_ms
        else:
            peers.append((figures.latency_ms, is_bound(verdict)))
    if ours is None or not peers:
        return None
    better, bound = min(peers)
    says = f"ours is {'at least ' if bound else ''}{better / ours:.2f} times as fast as the better peer"
    print(f"{chip:6} {shape.name:28} {says}", flush=True)
    return better / ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chip", action="append", choices=CHIPS, help="default: v5e, v6e and tpu7x")
    parser.add_argument("--shape", action="append", choices=[shape.name for shape in SHAPES], metavar="NAME")
    parser.add_argument("--kernel", action="append", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--write", type=Path, metavar="DIR", help="leave the judged files in DIR")
    options = parser.parse_args()
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
    for chip in options.chip or ("v5e", "v6e", "tpu7x"):
        ratios = []
        for shape in SHAPES:
            if options.shape and shape.name not in options.shape:
                continue
            ratio = row(shape, chip, options.kernel or list(NAMES), options.write)
            if ratio is not None:
                ratios.append(ratio)
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"{chip}: geometric mean {mean:.2f} over {len(ratios)} shapes, least {min(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
