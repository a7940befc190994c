"""What is taken from a folder: which slices, which subjects together, and what is left out and named."""

import os
import resource

import nibabel as nib
import numpy as np
import pytest
from test_own import fill, scan, settings_for, taken_in

from lib import DataError
from lib.cohorts.volumes import fit_labels
from lib.runs import params
from lib.scans.reading.folder import Case
from lib.scans.reading.intake import build, chosen_slices, folds_of, subjects_of
from lib.scans.reading.store import Store


def test_from_ten_labelled_subjects_on_a_fifth_is_held_out_and_a_single_one_cannot_be():
    names = [f"c{k}" for k in range(10)]
    folds = lambda count: folds_of(subjects_of(names[:count], ""), 1)
    (held_out,) = folds(10)
    assert len(held_out) == 2
    held_out, *quick = folds(5)
    assert held_out == () and sorted(sum(quick, ())) == names[:5] and sorted(map(len, quick)) == [2, 3]
    assert folds(1) == [()]


def test_cases_of_one_subject_are_held_out_together():
    names = [f"sub-{k:02d}_ses-{n}" for k in range(10) for n in (1, 2)] + ["other"]
    subjects = subjects_of(names, "(sub-[0-9]+)")
    assert subjects["sub-03"] == ["sub-03_ses-1", "sub-03_ses-2"]
    assert len(subjects) == 11 and subjects["other"] == ["other"]
    (held_out,) = folds_of(subjects, 1)
    assert folds_of(subjects, 1, quick=0) == folds_of(subjects_of(names[:4], ""), 1, quick=0) == [()]
    assert all(len({name in held_out for name in members}) == 1 for members in subjects.values()) and len(held_out) >= 2
    _, *quick = folds_of(subjects_of(names[:4], "(sub-[0-9]+)"), 1)
    assert sorted(quick) == [tuple(names[:2]), tuple(names[2:4])]
    for wrong in ("sub-[0-9]+", "(sub"):
        with pytest.raises(DataError, match="folder.subject .* cannot be used"):
            subjects_of(names, wrong)


def test_slices_are_chosen_by_mask_and_by_range(tmp_path):
    store = Store(tmp_path)
    labels = np.zeros((5, 4, 4))
    labels[3] = 1
    store.add("a", "1", np.zeros((5, 1, 4, 4)), labels)
    store.add("b", "1", np.zeros((9, 1, 4, 4)))
    cases = [Case("a", None, "mask"), Case("b", None, None)]  # a's mask is largest in its fourth slice

    def chosen(how):
        return {name: found.tolist() for name, found in chosen_slices(params.Section(slices=how), store, cases).items()}

    assert chosen("largest") == {"a": [3], "b": [6]}
    assert chosen([2, 3]) == {"a": [2, 3], "b": [2, 3]} and chosen("all")["b"] == list(range(9))
    with pytest.raises(DataError, match="folder.slices"):
        chosen("some")


def test_a_volume_that_is_too_short_is_left_out_and_the_others_are_not(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=1, slices=5)
    image, _ = scan(5, 2)
    nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "images" / "short.nii.gz")
    intake, store = taken_in(settings_for(folder, monkeypatch, slices=[2, 4]), tmp_path)
    assert [case.name for case in intake.cases] == ["case 0", "case 1"]
    assert "short.nii.gz has 2 slices, none from 2 to 4: change folder.slices" in intake.failures["short"]


def test_flipping_left_and_right_makes_no_sense_in_sagittal_slices(tmp_path, monkeypatch):
    settings = settings_for(fill(tmp_path, cases=1, labelled=1), monkeypatch, symmetric=True, axis=0)
    with pytest.raises(DataError, match="folder.symmetric flips left and right"):
        taken_in(settings, tmp_path)


def test_labels_shrink_as_images_do_and_what_is_lost_is_said(tmp_path, monkeypatch):
    """The centre of what is marked stays where it is; a label that vanishes is still a class, and noted."""
    rows, columns = np.mgrid[:512, :512]
    labels = (np.hypot(rows - 201.5, columns - 301.5) < 60).astype(np.uint8)[None]
    small = fit_labels(labels, 128)[0]
    for found, centre in zip(np.nonzero(small), (201.5, 301.5)):
        assert found.mean() == pytest.approx((centre + 0.5) / 4 - 0.5, abs=0.02)
    assert small.sum() == pytest.approx(labels.sum() / 16, rel=0.02)
    folder = fill(tmp_path, cases=1, labelled=1, slices=1)
    image, mask = scan(0, 1)
    mask[0, 0] = 9  # one pixel of 40 by 36, in slices of 8
    affine = np.diag([-2.0, 1.0, 4.0, 1.0])
    nib.save(nib.Nifti1Image(mask, affine), folder / "masks" / "case 0.nii.gz")
    intake, store = taken_in(settings_for(folder, monkeypatch, size=8), tmp_path)
    assert (
        intake.values == [2, 7, 9]
        and "label 9 is too small for axial slices of 16 x 32 pixels of 10 x 10 mm: raise folder.size"
        in intake.notes["case 0"]
    )


def test_few_files_are_open_however_many_slices_train(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=4, labelled=2, slices=60)
    settings = settings_for(folder, monkeypatch)
    intake, store = taken_in(settings, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        cohort = build(settings, store, intake, ["case 0"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(cohort.images) == 240
