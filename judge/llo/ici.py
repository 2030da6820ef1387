"""Time of a collective over the chips' interconnect (ICI), in closed form; there is no schedule of it to execute.

n chips on a ring (one axis of the torus) with b bytes per second a link and direction, both directions used, h seconds
a hop. S: bytes of the larger side of the operation on one chip.

    all-gather, reduce-scatter   S (n − 1) / n / 2b + h (n / 2)
    all-reduce                   twice that: a reduce-scatter, then an all-gather
    all-to-all                   S n / 8b + h (n / 2): a share of S / n to each, n / 4 hops away on average
    collective-permute           S / b + h: one neighbour

Two rings of a 2-D group are not used at once, so that groups over several axes come out too slow, never too fast by
more than the ring's own idealisation. Not covered: contention between collectives, links shared with DMAs of kernels.
Source: the scaling book (jax-ml.github.io/scaling-book/sharding), which derives the same bounds.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """One chip's links: per link and direction, and per hop."""

    link_bytes_per_second: float
    hop_seconds: float


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collective_seconds(kind: str, size_bytes: int, chips: int, ici: Interconnect) -> float:
    """Seconds that `kind` of COLLECTIVES takes. Raises ValueError for another kind, or fewer than one chip."""
    if kind not in COLLECTIVES or chips < 1:
        raise ValueError(f"no model of {kind} over {chips} chips")
    if chips == 1:
        return 0.0
    link, hops = ici.link_bytes_per_second, ici.hop_seconds * (chips // 2)
    if kind == "collective-permute":
        return size_bytes / link + ici.hop_seconds
    if kind == "all-to-all":
        return size_bytes * chips / 8 / link + hops
    once = size_bytes * (chips - 1) / chips / 2 / link + hops
    return 2 * once if kind == "all-reduce" else once


def group_size(text: str) -> int:
    """Chips of one group, from an HLO instruction's replica_groups or source_target_pairs. Raises ValueError."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text)
    if counted:
        return int(counted[2])
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return len(re.findall(r"\{\d+,\d+", pairs[1]))
    raise ValueError("it does not say which chips take part")
