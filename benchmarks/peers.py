"""Ours and the production kernels under the same judge: time, MBU, MFU and the ratio to the better peer, by shape.

    .venv/bin/python benchmarks/peers.py [--chip CHIP] [--shape NAME] [--kernel NAME] [--write DIR]

Every kernel gets the same problem (kernel.py's definitions with the shape's heads and lengths), compiler, chip and
executor; only the stages that give figures run. tpu-inference is no dependency: `.venv/bin/python -m pip install
--no-deps --target .venv/peers tpu-inference` brings it; without it its lines say so. `--write DIR` leaves each judged
file there.
"""

import argparse
import ast
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from judge import contract, pipeline  # noqa: E402
from judge.chips import CHIPS, load_chip  # noqa: E402
from judge.roofline import Figures  # noqa: E402

PEERS = ROOT / "kernels" / "peers"
OURS, NAMES = "ours", ("ours", "rpa_v3", "jax_rpa")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Heads, page size and lengths; `context` is the longest, decodes have between half of it and all of it."""

    name: str
    batch: str  # decode, prefill or mixed
    context: int
    num_seqs: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64

    @property
    def num_tokens(self) -> int:
        return {"decode": self.num_seqs, "prefill": self.context, "mixed": 2048 + self.num_seqs}[self.batch]


SHAPES = (
    Shape(name="llama-8b decode 1k", batch="decode", context=1024, num_seqs=128),
    Shape(name="llama-8b decode 8k", batch="decode", context=8192, num_seqs=32),
    Shape(name="llama-8b decode 8k page 16", batch="decode", context=8192, num_seqs=32, page_size=16),
    Shape(name="llama-8b decode 8k page 128", batch="decode", context=8192, num_seqs=32, page_size=128),
    Shape(name="llama-8b decode 32k", batch="decode", context=32768, num_seqs=8, page_size=128),
    Shape(name="llama-8b prefill 2k", batch="prefill", context=2048, num_seqs=1),
    Shape(name="llama-8b prefill 8k", batch="prefill", context=8192, num_seqs=1),
    Shape(name="llama-8b mixed", batch="mixed", context=8192, num_seqs=24),
    Shape(name="llama-70b decode 8k", batch="decode", context=8192, num_seqs=32, num_q_heads=64),
    Shape(name="llama-70b prefill 8k", batch="prefill", context=8192, num_seqs=1, num_q_heads=64),
    Shape(name="40/8 decode 8k", batch="decode", context=8192, num_seqs=32, num_q_heads=40),
    Shape(
        name="d 256 decode 8k", batch="decode", context=8192, num_seqs=32, num_q_heads=16, num_kv_heads=4, head_dim=256
    ),
    Shape(
        name="d 256 prefill 8k", batch="prefill", context=8192, num_seqs=1, num_q_heads=16, num_kv_heads=4, head_dim=256
    ),
)

# In the place of kernel.py's own: one prefill of the whole context, decodes of ragged lengths, or both.
LENGTHS = """

def _lengths(*, batch, num_tokens, num_seqs, num_pages, page_size, poison=False, draw=5, magnitude=1.0):
    del num_pages, page_size, poison, magnitude
    if batch == "prefill":
        return np.array([num_tokens]), np.array([num_tokens]), 0
    rng = np.random.default_rng(draw)
    kv_lens = rng.integers(MAX_CONTEXT // 2, MAX_CONTEXT, num_seqs, endpoint=True)
    q_lens = np.ones(num_seqs, np.int64)
    if batch == "mixed":
        q_lens[-2:] = [1500, 548]
        return q_lens, kv_lens, num_seqs - 2
    return q_lens, kv_lens, num_seqs
"""


def problem(shape: Shape) -> str:
    """kernel.py on this shape."""
    text = (ROOT / "kernel.py").read_text()
    pages = -(-shape.context // shape.page_size)
    workload = {
        "batch": shape.batch,
        "num_tokens": shape.num_tokens,
        "num_seqs": shape.num_seqs,
        "num_pages": pages * shape.num_seqs,
        "page_size": shape.page_size,
    }
    constants = {
        "NUM_Q_HEADS": shape.num_q_heads,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "MAX_CONTEXT": shape.context,
    }
    for name, value in constants.items():
        text, count = re.subn(rf"^{name} = \d+", f"{name} = {value}", text, flags=re.M)
        assert count == 1, f"kernel.py has no constant {name}"
    text, count = re.subn(r"^WORKLOADS = \{.*?^\}\n", f"WORKLOADS = {{'shape': {workload}}}\n", text, flags=re.M | re.S)
    assert count == 1, "kernel.py has no WORKLOADS"
    # Padding of the metadata as engines leave it; ours is judged on garbage elsewhere.
    text = text.replace("rng.integers(2**20, 2**30, ", "rng.integers(0, 1, ")
    return text + LENGTHS


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


class PeerJudging(pipeline.Judging):
    """The judge with kernels/peers/worker.py to trace: a peer's package is not one that a kernel file could import."""

    def _start(self, script, folder, request, pipe=None):  # type: ignore[no-untyped-def]
        return super()._start(str(PEERS / script) if script == "worker.py" else script, folder, request, pipe)


def judged(text: str, name: str, chip: str, base: str) -> pipeline.Verdict:
    """A kernel's figures on the problem of `base`, which is the oracle's: a peer's package is not imported there."""
    candidate = contract.check_source(text.encode(), "kernel.py")
    sealed = contract.check_source(f"{base}\nNEEDS = {candidate.needs!r}\n".encode(), "problem.py")
    task = pipeline.Task(candidate=candidate, sealed=sealed, chip=load_chip(chip), mode="model")
    judging = pipeline.Judging if name == OURS else PeerJudging
    with pipeline.private_folder() as folder:
        return judging(task, folder, lambda text: None).run_to_cycles()


def cell(verdict: pipeline.Verdict) -> str:
    if verdict.total is None:
        return f"{verdict.status}: {verdict.reason.splitlines()[0][:60]}"
    figures = verdict.workloads["shape"]
    return f"{figures.latency_ms:9.4f} ms  MBU {figures.mbu_pct:5.1f} %  MFU {figures.mfu_pct:5.1f} %"


def row(shape: Shape, chip: str, names: list[str], folder: Path | None) -> float | None:
    """Judges the kernels on one shape, prints a line each; returns the ratio of the better peer's time to ours."""
    times: dict[str, float] = {}
    base = problem(shape)
    for name in names:
        text = f"{base}\nNEEDS = ()\n" if name == OURS else with_peer(base, name)
        if folder is not None:
            (folder / f"{shape.name} {name}.py".replace(" ", "_").replace("/", "-")).write_text(text)
        verdict = judged(text, name, chip, base)
        print(f"{chip:6} {shape.name:28} {name:8} {cell(verdict)}", flush=True)
        figures: Figures | None = verdict.workloads.get("shape")
        if figures is not None and figures.latency_ms is not None:
            times[name] = figures.latency_ms
    peers = [time for name, time in times.items() if name != OURS]
    return min(peers) / times[OURS] if peers and OURS in times else None


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
                print(f"{chip:6} {shape.name:28} ours is {ratio:.2f} times as fast as the better peer", flush=True)
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"{chip}: geometric mean {mean:.2f} over {len(ratios)} shapes, least {min(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
