"""The schedule costs in judge/data/llo."""

import math
import tomllib

import pytest

from judge.chips import CHIPS, load_chip
from judge.llo import machine
from judge.llo.machine import load_machine

CONFIDENCES = {"datasheet", "compiler", "measured", "inferred", "guess"}
DMA_KINDS = {"hbm_to_vmem", "vmem_to_hbm", "hbm_to_smem", "vmem_to_smem", "hbm_to_hbm"}


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_has_costs(chip):
    costs = load_machine(chip)
    assert costs.chip == chip
    assert 5e8 < costs.clock_hz < 5e9
    assert costs.granule_bytes == 32
    assert costs.hbm_pointer_bytes % costs.granule_bytes == 0
    assert costs.branch_delay_bundles >= 4
    assert set(costs.dma) == DMA_KINDS
    for cost in costs.dma.values():
        assert 100 < cost.latency_cycles < 10_000 and cost.bytes_per_cycle > 0


@pytest.mark.parametrize("chip", CHIPS)
def test_every_number_has_a_source_and_a_confidence(chip):
    data = tomllib.loads((machine.DATA / f"{chip}.toml").read_text())
    grouped = [data.pop("wait_cycles"), data.pop("latency"), data.pop("cadence"), *data.pop("dma").values()]
    facts = [fact for table in grouped for fact in table.values()] + list(data.values())
    assert len(grouped) == 5 and len(data) == 8
    for fact in facts:
        assert fact["confidence"] in CONFIDENCES
        assert len(fact["source"]) > 10
        assert "value" in fact or {"latency_cycles", "bytes_per_cycle"} <= set(fact)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_shared_path_is_near_the_chips_bandwidth(chip):
    """Bytes a cycle × clock is no more than a few percent above the datasheet, and not far below."""
    costs = load_machine(chip)
    for kind in ("hbm_to_vmem", "vmem_to_hbm"):
        rate = costs.dma[kind].bytes_per_cycle * costs.clock_hz
        assert 0.7 < rate / load_chip(chip).hbm_bytes_per_second < 1.05
    assert math.isfinite(costs.wait_cycles) and costs.wait_cycles >= 1


@pytest.mark.parametrize("chip", CHIPS)
def test_the_two_rules_are_kept_apart(chip):
    calibrated, compiler = load_machine(chip), load_machine(chip, "compiler")
    assert (calibrated.rule, compiler.rule) == ("calibrated", "compiler")
    assert all(cost.run_cycles == 0 for cost in compiler.dma.values())
    assert calibrated.dma["hbm_to_vmem"].run_cycles > 0
    assert compiler.latency("predicate_logic") == 2 > calibrated.latency("predicate_logic")
    assert compiler.latencies.keys() == calibrated.latencies.keys()


def test_a_unit_may_have_a_latency_of_its_own():
    machine = load_machine("v5e")
    assert machine.latency("permute", "xlu2") == machine.latencies["permute_xlu2"]
    assert machine.latency("permute", "xlu0") == machine.latencies["permute"]


def test_a_missing_number_or_file_is_an_error(tmp_path, monkeypatch):
    text = (machine.DATA / "v5e.toml").read_text()
    (tmp_path / "v5e.toml").write_text(text.replace("[wait_cycles.", "[waiting."))
    monkeypatch.setattr(machine, "DATA", tmp_path)
    with pytest.raises(KeyError, match="wait_cycles"):
        load_machine("v5e")
    with pytest.raises(FileNotFoundError):
        load_machine("v6e")
