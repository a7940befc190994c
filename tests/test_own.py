"""A folder of scans from end to end: what comes out, what is kept, what two workers do, what is refused."""

import random
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from filelock import FileLock

from lib import DataError
from lib.cohorts import load_cohort
from lib.compute import Numerics
from lib.results.evaluation import score
from lib.runs import cluster, params
from lib.scans import cases, review
from lib.scans import segment as own
from lib.scans.networks import applying
from lib.scans.networks.measuring import score_case
from lib.scans.networks.model_file import load_model, save_model
from lib.scans.networks.training import fold_settings, method_for
from lib.scans.reading.folder import find_cases, read_case
from lib.scans.reading.intake import take_in
from lib.scans.reading.planning import Plan, plans_of
from lib.scans.reading.store import Store

SLICES = Plan("slices", 2, (1.0, 1.0), (32, 32))


def scan(seed, slices=3):
    """A bright ball with a brighter core in noise; labels 2 and 7."""
    rng = np.random.default_rng(seed)
    rows, columns, depth = np.mgrid[:40, :36, :slices]
    distance = np.hypot(rows - rng.uniform(17, 23), columns - rng.uniform(15, 21)) + depth
    labels = np.select([distance < 5, distance < 11], [7, 2], 0).astype(np.uint8)
    return (300 * (labels > 0) + 300 * (labels == 7) + 60 * rng.random(labels.shape)).astype(np.int16), labels


def fill(folder, cases=6, labelled=2, slices=3):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    affine = np.diag([-2.0, 1.0, 4.0, 1.0])
    for k in range(cases):
        image, labels = scan(k, slices)
        nib.save(nib.Nifti1Image(image, affine), folder / "images" / f"case {k}.nii.gz")
        if k < labelled:
            nib.save(nib.Nifti1Image(labels, affine), folder / "masks" / f"case {k}.nii.gz")
    return folder


def settings_for(folder, monkeypatch, **changes):
    monkeypatch.setenv("JOINT_SET", "scale=smoke")
    settings = params.load("strong", "folder")
    settings.strong.training |= {"steps": 90}
    settings.pseudo_masks |= {"n": 2}
    settings.folder |= {
        "images": str(folder / "images"),
        "masks": str(folder / "masks"),
        "output": str(folder / "out"),
        "size": 32,
        **changes,
    }
    return settings


def plan_for(settings):
    (plan,) = plans_of(settings.folder, cases_of(settings))
    return plan


def cases_of(settings):
    return find_cases(settings.folder.images, settings.folder.masks)


def taken_in(settings, folder):
    """(Intake, the only Store)"""
    store = Store(folder / "scans", plan_for(settings))
    return take_in(settings.folder, cases_of(settings), [store]), store


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    folder = fill(tmp_path_factory.mktemp("own"))
    with pytest.MonkeyPatch.context() as patch:
        return folder, own.segment_folder(settings_for(folder, patch))


def test_agreement_is_between_what_was_foretold_and_the_masks_that_were_hidden(tmp_path, monkeypatch):
    settings = settings_for(fill(tmp_path, cases=4, labelled=0), monkeypatch)
    table = pd.DataFrame(
        {
            "case": [f"case {k}" for k in range(4)],
            "status": ["done", "done", "done", "failed"],
            "confidence": [0.7, 0.8, 0.9, np.nan],
            "predicted_dsc": [0.5, 0.9, 0.9, np.nan],
            "predicted_low": [0.3, 0.8, 0.8, np.nan],
            "predicted_high": [0.7, 1.0, 1.0, np.nan],
            "review": [True, False, False, True],
        }
    )
    found = review.Review(settings, table, None).agreement(pd.Series({"case 0": 0.4, "case 1": 0.7, "case 2": 0.8}))
    assert found.to_dict() == pytest.approx(
        {
            "masks": 3,
            "dsc": 1.9 / 3,
            "predicted_dsc": 2.3 / 3,
            "error": 0.4 / 3,
            "worst_dsc": 0.4,
            "inside": 2,
            "spearman": 1,
            "flagged": 1,
        }
    )
    table[["predicted_low", "predicted_high"]] = np.nan
    assert np.isnan(review.Review(settings, table, None).agreement(pd.Series({"case 0": 0.4}))["inside"])


def test_every_case_gets_a_mask_and_a_confidence_map_on_its_own_grid(segmented):
    folder, table = segmented
    free = table[~table["labelled"]]
    assert table[table["labelled"]]["draw_next"].isna().all()
    assert table[["predicted_low", "predicted_high"]].isna().all(axis=None)
    assert table["note"].str.contains("no interval: 2 held out, 19 are needed").all()
    assert set(free.nsmallest(2, "confidence")["draw_next"]) == {1, 2} and free["draw_next"].count() == 2
    assert list(table["case"]) == [f"case {k}" for k in range(6)] and (table["status"] == "done").all()
    scores = []
    for k in range(6):
        image = nib.load(folder / "images" / f"case {k}.nii.gz")
        mask = nib.load(folder / "out" / f"case {k}_mask.nii.gz")
        confidence = nib.load(folder / "out" / f"case {k}_confidence.nii.gz")
        for file in (mask, confidence):
            assert file.shape == image.shape and np.allclose(file.affine, image.affine)
        values = np.asarray(confidence.dataobj)
        assert values.min() >= 0 and values.max() <= 1
        found, truth = np.asarray(mask.dataobj), scan(k)[1]
        assert set(np.unique(found)) <= {0, 2, 7}
        scores.append(2 * ((found > 0) & (truth > 0)).sum() / ((found > 0).sum() + (truth > 0).sum()))
        row = table.iloc[k]
        assert row["label 2"] == pytest.approx((found == 2).sum() * 8) and row["unit"] == "mm3"
    assert np.mean(scores[2:]) > 0.8
    assert pd.read_csv(folder / "out" / "cases.csv")["case"].tolist() == table["case"].tolist()


def test_below_ten_labelled_subjects_all_masks_train_and_halves_say_what_confidence_means(segmented):
    folder, table = segmented
    model = load_model(folder / "out" / "model.safetensors")
    assert len(model.networks) == 1 and model.about["values"] == [2, 7]
    assert table["predicted_dsc"].between(0, 1).all()
    masked = [load_cohort(folder / "out" / "work" / "cohort" / "folder" / f"axial_{k}.npz").masked for k in range(3)]
    trains = [
        set(cohort.subjects[(cohort.split == "train") & cohort.masked])
        for cohort in (load_cohort(folder / "out" / "work" / "cohort" / "folder" / f"axial_{k}.npz") for k in range(3))
    ]
    assert trains[0] == {"case 0", "case 1"} and sorted(map(sorted, trains[1:])) == [["case 0"], ["case 1"]]
    assert not masked[0].all() and masked[1].all() and masked[2].all()  # unlabelled scans train the network alone


@pytest.mark.parametrize(
    "method, stage", [("auto", "bcp"), ("bcp", "bcp"), ("joint+", "joint_plus"), ("fs+elastic", "elastic")]
)
def test_the_method_that_is_named_trains_and_only_joint_plus_registers(tmp_path, monkeypatch, method, stage):
    settings = settings_for(fill(tmp_path, labelled=1), monkeypatch, method=method)
    settings.strong.training |= {"steps": 4}
    assert (own.segment_folder(settings)["status"] == "done").all()
    trained = {file.parent.name for file in (tmp_path / "out" / "work" / "models").rglob("network.pt")}
    assert trained == {stage} | ({"strong"} if method == "joint+" else set())  # of the registration the recipe


@pytest.mark.parametrize(
    "wanted, labelled, unlabelled, whole, number, method",
    [
        ("auto", 49, 9, False, 0, "bcp"),
        ("auto", 50, 9, False, 0, "fs+elastic"),
        ("auto", 4, 9, True, 0, "bcp"),
        ("auto", 5, 9, True, 0, "fs+elastic"),
        ("auto", 4, 0, True, 0, "fs+elastic"),
        ("bcp", 50, 9, False, 0, "bcp"),
        ("joint+", 50, 9, False, 0, "joint+"),
        ("joint+", 50, 9, False, 1, "fs+elastic"),
    ],
)
def test_unlabelled_images_train_only_where_labelled_ones_are_few(wanted, labelled, unlabelled, whole, number, method):
    data = SimpleNamespace(labelled=range(labelled), unlabelled=range(unlabelled))
    assert method_for(SimpleNamespace(data=data, whole=whole), wanted, number) == method


def test_quick_networks_take_fewer_steps_and_memory_that_is_short_smaller_batches(monkeypatch, tmp_path):
    settings = settings_for(tmp_path, monkeypatch)
    settings.strong.training |= {"steps": 400, "batch": 16}
    quick, small = fold_settings(settings, SLICES, 1), fold_settings(settings, SLICES, 0, divisor=8)
    assert quick.strong.training.steps == 100 and quick.folder.unlabelled == 0
    assert small.strong.training.steps == 400 and small.strong.training.batch == 4 and small.registration.batch >= 1
    assert settings.strong.training.batch == 16


def test_worse_views_of_held_out_cases_say_what_low_confidence_means(segmented):
    """One pair for every held-out case and 20 for its views: the worse they are, the lower is the DSC."""
    model = load_model(segmented[0] / "out" / "model.safetensors")
    rows = np.reshape(model.about["calibration"], (2, 21, 3))
    assert rows[0, :, 0].tolist() == [0] * 21 and rows[1, :, 0].tolist() == [1] * 21
    pairs = rows[:, :, 1:]
    held_out = pd.read_csv(segmented[0] / "out" / "held_out.csv").groupby("case")["dsc"].mean()
    assert pairs[:, 0, 1] == pytest.approx(held_out.to_numpy(), abs=1e-4)
    assert (pairs[:, 1:5, 1].mean(axis=1) > pairs[:, -4:, 1].mean(axis=1)).all()
    assert ((pairs[..., 0] > 0) & (pairs[..., 0] < 1)).all()


def test_finished_cases_are_not_computed_again_and_lost_ones_come_back_the_same(segmented, monkeypatch):
    folder, _ = segmented
    settings = settings_for(folder, monkeypatch)
    lost = folder / "out" / "case 3_mask.nii.gz"
    before = np.asarray(nib.load(lost).dataobj)
    lost.unlink()
    applied = []
    monkeypatch.setattr(own, "train", lambda *_: pytest.fail("it is trained"))
    monkeypatch.setattr(cases, "apply", lambda *a, apply=cases.apply: applied.append(a[1]) or apply(*a))
    own.segment_folder(settings)
    assert applied == ["case 3"] and np.array_equal(np.asarray(nib.load(lost).dataobj), before)


def test_a_bad_case_is_reported_and_the_others_are_segmented_by_the_given_model(segmented, tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=3, labelled=0)
    (folder / "images" / "bad.nii.gz").write_bytes(b"no")
    shutil.rmtree(folder / "masks")
    model = str(segmented[0] / "out" / "model.safetensors")
    table = own.segment_folder(settings_for(folder, monkeypatch, masks="", model=model)).set_index("case")
    assert table.loc["bad", "status"] == "failed" and "cannot be read" in table.loc["bad", "note"]
    assert table.loc["bad", "review"] and (table.drop("bad")["status"] == "done").all()
    for k in range(3):
        files = (where / "out" / f"case {k}_mask.nii.gz" for where in (folder, segmented[0]))
        mine, theirs = (np.asarray(nib.load(file).dataobj) for file in files)
        assert np.array_equal(mine, theirs)


KILLS = 20


def workers_of_this_process():
    """Processes that Dask has started as workers."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_two_workers_that_are_killed_at_random_moments_segment_as_one_does(segmented, tmp_path, monkeypatch):
    folder, whole = segmented
    model, killed = str(folder / "out" / "model.safetensors"), []
    started, over = threading.Event(), threading.Event()

    @contextmanager
    def connect(*arguments, connect=cluster.connect):
        with connect(*arguments) as client:
            started.set()
            yield client
            started.clear()

    def kill():
        rng = random.Random(0)
        while len(killed) < KILLS and not over.wait(rng.uniform(0, 4)):
            if started.is_set() and (found := workers_of_this_process()):
                with suppress(psutil.Error):
                    rng.choice(found).kill()
                    killed.append(time.monotonic())

    monkeypatch.setattr(cluster, "connect", connect)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for run in range(KILLS):  # a run may outlive few of them
            output = tmp_path / str(run)
            settings = settings_for(folder, monkeypatch, output=str(output), masks="", model=model, workers=2)
            table = own.segment_folder(settings)
            assert table["case"].tolist() == whole["case"].tolist() and (table["status"] == "done").all()
            assert table["confidence"].tolist() == pytest.approx(whole["confidence"].tolist(), abs=1e-5)
            for name in table["case"]:
                files = (out / f"{name}_mask.nii.gz" for out in (output, folder / "out"))
                mine, theirs = (np.asarray(nib.load(file).dataobj) for file in files)
                assert (mine == theirs).mean() > 0.9999
            if not killer.is_alive():
                break
    finally:
        over.set()
        killer.join()
    assert len(killed) == KILLS


def test_no_mask_at_all_and_a_second_run_in_the_same_folder_are_errors(tmp_path, monkeypatch):
    folder = fill(tmp_path, cases=2, labelled=0)
    with pytest.raises(DataError, match="has a mask"):
        own.segment_folder(settings_for(folder, monkeypatch))
    nib.save(nib.Nifti1Image(scan(0)[1], np.eye(4)), folder / "masks" / "case 0.nii.gz")
    with pytest.raises(DataError, match="has a mask.*case 0.nii.gz and its mask .* have different affines"):
        own.segment_folder(settings_for(folder, monkeypatch))
    (folder / "masks" / "case 0.nii.gz").unlink()
    with FileLock(folder / "out" / ".lock"), pytest.raises(DataError, match="another run is at work"):
        own.segment_folder(settings_for(folder, monkeypatch))


def test_a_single_slice_is_scored_as_an_image(segmented, tmp_path, monkeypatch):
    """A volume one slice thick has no inside: its HD95 would be too low."""
    folder = fill(tmp_path, cases=1, labelled=1, slices=1)
    settings = settings_for(folder, monkeypatch)
    intake, store = taken_in(settings, tmp_path)
    model = load_model(segmented[0] / "out" / "model.safetensors")
    numerics = Numerics("cpu")
    (case,) = intake.cases
    found, _ = score_case(model, case, [store], [np.array([0])], settings.folder, numerics)
    _, truth, grid = read_case(case)
    labels, *_ = applying.segment(model, [store.images("case 0")[[0]]], np.array([0]), grid, numerics)
    masks_of = lambda part: torch.stack([torch.as_tensor(part[0] == value) for value in (2, 7)])[None].float()
    pair = [masks_of(part) for part in (labels, truth)]
    expected = score(*pair, ["label 2", "label 7"], grid.spacing[1:])
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("what", ["images", "masks"])
def test_inputs_are_never_written_over(tmp_path, monkeypatch, what):
    folder = fill(tmp_path, cases=2, labelled=1)
    with pytest.raises(DataError, match=f"{what} is the folder of the {what}: give another one"):
        own.segment_folder(settings_for(folder, monkeypatch, output=str(folder / what)))


def test_masks_that_somebody_has_corrected_are_kept_and_damaged_ones_are_made_again(segmented, tmp_path, monkeypatch):
    folder = shutil.copytree(segmented[0], tmp_path / "copy")
    settings = settings_for(folder, monkeypatch)
    corrected, damaged = (folder / "out" / f"case {k}_mask.nii.gz" for k in (2, 4))
    whole, image = damaged.read_bytes(), nib.load(corrected)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 0 + 7, image.affine, image.header), corrected)
    by_hand = corrected.read_bytes()
    damaged.write_bytes(whole[:40])
    table = own.segment_folder(settings).set_index("case")
    assert corrected.read_bytes() == by_hand and damaged.read_bytes() == whole
    assert table.loc["case 2", "status"] == "kept" and "is kept: move it away" in table.loc["case 2", "note"]
    assert not table.loc["case 2", "review"] and (table.drop("case 2")["status"] == "done").all()


def test_a_stop_between_mask_and_confidence_map_leaves_nothing_that_is_taken_for_finished(
    segmented, tmp_path, monkeypatch
):
    folder = shutil.copytree(segmented[0], tmp_path / "copy")
    settings = settings_for(folder, monkeypatch)
    before = {file.name: file.read_bytes() for file in (folder / "out").glob("case 3_*")}
    model = load_model(folder / "out" / "model.safetensors")
    for value in model.networks[0].parameters():
        value.data.mul_(1.1)
    save_model(model, tmp_path / "other.safetensors")

    def stop(slices, grid, file, write=applying.write_scan):
        if "case 3_confidence" in file.name:
            raise KeyboardInterrupt
        write(slices, grid, file)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(applying, "write_scan", stop)
        other = settings_for(folder, monkeypatch, masks="", model=str(tmp_path / "other.safetensors"))
        own.segment_folder(other)
    assert (folder / "out" / "case 3_mask.nii.gz").read_bytes() != before["case 3_mask.nii.gz"]
    table = own.segment_folder(settings).set_index("case")
    assert (table["status"] == "done").all()
    assert {file.name: file.read_bytes() for file in (folder / "out").glob("case 3_*")} == before
