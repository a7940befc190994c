"""Slices of all directions seen: three networks with one mask."""

import nibabel as nib
import numpy as np
import pytest
import torch
from test_own import cases_of, fill, settings_for

from lib import DataError
from lib.cohorts.reading import read_grid
from lib.compute import Numerics
from lib.models import ResidualUNet
from lib.scans import segment as own
from lib.scans.networks.applying import FEW, segment
from lib.scans.networks.measuring import measure
from lib.scans.networks.model_file import Model, load_model, plans_in, save_model
from lib.scans.reading.intake import build, chosen_images, take_in
from lib.scans.reading.planning import plans_of
from lib.scans.reading.store import Store


@pytest.mark.parametrize("method", ["bcp", "joint+"])
def test_slices_of_all_directions_are_three_networks_with_one_mask(tmp_path, monkeypatch, method):
    folder = fill(tmp_path, cases=3, labelled=2, slices=12)
    settings = settings_for(folder, monkeypatch, space="views", method=method)
    settings.strong.training |= {"steps": 8}
    settings.folder |= {"degraded_views": 5}
    settings.registration |= {"epochs": 1}
    table = own.segment_folder(settings)
    assert (table["status"] == "done").all() and (table["slices"] == 12).all() and table["predicted_dsc"].notna().all()
    model = load_model(folder / "out" / "model.safetensors")
    assert [plan.view for plan in model.plans] == ["axial", "sagittal", "coronal"]
    assert sorted(row[0] for row in model.about["calibration"]) == [0] * 6 + [1] * 6
    models = folder / "out" / "work" / "models" / "folder"
    registered = {file.relative_to(models).parts[0] for file in models.rglob("registration")}
    assert registered == ({"axial_0", "sagittal_0", "coronal_0"} if method == "joint+" else set())
    image = nib.load(folder / "images" / "case 2.nii.gz")
    mask = nib.load(folder / "out" / "case 2_mask.nii.gz")
    assert mask.shape == image.shape and np.allclose(mask.affine, image.affine)
    again = own.segment_folder(
        settings_for(folder, monkeypatch, masks="", model=str(folder / "out" / "model.safetensors"))
    )
    assert (again["status"] == "done").all()  # by the same model, whatever folder.space says


def untrained(plans):
    """A Model of one class whose networks have learnt nothing."""
    about = {"classes": ["label 2"], "values": [2], "plans": [*plans], "channels": [""], "symmetric": False}
    about |= {"normalisation": "instance", "pseudo_masks": {"n": 1, "rotation": 0, "shift": 0, "contrast": 0}}
    about |= {"fingerprint": "x", "licence": "", "calibration": []}
    return Model([ResidualUNet(1, "instance", 2, plan.strides).eval() for plan in plans_in(about)], about)


def taken_in_stores(settings, folder):
    """(Stores of all plans of a folder's scans, Intake)."""
    cases = cases_of(settings)
    stores = [Store(folder / "scans" / plan.view, plan) for plan in plans_of(settings.folder, cases)]
    return stores, take_in(settings.folder, cases, stores)


def planned(stores):
    """Plans of small networks, as a Model's ``about`` has them."""
    names = "space", "axis", "spacing", "canvas"
    return [{**{name: getattr(store.plan, name) for name in names}, "root": 2} for store in stores]


def test_a_model_that_sees_scans_whole_is_not_applied_to_some_slices(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=1, slices=12)
    plans = [
        {"space": "slices", "axis": 2, "spacing": [1.0, 1.0], "canvas": [48, 80], "root": 2},
        {"space": "slices", "axis": 0, "spacing": [1.0, 1.0], "canvas": [48, 48], "root": 2},
    ]
    save_model(untrained(plans), tmp_path / "views.safetensors")
    for slices in ([0, 5], "largest"):
        settings = settings_for(folder, monkeypatch, slices=slices, model=str(tmp_path / "views.safetensors"))
        with pytest.raises(DataError, match="but scans are seen whole: set it to all, or folder.space to slices, and"):
            own.segment_folder(settings)


def test_a_held_out_case_is_measured_by_all_networks_in_its_worse_views_too(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=1, slices=12)
    settings = settings_for(folder, monkeypatch, space="views", drawn="slices", degraded_views=2)
    stores, intake = taken_in_stores(settings, tmp_path)
    model = untrained(planned(stores))
    positions = chosen_images(settings.folder, stores, intake.cases)["case 0"]
    assert [len(at) for at in positions] == [12, 40, 36]
    scores, pairs = measure(model, intake.cases[0], stores, positions, settings, Numerics("cpu"))
    assert len(scores) == 1 and scores["dsc"].between(0, 1).all() and scores["hd95"].isna().all()
    assert np.shape(pairs) == (3, 2) and np.isfinite(pairs).all()


def test_every_slice_of_the_mask_is_the_network_s_however_many_fit_into_a_batch(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=1, labelled=0, slices=35)
    settings = settings_for(folder, monkeypatch, space="slices")
    stores, _ = taken_in_stores(settings, tmp_path)
    grid = read_grid(folder / "images" / "case 0.nii.gz")
    model = untrained(planned(stores))
    model.networks[0].segment = lambda images: (images > 0.5).float()
    images, planes = stores[0].images("case 0"), np.arange(35)
    parts = [numerics.batch(images) for numerics in (Numerics("cpu"), Numerics("cpu").sharing(1 / 50))]
    assert parts[0] > 35 > parts[1] and FEW % parts[1]
    whole, divided = (
        segment(model, [images], planes, grid, numerics)
        for numerics in (Numerics("cpu"), Numerics("cpu").sharing(1 / 50))
    )
    assert len(np.unique(whole[0].reshape(35, -1), axis=0)) > 5 and np.array_equal(whole[0], divided[0])
    assert whole[2] == pytest.approx(divided[2])


def test_only_columns_that_run_from_left_to_right_are_mirrored(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=1, slices=12)
    settings = settings_for(folder, monkeypatch, space="views", symmetric=True)
    stores, intake = taken_in_stores(settings, tmp_path)
    assert [build(settings, store, intake, []).symmetric for store in stores] == [True, False, True]
    settings.folder |= {"space": "slices", "axis": 0}
    with pytest.raises(DataError, match="folder.symmetric flips left and right"):
        taken_in_stores(settings, tmp_path / "sagittal")


def test_held_out_masks_that_mark_nothing_say_nothing_of_confidence(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=1, slices=12)
    settings = settings_for(folder, monkeypatch, space="views", degraded_views=2)
    stores, intake = taken_in_stores(settings, tmp_path)
    model = untrained(planned(stores))
    for network in model.networks:
        network.segment = lambda images: torch.zeros_like(images)
    positions = chosen_images(settings.folder, stores, intake.cases)["case 0"]
    scores, pairs = measure(model, intake.cases[0], stores, positions, settings, Numerics("cpu"))
    assert scores["dsc"].tolist() == [0] and pairs == []


def test_what_is_drawn_too_thinly_for_a_direction_stops_the_run_with_what_to_do(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=1, slices=80)
    mask = nib.load(folder / "masks" / "case 0.nii.gz")
    labels = np.asarray(mask.dataobj).copy()
    labels[..., np.arange(labels.shape[2]) != (labels > 0).sum(axis=(0, 1)).argmax()] = 0
    nib.save(nib.Nifti1Image(labels, mask.affine), folder / "masks" / "case 0.nii.gz")
    settings = settings_for(folder, monkeypatch, space="views", drawn="slices", size=16)
    with pytest.raises(DataError, match="is too thin for .* slices of .*: raise folder.size"):
        own.segment_folder(settings)
