import importlib.util
import json
import sys
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from lib.methods import experiment
from lib.models import ResidualUNet
from lib.runs.params import ROOT
from lib.scans.networks import model_file

sys.path.insert(0, str(ROOT / "benchmarks"))

import draw_next
import monai_unet
import scale
import volumes

VALUES = {1: "anterior", 2: "posterior"}


def test_classes_and_the_foreground_that_holds_them_are_scored(tmp_path):
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[:2], truth[2] = 1, 2
    file = tmp_path / "case.nii.gz"
    nib.save(nib.Nifti1Image(truth, np.eye(4)), file)
    found = truth.copy()
    found[2] = 1  # the posterior part is taken for the anterior one
    scores = volumes.scores_of({"case": found}, {"case": file}, VALUES).loc["case"]
    assert scores["anterior"] == pytest.approx(2 * 32 / (32 + 48)) and scores["posterior"] == 0
    assert scores["foreground"] == 1
    found[0] = 0
    scores = volumes.scores_of({"case": found}, {"case": file}, VALUES).loc["case"]
    assert scores["foreground"] == pytest.approx(2 * 32 / (32 + 48))


def test_what_cases_csv_foretells_is_compared_with_the_truth(tmp_path):
    dsc = pd.Series({"a": 0.9, "b": 0.7, "c": 0.85, "d": 0.6})
    table = pd.DataFrame({"case": list("dcba"), "confidence": [0.5, 0.8, 0.7, 0.9], "predicted_dsc": 0.8})
    table = table.assign(predicted_low=np.nan, predicted_high=np.nan)
    table.to_csv(tmp_path / "cases.csv")
    cases = volumes.foretold(tmp_path / "cases.csv", dsc)
    expected = {"predicted_error": (0.1 + 0.1 + 0.05 + 0.2) / 4, "spearman": 1, "auroc_bad": 1}
    assert volumes.trust_of(cases) == pytest.approx(expected)
    assert "auroc_bad" not in volumes.trust_of(cases.assign(dsc=cases["dsc"].clip(lower=0.8)))
    assert volumes.trust_of(volumes.foretold(tmp_path / "none.csv", dsc)) == {}
    within = volumes.trust_of(cases.assign(predicted_low=0.65, predicted_high=[0.95, 0.85, 0.85, 0.85]))
    assert within["in_interval"] == 0.75 and within["interval_width"] == pytest.approx(0.225)


class Scan:
    """Stands for an ANTs image."""

    def __init__(self, voxels):
        self.numpy, self.new_image_like = lambda: voxels, Scan


def test_reverse_accuracy_is_how_well_a_predicted_mask_fits_the_drawn_case_that_it_fits_best(tmp_path, monkeypatch):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    labels = np.zeros((3, 4, 4))
    labels[0], labels[1] = 1, 2
    drawn = {"first": labels, "second": labels[[1, 0, 2]], "case": labels * 0}
    for name in ("first", "second"):
        (tmp_path / "masks" / f"{name}.nii.gz").touch()
    monkeypatch.setattr(volumes, "for_ants", lambda file: Scan(drawn[volumes.stem(file)]))
    monkeypatch.setattr(volumes.ants, "warp_onto", lambda target, atlases: atlases)  # all scans lie alike
    found = labels.copy()
    found[0] = 0  # the anterior part is missing
    reverse = volumes.reverse_accuracy(tmp_path, {"case": found}, VALUES)
    assert reverse.to_dict() == {"case": 0.5}
    cases = pd.DataFrame({"dsc": [0.7, 0.9], "reverse": [0.6, 0.7]})
    assert volumes.trust_of(cases) == pytest.approx({"reverse_error": 0.15, "reverse_spearman": 1})


def test_the_most_confident_masks_are_kept_first():
    kept = volumes.mean_of_kept([0.5, 0.9, 0.7], [0.6, 0.9, 0.3])
    assert kept == pytest.approx([0.9, 0.6, 0.6])
    run = {"method": "ours", "n_labelled": 5, "draw": 1, "confidence": [0.5, 0.9, 0.7], "dsc": [0.6, 0.9, 0.3]}
    other = {"method": "without", "n_labelled": 5, "draw": 1, "confidence": np.nan, "dsc": [0.6]}
    (panel,) = volumes.risk_coverage(pd.concat([pd.DataFrame(run), pd.DataFrame(other)])).axes
    drawn = {line.get_label(): line.get_ydata() for line in panel.lines}
    assert drawn["by confidence"] == pytest.approx(kept) and drawn["by the true DSC"] == pytest.approx([0.9, 0.75, 0.6])


def test_a_run_replaces_its_own_rows_alone(tmp_path):
    for score in (0.7, 0.8):
        table = volumes.Kept(tmp_path / "own.csv")
        for method in ("ours", "theirs"):
            if (method, score) != ("theirs", 0.8):
                run = {"method": method, "n_labelled": 5, "draw": 1}
                table.replace(run, pd.DataFrame({"dsc_mean": [score], "minutes": [2.0]}))
    found = pd.read_csv(tmp_path / "own.csv")
    assert len(found) == 2
    assert dict(zip(found["method"], found["dsc_mean"])) == {"ours": 0.8, "theirs": 0.7}


def test_nnunet_trains_as_long_as_was_measured_of_our_own():
    table = pd.DataFrame(
        {"method": ["make segment", "make segment"], "n_labelled": [5, 2], "draw": 1, "minutes": [8.0, np.nan]}
    )
    assert volumes.ours_took(table, 5, 1) == 8
    assert volumes.ours_took(table, 2, 1) is volumes.ours_took(table, 5, 2) is None
    assert volumes.ours_took(pd.DataFrame(), 5, 1) is None


def test_nnunet_gets_the_drawn_cases_alone_and_the_time_it_may_take(tmp_path, monkeypatch):
    for part, names in (("images", "ab"), ("masks", "a")):
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / f"{name}.nii.gz").write_text(f"{part} {name}")
    commands = []

    def run(words, env, check):
        assert Path(env["nnUNet_extTrainer"], "timed.py").exists() and float(env["NNUNET_MINUTES"]) == 2.5
        commands.append(" ".join(map(str, (Path(words[0]).name, *words[1:]))))
        if words[0].name == "nnUNetv2_predict":
            (tmp_path / "predicted").mkdir()
            nib.save(nib.Nifti1Image(np.ones((2, 2, 2)), np.eye(4)), tmp_path / "predicted" / "b.nii.gz")

    monkeypatch.setattr(volumes.subprocess, "run", run)
    found = volumes.WAYS["nnU-Net"](tmp_path, {"b": None}, VALUES, 2.5)
    plan, train, predict = commands
    assert found["b"].all() and plan.startswith("nnUNetv2_plan_and_preprocess")
    assert train == "nnUNetv2_train 1 3d_fullres all -tr TimedTrainer -device cpu"
    assert predict.startswith("nnUNetv2_predict -d 1 -f all -c 3d_fullres -tr TimedTrainer -device cpu")
    assert [file.name for file in (tmp_path / "scored").iterdir()] == ["b_0000.nii.gz"]
    data = tmp_path / "raw" / "Dataset001_Own"
    assert [file.name for file in (data / "imagesTr").iterdir()] == ["a_0000.nii.gz"]
    assert (data / "labelsTr" / "a.nii.gz").read_text() == "masks a"
    assert json.loads((data / "dataset.json").read_text())["labels"] == {"background": 0, "anterior": 1, "posterior": 2}
    with pytest.raises(SystemExit, match="make segment"):
        volumes.WAYS["nnU-Net"](tmp_path, {"b": None}, VALUES, None)


def test_nnunet_stops_after_its_minutes_and_its_learning_rate_falls_with_the_time(monkeypatch):
    clock, rates = iter(np.arange(0, 1000, 6.0)), []

    class Trainer:  # stands for nnU-Net's, whose package the tests do without
        num_epochs, batch_size, dataloader_train = 1000, 2, iter(range(100))
        network = types.SimpleNamespace(train=lambda: None)
        lr_scheduler = types.SimpleNamespace(step=rates.append)
        steps = ended = 0

        def on_train_start(self):
            self.started = True

        def train_step(self, batch):
            assert self.started and batch == self.steps
            self.steps += 1

        def on_train_end(self):
            self.ended += 1

        def print_to_log_file(self, text):
            assert text == f"{self.steps} steps of 2"

    own = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    for name in [own.rsplit(".", k)[0] for k in (3, 2, 1)]:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, own, types.SimpleNamespace(nnUNetTrainer=Trainer))
    monkeypatch.setenv("NNUNET_MINUTES", "0.5")
    spec = importlib.util.spec_from_file_location("timed", ROOT / "benchmarks" / "nnunet" / "timed.py")
    timed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timed)
    monkeypatch.setattr(timed, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    trainer = timed.TimedTrainer()
    trainer.run_training()
    assert trainer.steps == 4 and trainer.ended == 1  # at 6, 12, 18 and 24 of 30 seconds
    assert rates == pytest.approx([200, 400, 600, 800])


def test_monais_network_takes_volumes_of_any_size_as_ours_does():
    network = monai_unet.MonaiUNet(classes=2, inputs=1).eval()
    volume = torch.zeros(1, 1, 18, 17, 20)
    with torch.no_grad():
        assert network(volume).shape == network.segment(volume).shape == (1, 2, 18, 17, 20)
        assert network.segment(volume).min() >= 0 and network.segment(volume).max() <= 1


def test_monais_network_takes_the_place_of_ours_where_networks_are_trained_and_read(monkeypatch):
    for module in (experiment, model_file):  # put back after the test
        monkeypatch.setattr(module, "ResidualUNet", ResidualUNet)
    monai_unet.take_the_place_of_ours()
    assert experiment.ResidualUNet is model_file.ResidualUNet is monai_unet.MonaiUNet


def test_the_three_ways_to_choose_what_to_draw_differ_as_their_names_say():
    table = pd.DataFrame({"draw_next": [2, np.nan, 1], "confidence": [0.7, 0.9, 0.8]}, index=list("abc"))
    order = {rule: list(way(table, np.random.default_rng(1)).index) for rule, way in draw_next.RULES.items()}
    assert order["draw_next"] == ["c", "a", "b"] and order["least confident"] == ["a", "c", "b"]
    assert sorted(order["random"]) == list("abc")
    rows = [
        {"rule": rule, "draw": draw, "dsc": dsc}
        for draw, scores in enumerate(((0.7, 0.8, 0.78, 0.79), (0.6, 0.75, 0.77, 0.7)))
        for rule, dsc in zip(["five masks", *draw_next.RULES], scores)
    ]
    first, ours, anywhere, _ = draw_next.summary(pd.DataFrame(rows))
    assert first["DSC"] == "0.650" and ours["gain over five"] == "+0.125" and anywhere["DSC"] == "0.775"
    assert ours["over random"] == "+0.000" and ours["draws in which it is better"] == 1 and ours["draws"] == 2


def test_what_many_images_cost_grows_with_them_until_the_scheduler_is_the_limit():
    bench = {"threads": 2, "seg_train_seconds": 0.1, "seg_train_3d_seconds": 0.2}
    row = {"network": "U-Net", "batch": 10}
    steps = pd.DataFrame(
        [{**row, "image": image, "ms": ms} for image in ("256 x 256", "48 x 48 x 64") for ms in (9, 7)]
    )
    table = scale.reckon(
        bench, steps, {"handing_out_ms": 8, "handing_out_together_ms": 23, "together": 16}, views=5
    ).set_index(["images", "machine"])
    slices, volumes = scale.WORK
    two, nodes, gpus = (table.loc[slices, machine] for machine in ("2 CPU cores", "100 CPU nodes", "64 GPUs"))
    assert two["training_hours"] == pytest.approx(0.1 * 30_000 * 16 / 3600)
    assert two["segmenting_hours"] == pytest.approx(1e6 * 5 * 0.1 / scale.TRAINED / 3600)
    assert nodes["training_hours"] == pytest.approx(two["training_hours"] * 2 / scale.CORES)
    assert gpus["training_hours"] == pytest.approx(7e-4 * 30_000 * 16 / 3600)
    assert table.loc[slices, "1 GPU"]["bound"] == "networks"
    assert two["bound"] == "networks" and gpus["bound"] == "scheduler"
    assert gpus["segmenting_hours"] == pytest.approx(1e6 * 15e-3 / 8 / 3600)  # eight fit a piece, in 15 ms
    assert two["store_gb"] == pytest.approx(131.072) and two["dollars"] > table.loc[volumes, "2 CPU cores"]["dollars"]
