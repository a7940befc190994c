"""Images of several channels, one file each: found, checked, and used for what only one of them shows."""

import nibabel as nib
import numpy as np
import pytest
import torch
from test_own import scan, settings_for

from lib import DataError
from lib.scans import segment as own
from lib.scans.networks.model_file import load_model
from lib.scans.reading.folder import find_cases, read_case

CHANNELS = ["_t1", "_t2"]


def fill(folder, cases=5, labelled=2):
    """The ball is in the second channel alone; the first is noise."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    affine = np.diag([-2.0, 1.0, 4.0, 1.0])
    for k in range(cases):
        image, labels = scan(k)
        noise = np.random.default_rng(k).random(image.shape).astype(np.float32)
        for ending, what in zip(CHANNELS, (noise, image)):
            nib.save(nib.Nifti1Image(what, affine), folder / "images" / f"case {k}{ending}.nii.gz")
        if k < labelled:
            nib.save(nib.Nifti1Image(labels, affine), folder / "masks" / f"case {k}.nii.gz")
    return folder


def test_cases_are_the_files_without_their_channel_and_in_the_order_that_is_given(tmp_path):
    cases = find_cases(fill(tmp_path) / "images", tmp_path / "masks", channels=CHANNELS[::-1])
    assert [case.name for case in cases] == [f"case {k}" for k in range(5)]
    assert cases[0].image.name == "case 0_t2.nii.gz" and [file.name for file in cases[0].others] == ["case 0_t1.nii.gz"]
    assert cases[0].mask.name == "case 0.nii.gz" and cases[4].mask is None
    (first, second), labels, _ = read_case(cases[0])
    assert first.max() > 500 and second.max() <= 1 and first.shape == second.shape == labels.shape


def test_a_missing_channel_a_strange_file_and_another_grid_are_named(tmp_path):
    images = fill(tmp_path) / "images"
    cases = find_cases(images, channels=CHANNELS)
    wrong = nib.Nifti1Image(np.random.rand(40, 36, 3), np.diag([-2.0, 1.0, 5.0, 1.0]))
    nib.save(wrong, images / "case 1_t2.nii.gz")
    with pytest.raises(DataError, match="case 1_t2.nii.gz and .*case 1_t1.nii.gz have different shapes or affines"):
        read_case(cases[1])
    (images / "case 3_t2.nii.gz").unlink()
    with pytest.raises(DataError, match="case 3_t1.nii.gz has no file beside it for the channel _t2: add it"):
        find_cases(images, channels=CHANNELS)
    (images / "case 3_t1.nii.gz").rename(images / "other.nii.gz")
    with pytest.raises(DataError, match="other.nii.gz ends with none of _t1, _t2"):
        find_cases(images, channels=CHANNELS)


@pytest.mark.parametrize("method", ["bcp", "joint+"])
def test_what_only_the_second_channel_shows_is_segmented(tmp_path, monkeypatch, method):
    settings = settings_for(fill(tmp_path), monkeypatch, channels=CHANNELS, method=method)
    settings.strong.training["steps"] = 60 if method == "bcp" else 4
    table = own.segment_folder(settings)
    assert (table["status"] == "done").all()
    model = load_model(tmp_path / "out" / "model.safetensors")
    assert model.about["channels"] == CHANNELS and model.networks[0].down[0].first.weight.shape[1] == 2
    if method == "bcp":
        scores = []
        for k in range(2, 5):
            found, truth = np.asarray(nib.load(tmp_path / "out" / f"case {k}_mask.nii.gz").dataobj), scan(k)[1]
            scores.append(2 * ((found > 0) & (truth > 0)).sum() / ((found > 0).sum() + (truth > 0).sum()))
        assert np.mean(scores) > 0.7
        # applied to further scans the model knows its channels by itself
        again = settings_for(tmp_path, monkeypatch, masks="", output=str(tmp_path / "again"))
        again.folder["model"] = str(tmp_path / "out" / "model.safetensors")
        own.segment_folder(again)
        masks = [np.asarray(nib.load(tmp_path / part / "case 3_mask.nii.gz").dataobj) for part in ("out", "again")]
        assert torch.equal(*map(torch.as_tensor, masks))
