"""judge/oracle.py: the comparison, and what it asks of a sealed file. Processes are tested with the pipeline."""

import types

import ml_dtypes
import numpy as np
import pytest

from judge import oracle
from judge.oracle import (
    DEFAULT_TOLERANCE,
    SECRET,
    TIMED_SEED,
    Mismatch,
    SealError,
    check_sets,
    compare,
    inputs_of,
    limits,
    strict_set,
    timed_inputs,
    workloads_of,
)

BF16 = ml_dtypes.bfloat16


def differs(got, want, tolerance=None, lowest="float32") -> str:
    """The message of the Mismatch that must follow."""
    with pytest.raises(Mismatch) as error:
        compare(np.asarray(got), np.asarray(want), tolerance, lowest, "here")
    assert str(error.value).startswith("here: ")
    return str(error.value)


def agrees(got, want, tolerance=None, lowest="float32") -> None:
    compare(np.asarray(got), np.asarray(want), tolerance, lowest, "here")


# --- shape and dtype ---


@pytest.mark.parametrize(
    "got", [np.zeros((2, 3), np.float32), np.zeros((3, 2), BF16), np.zeros(6, np.float32), np.float32(0)]
)
def test_shape_and_dtype_must_be_the_oracles(got):
    message = differs(got, np.zeros((3, 2), np.float32))
    assert "reference_fn float32[3, 2]" in message and str(got.dtype) in message


# --- exactness ---


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
@pytest.mark.parametrize("tolerance", [None, 0, 1.0, {"rtol": 1.0, "atol": 100.0}])
def test_integers_are_exact_whatever_the_tolerance(dtype, tolerance):
    want = np.array([[0, 1], [1, 0]], dtype)
    got = want.copy()
    agrees(got, want, tolerance)
    got[1, 0] = 0
    message = differs(got, want, tolerance)
    assert "to the bit in 1 of 4 elements (25 %); worst at [1, 0]" in message


def test_tolerance_zero_is_exact_for_floats():
    want = np.array([1.0, 2.0], np.float32)
    agrees(want.copy(), want, 0)
    assert "worst at [1]" in differs([np.float32(1), np.nextafter(np.float32(2), np.float32(3))], want, 0)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_tolerance_zero_lets_nan_stand_where_the_oracle_has_nan(dtype):
    want = np.array([1, np.nan, 3], dtype)
    other = want.copy()
    other.view(f"u{other.dtype.itemsize}")[1] |= 1  # another NaN
    agrees(other, want, 0)
    assert "worst at [1]: got 5" in differs(np.array([1, 5, 3], dtype), want, 0)
    assert "worst at [2]: got nan" in differs(np.array([1, np.nan, np.nan], dtype), want, 0)


def test_the_sign_of_zero_counts_to_the_bit_and_nowhere_else():
    assert "must equal the oracle to the bit" in differs(np.float32([-0.0]), np.float32([0.0]), 0)
    agrees(np.float32([-0.0]), np.float32([0.0]), 1e-6)


# --- values that are not finite ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tolerance", [None, 1e9, {"rtol": 1e9, "atol": 1e9}])
def test_not_finite_where_the_oracle_is(bad, tolerance):
    message = differs(np.float32([1, bad, 3]), np.float32([1, 2, 3]), tolerance)
    assert "not finite where the oracle is in 1 of 3" in message
    assert f"worst at [1]: got {bad}" in message


@pytest.mark.parametrize(("want", "got"), [(np.inf, -np.inf), (np.inf, 3.0), (np.nan, 3.0), (np.nan, np.inf)])
def test_what_differs_where_the_oracle_is_not_finite(want, got):
    message = differs(np.float32([got, 2]), np.float32([want, 2]), 1e9)
    assert "differs where the oracle is not finite" in message and "worst at [0]" in message


def test_the_same_where_the_oracle_is_not_finite():
    agrees(np.float32([np.inf, -np.inf, np.nan, 1.0001]), np.float32([np.inf, -np.inf, np.nan, 1]), 1e-3)


def test_all_nan_is_never_an_answer():
    assert "not finite" in differs(np.full(8, np.nan, np.float32), np.ones(8, np.float32), 1e9)


# --- tolerances ---


def test_the_worst_element_is_named():
    want = np.zeros((4, 5), np.float32) + 100
    got = want.copy()
    got[0, 0], got[2, 3], got[3, 4] = 101, 90, 95
    message = differs(got, want, {"atol": 0.5})
    assert "in 3 of 20 elements (15 %); worst at [2, 3]: got 90.0, expected 100.0" in message


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [
        ({"rtol": 0.1}, (0.1, 0)),
        ({"atol": 0.1}, (0, 0.1)),
        ({"rtol": 0.1, "atol": 0.2}, (0.1, 0.2)),
        ({}, (0, 0)),
        (0.3, (0.3, 0.3)),
        (1, (1.0, 1.0)),
    ],
)
def test_forms_of_a_declared_tolerance(tolerance, expected):
    assert limits(tolerance, np.float32([1, 2]), "bfloat16") == expected


def test_a_declared_tolerance_is_a_limit_to_both_sides():
    want = np.float32([100])
    for inside in (100.0, 110.9, 89.1):
        agrees(np.float32([inside]), want, {"rtol": 0.1, "atol": 1})
    for outside in (111.1, 88.9):
        assert "off by more than 1 + 0.1" in differs(np.float32([outside]), want, {"rtol": 0.1, "atol": 1})


@pytest.mark.parametrize(
    ("lowest", "dtype", "expected"),
    [
        ("float32", np.float32, 1e-3),
        ("bfloat16", np.float32, 2e-2),
        ("float32", BF16, 2e-2),
        ("float16", np.float32, 5e-3),
        ("float64", np.float64, 1e-6),
        ("float32", ml_dtypes.float8_e4m3fn, 1e-1),
    ],
)
def test_the_default_goes_by_the_lowest_precision(lowest, dtype, expected):
    rtol, atol = limits(None, np.full(4, 2.0).astype(dtype), lowest)
    assert rtol == expected and atol == pytest.approx(2.0 * expected)
    assert expected in DEFAULT_TOLERANCE.values()


def test_the_default_scales_with_the_output():
    """Relative to the RMS: a small output is not correct because it is small."""
    want = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e-6
    assert "off by more than" in differs(np.zeros_like(want), want)
    agrees(want * np.float32(1.0005), want)


@pytest.mark.parametrize("want", [np.zeros(3, np.float32), np.full(3, np.inf, np.float32)])
def test_no_scale_means_no_slack(want):
    assert limits(None, want, "float32") == (1e-3, 0.0)
    agrees(want.copy(), want)
    differs(want + np.float32(1e-6) if np.isfinite(want).all() else -want, want)


def test_an_empty_output_agrees():
    agrees(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))


def test_doubles_are_compared_as_doubles():
    assert "worst at [0]" in differs([1e300], [2e300], 1e-3)
    assert "off by more" in differs([1.0 + 1e-9], [1.0], {"atol": 1e-10})


def test_both_parts_of_a_complex_output_count():
    want = np.array([1 + 1j, 2 + 2j], np.complex64)
    agrees(want * np.float32(1.0005), want)
    assert "worst at [1]" in differs(np.array([1 + 1j, 2 + 3j], np.complex64), want)


# --- the sealed file ---


def sealed(**symbols):
    return types.SimpleNamespace(**symbols)


def test_a_file_without_workloads_has_one():
    assert workloads_of(sealed()) == {"default": {}}
    assert workloads_of(sealed(WORKLOADS={"a-1": {"n": 2}, "b_2": {}})) == {"a-1": {"n": 2}, "b_2": {}}


@pytest.mark.parametrize("workloads", [{}, [], {"../x": {}}, {"": {}}, {3: {}}, {"a": [1]}, {"a b": {}}])
def test_workloads_that_are_none(workloads):
    with pytest.raises(SealError, match="WORKLOADS"):
        workloads_of(sealed(WORKLOADS=workloads))


def test_check_sets_change_the_workload_and_have_seeds_of_their_own():
    sets = check_sets(sealed(CHECKS={"edges": {"batch": "edges"}, "long": {}}), {"batch": "decode", "n": 4}, 77)
    assert sets["edges"][1] == {"batch": "edges", "n": 4} and sets["long"][1] == {"batch": "decode", "n": 4}
    assert len({sets[name][0] for name in sets}) == len(sets)
    assert sets[SECRET] == (77, {"batch": "edges", "n": 4})
    assert check_sets(sealed(), {"n": 4}, 77) == {SECRET: (77, {"n": 4}), "timed inputs": (TIMED_SEED, {"n": 4})}


def test_what_is_none_in_a_check_is_drawn_anew():
    file = sealed(CHECKS={"edges": {}, "holdout": {"draw": None, "short": True}})
    one, other = (check_sets(file, {"n": 4}, secret) for secret in (1, 2))
    assert SECRET not in one
    assert one["holdout"] == (1, {"n": 4, "draw": 1, "short": True}) and other["holdout"][1]["draw"] == 2
    assert one["edges"] == other["edges"]


def test_the_inputs_whose_time_counts_are_checked_last():
    sets = check_sets(sealed(CHECKS={"edges": {"batch": "edges"}}), {"batch": "decode"}, 1)
    assert list(sets.items())[-1] == ("timed inputs", (TIMED_SEED, {"batch": "decode"}))


def test_races_are_looked_for_on_the_set_of_that_name():
    assert strict_set(sealed(CHECKS={"edges": {}, "races": {"n": 1}}), {}, 1)[0] == "races"
    assert strict_set(sealed(CHECKS={"edges": {}, "long": {"n": 1}}), {}, 1)[0] == "edges"
    assert strict_set(sealed(), {}, 1) == (SECRET, (1, {}))


@pytest.mark.parametrize("made", [None, np.zeros(3), [], (), ([np.zeros(1), np.zeros(2)],), ({"a": 1},)])
def test_inputs_must_be_a_tuple_of_arrays(made):
    with pytest.raises((SealError, ValueError)):
        inputs_of(sealed(generate_inputs=lambda key: made), 0, {})


def test_inputs_follow_from_the_seed():
    import jax

    file = sealed(generate_inputs=lambda key, n: (jax.random.normal(key, (n,)), jax.numpy.arange(n)))
    first, again, other = (inputs_of(file, seed, {"n": 4}) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0]) and not np.array_equal(first[0], other[0])
    assert first[1].dtype == np.int32


def test_the_timed_scalars_are_checked_with_secret_data():
    import jax

    def made(key, n):
        data = jax.random.normal(key, (n,))
        lengths = jax.random.randint(key, (n,), 0, 1 << 30)
        return data, lengths, lengths.astype(jax.numpy.int8), jax.numpy.log(data)  # of which some are NaN

    file = sealed(generate_inputs=made)
    timed, drawn = (inputs_of(file, seed, {"n": 64}) for seed in (TIMED_SEED, 7))
    checked = timed_inputs(file, {"n": 64}, timed, 7)
    for array, of in zip(checked, (drawn[0], timed[1], drawn[2], timed[3]), strict=True):
        assert np.array_equal(array, of, equal_nan=array.dtype.kind == "f")


def test_what_was_wrong_first_is_said_first():
    """Comparisons run beside the programs: a program that fails later must not hide what one found before."""

    def wrong():
        raise oracle.Mismatch("the first set")

    with pytest.raises(oracle.Mismatch, match="the first set"), oracle._Beside() as beside:
        beside.submit(wrong)
        raise oracle.ProgramError("the second set")
