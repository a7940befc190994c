"""Masks that are drawn in part: what is taken for drawn, what trains, and what is scored."""

import nibabel as nib
import numpy as np
import pytest
import torch
from test_own import fill, settings_for, taken_in

from lib import DataError
from lib.cohorts import load_cohort
from lib.cohorts.cohort import UNDRAWN
from lib.methods.experiment import Experiment
from lib.methods.mean_teacher import MeanTeacher
from lib.methods.peers import bcp, elastic
from lib.methods.peers.learning import Lesson
from lib.runs.params import cohort_file
from lib.scans import segment as own
from lib.scans.reading.drawing import direction_of, drawn_part
from lib.scans.reading.intake import build


def ball(shape=(24, 30, 28)):
    """A structure that is about 16 voxels long in every direction."""
    places = np.meshgrid(*(np.arange(side) - side / 2 for side in shape), indexing="ij")
    return (sum(place**2 for place in places) < 64).astype(np.uint8)


def kept(labels, axis, every):
    """The labels on every so-many-th slice alone."""
    found = np.zeros_like(labels)
    places = tuple(slice(None, None, every) if axis == other else slice(None) for other in range(3))
    found[places] = labels[places]
    return found


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_slices_that_were_drawn_one_by_one_are_found_in_any_direction(axis, every):
    labels, drawn, taken = drawn_part(kept(ball(), axis, every), "auto", axis=2)
    marked = kept(ball(), axis, every).any(axis=tuple(other for other in range(3) if other != axis))
    assert (drawn == np.expand_dims(marked, [other for other in range(3) if other != axis])).all()
    assert np.array_equal(labels, kept(ball(), axis, every))
    assert f"{marked.sum()} of {len(marked)} {('axial', 'coronal', 'sagittal')[axis]} slices" in taken


def two_sides():
    labels = np.zeros((24, 30, 60), np.uint8)
    labels[:, :, :28] = labels[:, :, 32:] = ball()
    return labels


@pytest.mark.parametrize("labels", [ball(), two_sides(), np.zeros((4, 5, 6), np.uint8), ball()[12:13]])
def test_whole_masks_are_taken_for_whole(labels):
    """Also where a structure has two sides with a gap between them, is a single slice, or is not there."""
    assert direction_of(labels) is None if labels.any() else True
    assert drawn_part(labels, "auto", 2)[1:] == (None, "")


def test_what_is_drawn_can_be_said():
    half = ball()
    half[12:] = 0  # nobody can see that the rest was not drawn
    assert drawn_part(half, "auto", 2)[1] is None
    _, drawn, taken = drawn_part(half, "slices", 2)
    assert drawn[:, 0, 0].tolist() == half.any(axis=(1, 2)).tolist() and "axial" in taken
    unknown = ball()
    unknown[12:] = 255
    labels, drawn, _ = drawn_part(unknown, 255, 2)
    assert (drawn == (unknown != 255)).all() and not labels[12:].any() and np.array_equal(labels[:12], ball()[:12])
    assert drawn_part(kept(ball(), 0, 3), "whole", 2)[1] is None
    for wrong in ("some", 0, 256, True):
        with pytest.raises(DataError, match="folder.drawn is"):
            drawn_part(ball(), wrong, 2)


def partly(folder, monkeypatch, slices, changes=(), **options):
    """A folder in which the first of two masks is drawn on the second slice alone, and its cohort."""
    settings = settings_for(fill(folder, cases=4, labelled=2, slices=slices), monkeypatch, **options)
    file = folder / "masks" / "case 0.nii.gz"
    mask = nib.load(file)
    labels = np.zeros(mask.shape, np.uint8)
    labels[:, :, 1] = np.asarray(mask.dataobj)[:, :, 1]
    nib.save(nib.Nifti1Image(labels, mask.affine), file)
    settings["cohort"] = "folder/axial_0"
    intake, store = taken_in(settings, folder)
    monkeypatch.setenv("JOINT_OUTPUT", str(folder / "out"))
    build(settings, store, intake, ()).save(cohort_file(settings))
    return settings, intake, load_cohort(cohort_file(settings))


def test_slices_that_were_not_drawn_train_as_unlabelled_ones(tmp_path, monkeypatch):
    _, intake, cohort = partly(tmp_path, monkeypatch, slices=6)
    own = (cohort.subjects == "case 0") & (cohort.split == "train")
    assert cohort.masked[own].sum() == 1 and own.sum() == 6
    assert not (cohort.labels[own & ~cohort.masked] > 0).any()
    assert "1 of 6 axial slices are taken for drawn" in intake.notes["case 0"] and "case 1" not in intake.notes


@pytest.mark.parametrize("method", [bcp, elastic])
def test_voxels_that_were_not_drawn_have_no_influence_on_any_gradient(tmp_path, monkeypatch, method):
    """In volumes: whatever label an undrawn voxel has, training takes the same course."""
    settings, _, cohort = partly(tmp_path, monkeypatch, slices=16, space="volumes")
    undrawn = cohort.labels == UNDRAWN
    assert cohort.axes == 3 and undrawn.any() and (cohort.labels[undrawn.any(axis=(1, 2, 3))] == 1).any()
    settings.strong.training |= {"steps": 6, "batch": 4}
    weights = []
    for label in (0, 1):
        experiment = Experiment(settings)
        masks = experiment.data.masks
        masks[experiment.numerics.tensor(undrawn[:, None]).expand_as(masks) > 0] = label
        monkeypatch.setattr(experiment.cabinet, "checkpoint", lambda key: None)
        weights.append(method.train(experiment)[0].state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(each.values() for each in weights)))


def test_the_loss_leaves_out_what_is_not_drawn(tmp_path, monkeypatch):
    settings, *_ = partly(tmp_path, monkeypatch, slices=16, space="volumes")
    experiment = Experiment(settings)
    lesson = Lesson(experiment, MeanTeacher(experiment.segmentation_network(), 0.9))
    truth = torch.zeros(1, 2, 4, 4, 4)
    drawn = torch.zeros(1, 1, 4, 4, 4)
    drawn[:, :, 1] = 1
    wrong = torch.full_like(truth, -9.0)
    wrong[:, :, 2:] = 9.0  # where nothing is drawn
    assert float(lesson.loss(wrong, torch.cat((truth, drawn), 1))) < 0.05
    assert float(lesson.loss(wrong, torch.cat((truth, torch.ones_like(drawn)), 1))) > 0.5


@pytest.mark.parametrize("space", ["slices", "volumes", "views"])
def test_a_folder_of_partly_drawn_volumes_is_segmented_and_scored_where_it_is_drawn(tmp_path, monkeypatch, space):
    settings, *_ = partly(tmp_path, monkeypatch, slices=16, space="slices")
    settings.folder |= {"space": space}
    monkeypatch.delenv("JOINT_OUTPUT")
    settings.strong.training |= {"steps": 4}
    table = own.segment_folder(settings).set_index("case")
    assert (table["status"] == "done").all() and "taken for drawn" in table.loc["case 0", "note"]
    held_out = np.genfromtxt(tmp_path / "out" / "held_out.csv", delimiter=",", names=True, dtype=None, encoding=None)
    of = lambda case: held_out[held_out["case"] == case]
    assert np.isnan(of("case 0")["hd95"]).all() and np.isfinite(of("case 0")["dsc"]).all()
