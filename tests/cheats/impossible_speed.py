"""Faster than physics, or moving less than what has to be moved: caught with both numbers."""

from tests.cheats import Case

CASES = [
    Case(
        name="more FLOPs than the chip does",
        own_baseline=True,
        edits=(("return int(2 * 2 * HEAD_DIM", "return int(10**9 * 2 * HEAD_DIM"),),
        status="FAIL_ROOFLINE",
        reason="faster than physics allows",
    ),
    Case(
        name="more bytes than it moves",
        own_baseline=True,
        edits=(
            (
                "return int(2 * query_bytes + (2 * q_lens.sum() + cached_tokens) * token_bytes)",
                "return int(1_500_000 + 2 * query_bytes)",
            ),
        ),
        status="FAIL_ROOFLINE",
        reason="but its inputs and outputs need at least",
    ),
]
