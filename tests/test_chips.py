"""The hardware facts in judge/data/chips."""

import tomllib

import pytest

from judge import chips
from judge.chips import CHIPS, DEFAULT_CHIP, load_chip

CONFIDENCES = {"datasheet", "compiler", "measured", "inferred", "guess"}


def test_the_chips_that_the_project_knows():
    assert set(CHIPS) == {"v5e", "v5p", "v6e", "tpu7x"}
    assert DEFAULT_CHIP in CHIPS


@pytest.mark.parametrize("name", CHIPS)
def test_every_file_loads(name):
    chip = load_chip(name)
    assert chip.name == name
    assert chip.topology.startswith(name)
    assert chip.device_kind.startswith("TPU")
    assert chip.tensor_cores in (1, 2)
    assert set(chip.peak_flops_per_second) <= {"bf16", "int8", "fp8"}
    assert 1e14 < chip.peak_flops_per_second["bf16"] < 1e16
    assert all(peak >= chip.peak_flops_per_second["bf16"] for peak in chip.peak_flops_per_second.values())
    assert 1e11 < chip.hbm_bytes_per_second < 1e13
    assert 2**33 < chip.hbm_bytes < 2**38
    assert 2**23 < chip.vmem_bytes_per_core < 2**28


@pytest.mark.parametrize("name", CHIPS)
def test_every_number_has_a_source_and_a_confidence(name):
    data = tomllib.loads((chips.DATA / f"{name}.toml").read_text())
    facts = [*data["peak_flops_per_second"].values(), *(v for v in data.values() if "value" in str(v) and "value" in v)]
    facts += [data[key] for key in ("hbm_bytes_per_second", "hbm_bytes", "vmem_bytes_per_core")]
    assert len(facts) >= 4
    for fact in facts:
        assert set(fact) == {"value", "confidence", "source"}
        assert fact["confidence"] in CONFIDENCES
        assert len(fact["source"]) > 10
        assert fact["value"] > 0


def test_datasheet_figures_that_people_quote():
    assert load_chip("v5e").peak_flops_per_second["bf16"] == 197e12
    assert load_chip("v5e").hbm_bytes == 16 * 2**30
    assert load_chip("v6e").peak_flops_per_second["bf16"] == 918e12
    assert load_chip("v5p").peak_flops_per_second["bf16"] == 459e12


def test_an_unknown_chip_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown chip 'v9'; known: tpu7x, v5e, v5p, v6e"):
        load_chip("v9")
    with pytest.raises(ValueError, match="unknown chip"):
        load_chip("../llo/v5e")
