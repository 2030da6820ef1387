"""judge/expected.py: what is kept of the sealed file's inputs and outputs, that it is used, and for no other file."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import add_to_kept

from judge import contract, expected, pipeline
from judge.chips import load_chip

TREE = "PyTreeDef((*, *))"


@pytest.fixture
def outputs():
    rng = np.random.default_rng(3)
    return [rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16), rng.normal(size=(7, 2)).astype(np.float32)]


@pytest.fixture
def kept(tmp_path, outputs):
    path = tmp_path / expected.file_name("w", "edges", 1, {"n": 3})
    expected.save(path, TREE, outputs, [False, True])
    return path


def test_comes_back_to_the_bit(kept, outputs):
    loaded = expected.load(kept, outputs, TREE)
    assert [o.dtype for o in loaded] == [o.dtype for o in outputs]
    assert all(np.array_equal(a, b) for a, b in zip(loaded, outputs, strict=True))


def test_an_inexact_output_may_differ(kept, outputs):
    loaded = expected.load(kept, [outputs[0] * 2, outputs[1]], TREE)
    assert np.array_equal(loaded[0], outputs[0])


def test_an_output_with_another_hash_needs_the_reference(kept, outputs):
    assert expected.load(kept, [outputs[0], outputs[1] + 1], TREE) is None


def test_an_output_of_another_shape_needs_the_reference(kept, outputs):
    assert expected.load(kept, [outputs[0], outputs[1].reshape(2, 7)], TREE) is None


@pytest.mark.parametrize("tree, count", [("PyTreeDef([*, *])", 2), (TREE, 1)])
def test_another_tree_needs_the_reference(kept, outputs, tree, count):
    assert expected.load(kept, outputs[:count], tree) is None


def test_torn_file_needs_the_reference(kept, outputs):
    kept.write_bytes(kept.read_bytes()[:-40])
    assert expected.load(kept, outputs, TREE) is None


def test_another_set_is_another_file():
    names = {expected.file_name(w, s, n, a) for w in "ab" for s in "cd" for n in (1, 2) for a in ({}, {"n": 1})}
    assert len(names) == 16


def test_lineages_before_the_last_two_are_forgotten(tmp_path, kept):
    for name in ("one", "two", "three"):
        expected.install(kept.parent, tmp_path / "all" / name)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["three", "two"]


def judged(folder, candidate, sealed, *, confirm=False, **options):
    folder.mkdir()
    task = pipeline.Task(candidate=candidate, sealed=sealed, chip=load_chip("v5e"), mode="model", **options)
    judging = pipeline.Judging(task, folder, lambda text: None)
    verdict = judging.run()
    if confirm:
        judging.confirm(verdict)
    return verdict


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """(sealed, candidate) in a project of their own."""
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    (tmp_path / "requirements.lock").write_text("")
    text = (Path(__file__).parent / "kernels" / "scaled_add.py").read_text() + 'CHECKS = {"fixed": {}}\n'
    sealed = contract.check_source(text.encode(), "kernel.py")
    return sealed, contract.check_source(text.encode() + b"# another file\n", "kernel.py")


def test_the_next_experiment_uses_what_the_last_one_kept(tmp_path, pair):
    sealed, candidate = pair
    folder = expected.folder_of(tmp_path, sealed.text)

    assert judged(tmp_path / "dry", sealed, sealed).status == "PASS"
    assert not folder.exists(), "a dry run's file is its own oracle"
    assert judged(tmp_path / "first", candidate, sealed).status == "PASS"
    assert list(folder.glob("*.npz"))
    add_to_kept(folder, 1)  # wrong now: that it is used shows in the verdict
    verdict = judged(tmp_path / "second", candidate, sealed)
    assert verdict.status == "FAIL_CORRECTNESS", verdict.reason
    assert judged(tmp_path / "again", candidate, sealed, anew=True).status == "PASS"  # and keeps what is right
    assert judged(tmp_path / "third", candidate, sealed, confirm=True).status == "PASS"
    add_to_kept(folder, 1e-5)  # within the tolerance
    with pytest.raises(pipeline.CannotJudge, match="check 'fixed': the reference's outputs: what is kept in"):
        judged(tmp_path / "fourth", candidate, sealed, confirm=True)


def test_the_next_experiment_knows_the_inputs_of_the_last_one(tmp_path, pair):
    sealed, candidate = pair

    def flops_per_second(folder, **options):
        verdict = judged(tmp_path / folder, candidate, sealed, **options)
        assert verdict.status == "PASS", verdict.reason
        return verdict.total.tflops

    first = flops_per_second("first")
    path = expected.folder_of(tmp_path, sealed.text) / expected.INPUTS / "result.json"
    said = path.read_text()
    path.write_text(said + "\n")
    assert flops_per_second("second") == first
    assert path.read_text() == said + "\n", "used, not made again"
    wrong = json.loads(said)
    for workload in wrong["workloads"].values():
        workload["flops"] /= 2
    path.write_text(json.dumps(wrong))
    with pytest.raises(pipeline.CannotJudge, match="is not what the sealed file gives"):
        flops_per_second("third")
    assert flops_per_second("again", anew=True) == first  # and keeps what is right
    for number, torn in enumerate(("{", "{}")):
        path.write_text(torn)
        assert flops_per_second(f"torn-{number}") == first
    assert flops_per_second("last") == first


def test_scalars_that_the_sealed_file_does_not_give(tmp_path, pair):
    """By them the schedule is timed: shorter lengths would make every kernel faster."""
    sealed, candidate = pair
    assert judged(tmp_path / "first", candidate, sealed).status == "PASS"
    (path,) = (expected.folder_of(tmp_path, sealed.text) / expected.INPUTS).glob("*.npz")
    with np.load(path) as file:
        data = {name: file[name] + 1 for name in file.files}
    assert data
    np.savez(path, **data)
    with pytest.raises(pipeline.CannotJudge, match="workload default: its lengths"):
        judged(tmp_path / "second", candidate, sealed)


def test_what_was_not_kept_is_not_compared(tmp_path, pair):
    """FLOPs that are no number equal nothing, not even what was said of them a moment ago."""
    text = pair[0].text.replace("return 2 * ROWS * COLUMNS", "return float('nan')")
    source = contract.check_source(text.encode(), "kernel.py")
    verdict = judged(tmp_path / "dry", source, source)
    assert (verdict.status, "roofline nan s" in verdict.reason) == ("FAIL_CRASH", True), verdict.reason


def test_inputs_that_are_forgotten_meanwhile_are_made_again(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "result.json").write_text("{}")
    folders = [tmp_path / "all" / name for name in "abcd"]
    for age, folder in enumerate(folders):
        expected.keep_description(tmp_path / "new", folder)
        os.utime(folder, (age, age))
    found = [expected.kept_description(folder, tmp_path / folder.name) for folder in folders]
    assert found == [False, False, True, True]
    assert (tmp_path / "d" / "result.json").read_text() == "{}"
    shutil.rmtree(tmp_path / "all")
    expected.install(tmp_path / "new", folders[0])  # nothing to install, nothing to forget
    assert not (tmp_path / "all").exists()


def test_another_sealed_file_has_another_folder(tmp_path):
    (tmp_path / "requirements.lock").write_text("")
    assert expected.folder_of(tmp_path, "a = 1\n") != expected.folder_of(tmp_path, "a = 2\n")
