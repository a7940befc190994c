"""Volumes and slices seen together: two networks with one mask."""

import nibabel as nib
import numpy as np
import pytest
from test_own import cases_of, fill, settings_for

from lib import DataError
from lib.compute import Numerics
from lib.models import ResidualUNet
from lib.scans import segment as own
from lib.scans.networks.model_file import Model, load_model, plans_in, save_model
from lib.scans.networks.training import measure
from lib.scans.reading.intake import chosen_images, take_in
from lib.scans.reading.planning import plans_of
from lib.scans.reading.store import Store


def test_volumes_and_slices_together_are_two_networks_with_one_mask(tmp_path, monkeypatch):
    """Joint training registers the volumes; the slices beside them learn without."""
    folder = fill(tmp_path, cases=3, labelled=2, slices=12)
    settings = settings_for(folder, monkeypatch, space="both", method="joint+")
    settings.strong.training |= {"steps": 12}
    settings.volumes.training |= {"steps": 12}
    settings.folder |= {"degraded_views": 5}
    settings.volumes.registration |= {"epochs": 1}
    table = own.segment_folder(settings)
    assert (table["status"] == "done").all() and (table["slices"] == 12).all() and table["predicted_dsc"].notna().all()
    model = load_model(folder / "out" / "model.safetensors")
    assert [plan.space for plan in model.plans] == ["volumes", "slices"]
    assert sorted(row[0] for row in model.about["calibration"]) == [0] * 6 + [1] * 6
    models = folder / "out" / "work" / "models" / "folder"
    assert [file.relative_to(models).parts[0] for file in models.rglob("registration")] == ["volumes_0"]
    image = nib.load(folder / "images" / "case 2.nii.gz")
    mask = nib.load(folder / "out" / "case 2_mask.nii.gz")
    assert mask.shape == image.shape and np.allclose(mask.affine, image.affine)
    again = own.segment_folder(
        settings_for(folder, monkeypatch, masks="", model=str(folder / "out" / "model.safetensors"))
    )
    assert (again["status"] == "done").all()  # by the same model, whatever folder.space says


def untrained(plans):
    """A Model of one class whose networks have learnt nothing."""
    about = {"classes": ["label 2"], "values": [2], "axis": 2, "plans": [*plans], "channels": [""], "symmetric": False}
    about |= {"normalisation": "instance", "pseudo_masks": {"n": 1, "rotation": 0, "shift": 0, "contrast": 0}}
    about |= {"fingerprint": "x", "licence": "", "calibration": []}
    return Model([ResidualUNet(1, "instance", 2, plan.strides).eval() for plan in plans_in(about)], about)


def test_a_model_of_volumes_is_not_applied_to_some_slices(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=1, slices=12)
    plans = [
        {"space": "volumes", "spacing": [4.0, 1.0, 2.0], "canvas": [16, 48, 48], "root": 2},
        {"space": "slices", "spacing": [1.0, 1.0], "canvas": [48, 80], "root": 2},
    ]
    save_model(untrained(plans), tmp_path / "both.safetensors")
    for slices in ([0, 5], "largest"):
        settings = settings_for(folder, monkeypatch, slices=slices, model=str(tmp_path / "both.safetensors"))
        with pytest.raises(
            DataError, match="but whole volumes are seen: set it to all, or folder.space to slices, and"
        ):
            own.segment_folder(settings)


def test_a_held_out_case_is_measured_by_both_networks_in_its_worse_views_too(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=1, slices=12)
    settings = settings_for(folder, monkeypatch, space="both", drawn="slices", degraded_views=2)
    plans = plans_of(settings.folder, cases_of(settings))
    stores = [Store(tmp_path / "scans" / plan.space, plan) for plan in plans]
    intake = take_in(settings.folder, cases_of(settings), stores)
    model = untrained(
        {"space": plan.space, "spacing": list(plan.spacing), "canvas": list(plan.canvas), "root": 2} for plan in plans
    )
    positions = chosen_images(settings.folder, stores, intake.cases)["case 0"]
    assert [len(at) for at in positions] == [1, 12]
    scores, pairs = measure(model, intake.cases[0], stores, positions, settings, Numerics("cpu"))
    assert len(scores) == 1 and scores["dsc"].between(0, 1).all() and scores["hd95"].isna().all()
    assert np.shape(pairs) == (3, 2) and np.isfinite(pairs).all()
