"""The schedule costs in judge/data/llo."""

import math
import tomllib

import pytest

from judge.chips import CHIPS, load_chip
from judge.llo import machine
from judge.llo.machine import RULES, load_machine

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
    grouped = [data.pop("latency"), data.pop("cadence"), *data.pop("dma").values()]
    facts = [fact for table in grouped for fact in table.values()] + list(data.values())
    assert len(grouped) == 4 and len(data) == 9
    dma_keys = {"latency_cycles", "bytes_per_cycle", "run_cycles"}
    for fact in facts:
        assert fact["confidence"] in CONFIDENCES
        assert len(fact["source"]) > 10
        assert "value" in fact or {"latency_cycles", "bytes_per_cycle"} <= set(fact)
        assert (
            set(fact) <= {"value", "calibrated", "path", "confidence", "source"} | dma_keys
        )  # nothing that nobody reads


@pytest.mark.parametrize("chip", CHIPS)
def test_a_calibrated_figure_is_not_passed_off_as_the_compilers(chip):
    data = tomllib.loads((machine.DATA / f"{chip}.toml").read_text())
    for table in (data["latency"], data["cadence"], data["dma"]["calibrated"]):
        for fact in table.values():
            if "calibrated" in fact or "run_cycles" in fact:
                assert fact["confidence"] in ("measured", "inferred", "guess")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_figure_that_issue_asks_for_is_there(chip, rule):
    """Whole cycles, at least one; a table that lacks one would fail in the middle of an execution."""
    costs = load_machine(chip, rule)
    dtypes = ("bf16", "f32", "int8", "fp8", "int4")
    pushes = {f"push_{kind}{dtype}" for kind in ("", "xpose_") for dtype in dtypes}
    matmuls = {f"matmul_{dtype}" for dtype in dtypes}
    kinds = ("reduce", "index_reduce", "permute", "transpose", "pattern")
    variants = (*kinds, "transpose_b16", "transpose_binary")
    scalars = {"salu", "smul", "sld", "sdivrem", "predicate", "predicate_logic", "flag_read"}
    vectors = {"load", "valu", "mask", "move", "pop", "vpush", "latch", "eup", "rotate"}
    assert scalars | vectors | set(variants) | matmuls | pushes <= costs.latencies.keys()
    assert matmuls | pushes | {f"mxu_pop_{dtype}" for dtype in dtypes} <= costs.cadences.keys()
    assert {f"{first}_to_{second}" for first in variants for second in kinds} <= costs.cadences.keys()
    assert "transpose_pop" in costs.cadences
    for cycles in (*costs.latencies.values(), *costs.cadences.values()):
        assert isinstance(cycles, int) and cycles >= 1


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
    (tmp_path / "v5e.toml").write_text(text.replace("[wait_cycles]", "[waiting]"))
    monkeypatch.setattr(machine, "DATA", tmp_path)
    with pytest.raises(KeyError, match="wait_cycles"):
        load_machine("v5e")
    with pytest.raises(FileNotFoundError):
        load_machine("v6e")


@pytest.mark.parametrize(
    ("old", "missing"),
    [
        ("[dma.compiler.", "compiler"),
        ("[wait_cycles]", "wait_cycles"),
        ("[cadence]", "cadence"),
        ("pushes_pairs", "pushes_pairs"),
    ],
)
def test_a_missing_table_is_named(tmp_path, monkeypatch, old, missing):
    text = (machine.DATA / "v5e.toml").read_text()
    assert old in text
    (tmp_path / "v5e.toml").write_text(text.replace(old, old.replace(missing, "gone")))
    monkeypatch.setattr(machine, "DATA", tmp_path)
    with pytest.raises(KeyError, match=missing):
        load_machine("v5e", "compiler")


def test_a_rule_that_does_not_exist_is_an_error():
    with pytest.raises(KeyError, match="guessed"):
        load_machine("v5e", "guessed")


def test_a_latency_or_cadence_that_is_not_known_is_an_error():
    for figure in (load_machine("v5e").latency, load_machine("v5e").cadence):
        with pytest.raises(KeyError, match="frobnicate"):
            figure("frobnicate")
