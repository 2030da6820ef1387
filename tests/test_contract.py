"""judge/contract.py: the seven symbols, and what counts as a change of the problem."""

from pathlib import Path

import pytest

from judge import contract

ROOT = Path(__file__).resolve().parent.parent


def source(text: str) -> contract.Source:
    return contract.check_source(text.encode(), "kernel.py")


def test_tiny_kernel_defines_the_seven_symbols_alone(variant):
    names = set(source(variant()).definitions)
    assert set(contract.REQUIRED) <= names
    assert not names & {"WORKLOADS", "CHECKS", "TOLERANCE", "TUNABLES", "compute_bytes"}


def test_own_kernel_follows_the_contract():
    contract.read_source(ROOT / "kernel.py")


@pytest.mark.parametrize("symbol", contract.REQUIRED)
def test_missing_symbol_is_named(variant, symbol):
    old = f"\n{symbol} = " if symbol.isupper() else f"\ndef {symbol}("
    text = variant((old, old.replace(symbol, f"other_{symbol.lower()}")))
    with pytest.raises(contract.ContractError, match=f"^kernel.py: missing {symbol};"):
        source(text)


@pytest.mark.parametrize(
    "text",
    [
        "def f(:\n",
        "x = '\0'\n",
        "(" * 300,
        "x = " + "-" * 100_000 + "1\n",
        "x = " + "1 + " * 50_000 + "1\n",
        "x = " + "a." * 20_000 + "b\n",
    ],
    ids=["syntax", "null", "parentheses", "signs", "sum", "attributes"],
)
def test_odd_source_is_a_contract_error(text):
    with pytest.raises(contract.ContractError, match=r"^kernel.py"):
        source(text)


def test_source_that_is_too_large():
    with pytest.raises(contract.ContractError, match="too large"):
        contract.check_source(b"#" * (contract.MAX_SOURCE_BYTES + 1), "kernel.py")


SAME = [
    (("def reference_fn(a, x, y):\n", "def reference_fn(a, x, y):\n    # said differently\n"),),
    (("    return a[0] * x + y\n", "    return (a[0]  *  x) + y\n"),),
    (("BLOCK = 32 ", "BLOCK = 64 "), ("def body(", "def body2("), ("        body,\n", "        body2,\n")),
]


@pytest.mark.parametrize("edits", SAME, ids=["comment", "layout", "kernel"])
def test_change_that_is_none(variant, edits):
    assert contract.changed_symbols(source(variant(*edits)), source(variant())) == []


CHANGES = [
    ("reference_fn", ("return a[0] * x + y", "return a[0] * x")),
    ("generate_inputs", ("2, 9, jnp.int32", "2, 3, jnp.int32")),
    ("compute_flops", ("return 2 * ROWS", "return 4 * ROWS")),
    ("WORKLOADS", ("def get_tiling", "WORKLOADS = {'one': {}}\n\n\ndef get_tiling")),
    ("CHECKS", ("def get_tiling", "CHECKS = {'one': {}}\n\n\ndef get_tiling")),
    ("TOLERANCE", ("def get_tiling", "TOLERANCE = 1e9\n\n\ndef get_tiling")),
    ("compute_bytes", ("def get_tiling", "def compute_bytes():\n    return 1\n\n\ndef get_tiling")),
    ("compute_flops", ("def get_tiling", "compute_flops = lambda: 1e15\n\n\ndef get_tiling")),
    ("reference_fn", ("def get_tiling", "from jax import jit as reference_fn\n\n\ndef get_tiling")),
    ("reference_fn", ("def get_tiling", "if True:\n    reference_fn = kernel_fn\n\n\ndef get_tiling")),
    ("TOLERANCE", ("def get_tiling", "for TOLERANCE in (1,):\n    pass\n\n\ndef get_tiling")),
]


@pytest.mark.parametrize(("symbol", "edit"), CHANGES)
def test_change_of_the_problem_is_named(variant, symbol, edit):
    changed, sealed = source(variant(edit)), source(variant())
    assert contract.changed_symbols(changed, sealed) == [symbol]
    with pytest.raises(
        contract.ContractError, match=f"^kernel.py changes {symbol}, which the lineage's baseline seals"
    ):
        contract.check_seal(changed, sealed)


def test_removed_definition_is_a_change(variant):
    sealed = source(variant(("def get_tiling", "TOLERANCE = 0\n\n\ndef get_tiling")))
    assert contract.changed_symbols(source(variant()), sealed) == ["TOLERANCE"]
