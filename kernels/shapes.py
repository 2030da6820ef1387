"""kernel.py's problem on other shapes: its own text with other constants, lengths and workloads."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNEL = Path(__file__).resolve().parent.parent / "kernel.py"


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
    kv_dtype: str = "bfloat16"  # of the cache
    sliding_window: int | None = None  # tokens that a query sees at most

    @property
    def num_tokens(self) -> int:
        return {"decode": self.num_seqs, "prefill": self.context, "mixed": 2048 + self.num_seqs}[self.batch]


# gpt-oss's heads; of pages, those for which the production kernel has tuned sizes.
HEADS_64: dict[str, Any] = {"num_q_heads": 64, "num_kv_heads": 8, "head_dim": 64}

SHAPES = (
    Shape(name="llama-8b decode 1k", batch="decode", context=1024, num_seqs=128),
    Shape(name="llama-8b decode 8k", batch="decode", context=8192, num_seqs=32),
    Shape(name="llama-8b decode 8k page 16", batch="decode", context=8192, num_seqs=32, page_size=16),
    Shape(name="llama-8b decode 8k page 128", batch="decode", context=8192, num_seqs=32, page_size=128),
    Shape(name="llama-8b decode 8k float8", batch="decode", context=8192, num_seqs=32, kv_dtype="float8_e4m3fn"),
    Shape(name="llama-8b decode 8k window 1k", batch="decode", context=8192, num_seqs=32, sliding_window=1024),
    Shape(name="llama-8b decode 32k", batch="decode", context=32768, num_seqs=8, page_size=128),
    Shape(name="llama-8b prefill 2k", batch="prefill", context=2048, num_seqs=1),
    Shape(name="llama-8b prefill 2k float8", batch="prefill", context=2048, num_seqs=1, kv_dtype="float8_e4m3fn"),
    Shape(name="llama-8b prefill 8k", batch="prefill", context=8192, num_seqs=1),
    Shape(name="llama-8b mixed", batch="mixed", context=8192, num_seqs=24),
    Shape(name="llama-70b decode 8k", batch="decode", context=8192, num_seqs=32, num_q_heads=64),
    Shape(name="llama-70b prefill 8k", batch="prefill", context=8192, num_seqs=1, num_q_heads=64),
    Shape(name="40/8 decode 8k", batch="decode", context=8192, num_seqs=32, num_q_heads=40),
    Shape(name="40/8 prefill 8k", batch="prefill", context=8192, num_seqs=1, num_q_heads=40),
    Shape(name="d 64 decode 8k", batch="decode", context=8192, num_seqs=32, page_size=128, **HEADS_64),
    Shape(name="d 64 prefill 8k", batch="prefill", context=8192, num_seqs=1, page_size=128, **HEADS_64),
    Shape(
        name="d 256 decode 8k", batch="decode", context=8192, num_seqs=32, num_q_heads=16, num_kv_heads=4, head_dim=256
    ),
    Shape(
        name="d 256 prefill 8k", batch="prefill", context=8192, num_seqs=1, num_q_heads=16, num_kv_heads=4, head_dim=256
    ),
)

# In the place of kernel.py's own: one prefill of the whole context, decodes of ragged lengths, or both. What the check
# sets ask for stays.
LENGTHS = """

_lengths_of_checks = _lengths


def _lengths(*, batch, num_tokens, num_seqs, **others):
    if batch not in ("decode", "prefill", "mixed"):
        return _lengths_of_checks(batch=batch, num_tokens=num_tokens, num_seqs=num_seqs, **others)
    if batch == "prefill":
        return np.array([num_tokens]), np.array([num_tokens]), 0
    rng = np.random.default_rng(5)
    kv_lens = rng.integers(MAX_CONTEXT // 2, MAX_CONTEXT, num_seqs, endpoint=True)
    q_lens = np.ones(num_seqs, np.int64)
    if batch == "mixed":
        q_lens[-2:] = [1500, 548]
        return q_lens, kv_lens, num_seqs - 2
    return q_lens, kv_lens, num_seqs
"""


def problem(shape: Shape, *others: Shape) -> str:
    """kernel.py on this shape; on others too, which differ from it in their batch and its sequences alone."""
    text = KERNEL.read_text()
    pages = -(-shape.context // shape.page_size)
    workloads = {
        one.batch: {
            "batch": one.batch,
            "num_tokens": one.num_tokens,
            "num_seqs": one.num_seqs,
            "num_pages": pages * one.num_seqs,
            "page_size": one.page_size,
        }
        for one in (shape, *others)
    }
    number, dtype = r"\d+", r"jnp\.\w+"
    constants = {
        "NUM_Q_HEADS": (number, str(shape.num_q_heads)),
        "NUM_KV_HEADS": (number, str(shape.num_kv_heads)),
        "HEAD_DIM": (number, str(shape.head_dim)),
        "MAX_CONTEXT": (number, str(shape.context)),
        "KV_DTYPE": (dtype, f"jnp.{shape.kv_dtype}"),
        "SLIDING_WINDOW": ("None", str(shape.sliding_window)),
    }
    for name, (old, new) in constants.items():
        text, count = re.subn(rf"^{name} = {old}", f"{name} = {new}", text, flags=re.M)
        assert count == 1, f"kernel.py has no constant {name}"
    text, count = re.subn(r"^WORKLOADS = \{.*?^\}\n", f"WORKLOADS = {workloads}\n", text, flags=re.M | re.S)
    assert count == 1, "kernel.py has no WORKLOADS"
    # Padding of the metadata as engines leave it; ours is judged on garbage elsewhere.
    text = text.replace("rng.integers(2**20, 2**30, ", "rng.integers(0, 1, ")
    return text + LENGTHS
