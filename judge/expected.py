"""What the sealed file gives where it is the same for every candidate of a lineage, kept between experiments.

    .ratchet/expected/<key>/<set>.npz, key = SHA-256 of the sealed file, of what runs it and of the locked versions
    .ratchet/expected/<key>/inputs/    shapes, integer inputs, FLOPs and bytes of the workloads

Most of a check's time would go into computing again what the baseline's reference gave last time. An output that must
agree to the bit is kept as its hash, so that a KV cache takes no room: one with that hash agrees, and for any other the
reference runs again, to say where it differs. Inputs drawn anew for each judging are never kept. oracle.py writes into
its private folder; the judge moves the files here, under a key that only the same sealed file has, and only where that
file is the lineage's baseline: a dry run, whose file is its own oracle, leaves nothing.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = ".ratchet/expected"
INPUTS = "inputs"
SEALS = 2  # lineages whose outputs stay
_MEANING = "meaning"


def folder_of(root: Path, sealed_text: str) -> Path:
    """Where the outputs of a sealed file are kept."""
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256(sealed_text.encode())
    for path in (here / "oracle.py", here / "expected.py", here / "jax_shims.py", root / "requirements.lock"):
        digest.update(b"\0" + path.read_bytes())
    return root / FOLDER / digest.hexdigest()


def file_name(workload: str, label: str, seed: int, arguments: dict[str, Any]) -> str:
    """The file of one check set of one workload."""
    return hashlib.sha256(repr((workload, label, seed, arguments)).encode()).hexdigest()[:32] + ".npz"


def save(path: Path, tree: str, outputs: Sequence[np.ndarray], exact: Sequence[bool]) -> None:
    """Keeps outputs: as hashes where `exact`."""
    meaning = {
        "tree": tree,
        "outputs": [
            {"shape": list(o.shape), "dtype": str(o.dtype), "sha256": _sha256(o) if e else None}
            for o, e in zip(outputs, exact, strict=True)
        ],
    }
    kept = {str(i): flat_bytes(o) for i, (o, e) in enumerate(zip(outputs, exact, strict=True)) if not e}
    kept[_MEANING] = np.frombuffer(json.dumps(meaning).encode(), np.uint8)
    np.savez(path, **kept)  # type: ignore[arg-type]


def load(path: Path, got: Sequence[np.ndarray], tree: str) -> list[np.ndarray] | None:
    """The expected outputs; None where they are not kept, or where an output kept as a hash is not what `got` has."""
    try:
        with path.open("rb") as file, np.load(file) as kept:
            meaning = json.loads(kept[_MEANING].tobytes())
            data = {int(name): kept[name] for name in kept.files if name != _MEANING}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or torn
        return None
    if meaning["tree"] != tree or len(meaning["outputs"]) != len(got):
        return None
    expected = []
    for i, (output, mine) in enumerate(zip(meaning["outputs"], got, strict=True)):
        if output["sha256"] is None:
            expected.append(data[i].view(np.dtype(output["dtype"])).reshape(output["shape"]))
            continue
        same = [list(mine.shape), str(mine.dtype)] == [output["shape"], output["dtype"]]
        if not same or _sha256(mine) != output["sha256"]:
            return None
        expected.append(mine)
    return expected


def install(new: Path, folder: Path) -> None:
    """Moves what oracle.py wrote to `new` into `folder`."""
    with contextlib.suppress(FileNotFoundError):  # another judging, of another lineage, forgot this one meanwhile
        for path in sorted(new.glob("*.npz")):
            folder.mkdir(parents=True, exist_ok=True)
            taken = folder / f".{os.getpid()}-{path.name}"
            shutil.copyfile(path, taken)  # .ratchet may be another file system than the private folder
            os.replace(taken, folder / path.name)
    _forget_but_the_last(folder)


def keep_description(new: Path, folder: Path) -> None:
    """Copies what oracle.py said of the sealed file's inputs into `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=folder, prefix=".") as taken:
        copied = Path(taken) / INPUTS
        copied.mkdir()
        for path in (new / "result.json", *new.glob("*.npz")):
            shutil.copyfile(path, copied / path.name)
        shutil.rmtree(folder / INPUTS, ignore_errors=True)
        copied.rename(folder / INPUTS)  # fails where another judging was first
    _forget_but_the_last(folder)


def kept_description(folder: Path, new: Path) -> bool:
    """Whether `folder` has what oracle.py said of the sealed file's inputs, and `new` is a copy of it now."""
    with contextlib.suppress(OSError):
        shutil.copytree(folder / INPUTS, new, dirs_exist_ok=True)
        return True
    return False


def _forget_but_the_last(folder: Path) -> None:
    """Of what is kept, the lineages before the last two; `folder` is the last."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(folder)
        lineages = sorted((p for p in folder.parent.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
        for old in lineages[:-SEALS]:
            shutil.rmtree(old, ignore_errors=True)


def flat_bytes(output: np.ndarray) -> np.ndarray:
    """Its elements' bytes, in order."""
    flat: np.ndarray = np.ascontiguousarray(output).reshape(-1).view(np.uint8)
    return flat


def _sha256(output: np.ndarray) -> str:
    return hashlib.sha256(flat_bytes(output).data).hexdigest()
