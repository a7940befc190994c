"""runs.files: what other test files do not cover of it. Crashes while files are written: test_stops."""

import hashlib

import numpy as np
import pytest

from lib.runs.files import save_arrays

ARRAYS = {"steps": np.arange(3), "names": np.array(["a", "b"]), "masks": np.linspace(0, 1, 8, dtype="float32")}


def test_arrays_come_back_as_they_were_written(tmp_path):
    save_arrays(ARRAYS, tmp_path / "arrays.npz")
    with np.load(tmp_path / "arrays.npz") as archive:
        assert list(archive) == list(ARRAYS)
        for name, values in ARRAYS.items():
            assert archive[name].dtype == values.dtype and (archive[name] == values).all()


def test_arrays_give_the_same_bytes_with_every_version_of_python(tmp_path):
    """What git and DVC track must not change on another machine. Found out with Python 3.11.2 and 3.11.7."""
    save_arrays(ARRAYS, tmp_path / "arrays.npz")
    content = (tmp_path / "arrays.npz").read_bytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "0cb9ae3904d15c83"


def test_an_array_of_objects_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="Object arrays"):
        save_arrays({"objects": np.array([{}])}, tmp_path / "arrays.npz")
    assert not list(tmp_path.iterdir())
