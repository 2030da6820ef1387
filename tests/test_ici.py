"""Collectives in closed form: against the sums that a ring's links carry."""

import pytest

from judge.llo.ici import Interconnect, collective_seconds, group_size

ICI = Interconnect(link_bytes_per_second=100.0, hop_seconds=0.5)


def test_all_gather_on_a_ring_of_four() -> None:
    # each chip receives the other three quarters of 800 bytes, half of them from either side; two hops at most
    assert collective_seconds("all-gather", 800, 4, ICI) == pytest.approx(600 / 2 / 100 + 2 * 0.5)


def test_all_reduce_is_a_reduce_scatter_and_an_all_gather() -> None:
    halves = sum(collective_seconds(kind, 800, 4, ICI) for kind in ("reduce-scatter", "all-gather"))
    assert collective_seconds("all-reduce", 800, 4, ICI) == pytest.approx(halves)


def test_all_to_all_sends_a_quarter_of_the_ring_on_average() -> None:
    # 100 bytes to each of 8: byte-hops a chip 100 × (1 + 1 + 2 + 2 + 3 + 3 + 4), over two links; in closed form n²/4
    assert collective_seconds("all-to-all", 800, 8, ICI) == pytest.approx(100 * 16 / 2 / 100 + 4 * 0.5)


def test_a_permute_is_one_hop_and_one_chip_is_free() -> None:
    assert collective_seconds("collective-permute", 800, 8, ICI) == pytest.approx(8 + 0.5)
    assert collective_seconds("all-reduce", 800, 1, ICI) == 0


def test_an_unknown_collective_has_no_time() -> None:
    with pytest.raises(ValueError, match="no model of broadcast over 4 chips"):
        collective_seconds("broadcast", 800, 4, ICI)


@pytest.mark.parametrize(
    ("text", "chips"),
    [
        ("all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum", 4),
        ("all-gather(%x), replica_groups=[2,8]<=[16], dimensions={0}", 8),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,0}}", 3),
    ],
)
def test_group_size(text: str, chips: int) -> None:
    assert group_size(text) == chips


def test_an_op_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="which chips"):
        group_size("all-reduce(%x)")
