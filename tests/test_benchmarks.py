import sys

import nibabel as nib
import numpy as np
import pytest

from lib.runs.params import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import volumes


def test_classes_and_the_foreground_that_holds_them_are_scored(tmp_path):
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[:2], truth[2] = 1, 2
    file = tmp_path / "case.nii.gz"
    nib.save(nib.Nifti1Image(truth, np.eye(4)), file)
    found = truth.copy()
    found[2] = 1  # the posterior part is taken for the anterior one
    scores = volumes.scores_of({"case": found}, {"case": file}).loc["case"]
    assert scores["anterior"] == pytest.approx(2 * 32 / (32 + 48)) and scores["posterior"] == 0
    assert scores["foreground"] == 1
    scores = volumes.scores_of({"case": found * (np.arange(4) > 0)[:, None, None]}, {"case": file}).loc["case"]
    assert scores["foreground"] == pytest.approx(2 * 32 / (32 + 48))
