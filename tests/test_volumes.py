from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import compute_dice
from ruamel.yaml import YAML
from test_evaluation import hausdorff_of_two

from lib import DataError
from lib.cohorts import acdc, load_cohort, volumes
from lib.cohorts.cohort import one_hot
from lib.methods.experiment import Experiment
from lib.metrics import to_labels
from lib.results.evaluation import score_volumes
from lib.runs import notebooks, params

RESULTS = "results", "${item.cohort}"
SPLIT = {"train": [f"patient{k:03d}" for k in (1, 2, 3)], "validation": ["patient004"], "test": ["patient005"]}


def heart(seed, slices=4, height=40, width=32):
    """A made-up heart: three labelled structures one inside the other, on noise."""
    rng = np.random.default_rng(seed)
    rows, columns, depth = np.mgrid[:height, :width, :slices]
    centre = rng.uniform(16, 20), rng.uniform(13, 17)
    distance = np.hypot(rows - centre[0], columns - centre[1]) + depth
    labels = np.select([distance < 5, distance < 8, distance < 11], [3, 2, 1], 0).astype(np.uint8)
    return (1000 * (labels / 3 + 0.1 * rng.random(labels.shape))).astype(np.uint16), labels


def made_up_volumes(size=32):
    """A cohort of one volume per patient, four of which train."""
    splits = {"train": 4, "validation": 1, "test": 2}
    parts = [
        (f"{split}{k}", f"{split}{k}", split, k, *(np.moveaxis(part, 2, 0) for part in heart(10 * k + n)))
        for n, (split, count) in enumerate(splits.items())
        for k in range(count)
    ]
    return volumes.assemble("acdc", "made up", parts, ("a", "b", "c"), size)


def write(folder, patient, frame, image, labels, name="{patient}_frame{frame:02d}{end}.nii.gz"):
    folder.mkdir(parents=True, exist_ok=True)
    for array, end in ((image, ""), (labels, "_gt")):
        if array is not None:
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name.format(patient=patient, frame=frame, end=end))


def refused(build, settings, words):
    with pytest.raises(DataError, match=words):
        build(settings)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(acdc, "SPLIT", SPLIT)
    return params.Section(folder=str(tmp_path / "acdc"), external="", size=32, window=0, patients={})


@pytest.fixture(params=["flat", "challenge"])
def folder(request, tmp_path):
    for k in range(1, 6):
        patient = f"patient{k:03d}"
        at = tmp_path / "acdc" / ("" if request.param == "flat" else f"training/{patient}")
        for frame in (1, 9):
            write(at, patient, frame, *heart(10 * k + frame, slices=3 + k % 2))
        if request.param == "challenge":
            (at / "Info.cfg").write_text("ED: 1\nES: 9\nGroup: NOR\n")
            write(at, patient, 5, *heart(99))  # a frame that is neither ED nor ES
    return tmp_path / "acdc"


def test_both_layouts_give_both_phases_of_every_patient(settings, folder):
    cohort = acdc.build(settings)
    assert list(cohort.names()) == [f"{p}_frame{f:02d}" for p in sum(SPLIT.values(), []) for f in (1, 9)]
    assert cohort.images.shape[1:] == (32, 32) and cohort.images.min() >= 0 and cohort.images.max() <= 1
    for number, name in enumerate(cohort.names()):
        k, frame = int(name[7:10]), int(name[-2:])
        if f"patient{k:03d}" in SPLIT["train"]:
            with pytest.raises(ValueError, match=f"{name} trains"):
                cohort.original(number)
            continue
        assert np.array_equal(cohort.original(number), np.moveaxis(heart(10 * k + frame, 3 + k % 2)[1], 2, 0))
    assert cohort.positions[cohort.volumes == "patient001_frame01"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_patients_are_labelled_in_the_splits_order_whatever_the_seed(settings, folder):
    cohort = acdc.build(settings)
    for seed in (1, 2):
        order = cohort.order(seed)
        assert list(dict.fromkeys(cohort.subjects[order])) == SPLIT["train"]
    assert [cohort.units(order[: cohort.count(rate)]) for rate in (1, 34, 67, 100)] == [1, 1, 2, 3]


def test_external_patients_are_tested_at_their_original_size(settings, folder, tmp_path):
    for patient, frame in (("patient101", 1), ("patient101", 12), ("patient002", 1), ("patient002", 9)):
        write(tmp_path / "further", patient, frame, *heart(frame, slices=5))
    cohort = acdc.build(params.Section(settings, external=str(tmp_path / "further")))
    assert set(cohort.subjects[cohort.index("external")]) == {"patient101"}  # the other one trains
    assert list(cohort.names())[-2:] == ["patient101_frame01", "patient101_frame12"]
    assert np.array_equal(cohort.original(len(cohort.names()) - 1), np.moveaxis(heart(12, slices=5)[1], 2, 0))
    assert set(cohort.subjects[cohort.index("train")]) == set(SPLIT["train"])


def test_the_file_keeps_everything(settings, folder, tmp_path):
    cohort = acdc.build(settings)
    cohort.save(tmp_path / "c.npz")
    again = load_cohort(tmp_path / "c.npz")
    assert isinstance(again, volumes.VolumeCohort) and np.array_equal(again.truth, cohort.truth)
    assert np.array_equal(again.shapes, cohort.shapes) and again.classes == cohort.classes


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: next(f.rglob("patient002_frame09.nii.gz")).unlink(), "patient002"),
        (
            lambda f: next(f.rglob("patient005_frame01_gt.nii.gz")).unlink(),
            "patient005_frame01_gt.nii.gz does not exist",
        ),
        (
            lambda f: write(
                next(f.rglob("patient001_frame01.nii.gz")).parent,
                "patient001",
                1,
                None,
                np.full((40, 32, 4), 7, np.uint8),
            ),
            r"holds the values \[7.0\]",
        ),
        (
            lambda f: write(
                next(f.rglob("patient001_frame01.nii.gz")).parent,
                "patient001",
                1,
                None,
                np.zeros((40, 30, 4), np.uint8),
            ),
            "has shape",
        ),
    ],
)
def test_bad_input_is_named(settings, folder, spoil, words):
    spoil(folder)
    refused(acdc.build, settings, words)


def test_missing_folder_patients_and_info_say_how_to_get_them(settings, tmp_path):
    refused(acdc.build, settings, "register at https")
    (tmp_path / "acdc").mkdir()
    refused(acdc.build, settings, "holds no .*patient.*register at")
    for frame in (1, 9):
        write(tmp_path / "acdc", "patient001", frame, *heart(1))
    refused(acdc.build, settings, "lacks patient002, patient003")
    (tmp_path / "acdc" / "patient007").mkdir()
    refused(acdc.build, settings, "Info.cfg does not say")


def test_perfect_masks_score_perfectly_and_volumes_are_scored_at_their_own_size(settings, folder):
    cohort = acdc.build(params.Section({**settings, "size": 64}))
    index = cohort.index("test")
    truth = torch.as_tensor(one_hot(cohort.labels[index], 3))
    scores = score_volumes(cohort, truth, index)
    assert len(scores) == 2 * 3 and (scores["dsc"] > 0.9).all() and (scores["hd"] <= 2).all()
    shifted = truth.roll(6, dims=-1)
    scores = score_volumes(cohort, shifted, index)
    number = list(cohort.names()).index("patient005_frame01")
    mine = index[cohort.volumes[index] == "patient005_frame01"]
    small = torch.nn.functional.interpolate(shifted[: len(mine)], size=(40, 32), mode="bilinear")
    labels = to_labels(small)
    hard = [
        torch.stack([x == k for k in (1, 2, 3)])[None]
        for x in (labels, torch.as_tensor(cohort.original(number).astype(int)))
    ]
    rows = scores[scores["image"] == 0]
    assert rows["dsc"].to_numpy() == pytest.approx(compute_dice(*hard, ignore_empty=False)[0].numpy(), abs=1e-5)
    expected = np.array([hausdorff_of_two(*pair) for pair in zip(*(masks[0] for masks in hard))])
    assert rows[["hd", "hd95"]].to_numpy() == pytest.approx(expected, abs=1e-4)


def test_registration_partners_lie_at_the_same_height(settings, folder):
    cohort = acdc.build(settings)
    index, sources = cohort.index("test"), cohort.index("train")
    matches = cohort.matches(index, sources)
    assert matches.shape == (len(index), 6)  # three patients, two volumes each
    distance = np.abs(cohort.positions[sources[matches]] - cohort.positions[index][:, None])
    assert distance.max() <= 0.26
    assert all(len(set(cohort.volumes[sources[row]])) == 6 for row in matches)


def test_the_pieces_fit_the_experiment(settings, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path / "out"))
    settings = params.load("strong", cohort="acdc", rate=34)
    acdc.build(params.Section(folder=str(folder), external="", size=32, window=0, patients={})).save(
        params.cohort_file(settings)
    )
    trial = Experiment(settings)
    networks = trial.segmentation_network(), trial.registration_network()
    masks = trial.generate(networks, trial.cohort.index("test"), "test", "test")
    assert masks.soft.shape == (len(trial.cohort.index("test")), 3, 32, 32)
    drawn = trial.draw_sources(trial.data.unlabelled, 5, trial.numerics.generator(1))
    assert drawn.shape == (len(trial.data.unlabelled), 5) and drawn.max() < len(trial.data.labelled)
    assert set(trial.cohort.subjects[trial.data.labelled]) == {"patient001"}


def test_slices_are_cut_to_what_moves_and_masks_are_put_back_where_they_were(settings, folder):
    diastole, systole = np.zeros((2, 3, 80, 100), np.float32)
    diastole[:, 40:52, 60:76] = 1
    systole[:, 43:49, 64:72] = 1
    box = acdc.heart_box(diastole, systole, 0.5)
    row, column, rows, columns = box
    assert rows == columns == 50 and 0 <= row <= 30 and 0 <= column <= 50
    assert abs(row + 25 - 46) < 12 and abs(column + 25 - 68) < 12
    whole = volumes.cut(diastole, box)
    assert whole.shape == (3, 50, 50) and whole.sum() == diastole.sum()
    other = acdc.heart_box(diastole, systole[:, :60], 0.5)  # frames that do not match: around the middle
    assert other == (15, 25, 50, 50)
    wider = volumes.cut(diastole, (-10, -5, 110, 110))
    assert wider.shape == (3, 110, 110) and np.array_equal(wider[:, 10:90, 5:105], diastole)
    cohort = acdc.build(params.Section(settings, window=0.6))
    for number, name in enumerate(cohort.names()):
        masks = torch.ones(int((cohort.volumes == name).sum()), 3, 32, 32)
        there = cohort.restore(number, masks)
        height, width, _ = cohort.shapes[number]
        row, column, rows, columns = cohort.boxes[number]
        assert there.shape[2:] == (height, width)
        inside = torch.zeros(height, width)
        inside[max(row, 0) : row + rows, max(column, 0) : column + columns] = 1
        assert torch.allclose(there[0, 0], inside)


def test_the_real_acdc_data():
    folder = (params.ROOT / params.load(cohort="acdc").acdc.folder).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    few = {"train": 1, "validation": 1, "test": 1}
    cohort = acdc.build(params.Section(folder=str(folder), external="", size=96, window=0, patients=few))
    assert set(cohort.subjects) == {acdc.SPLIT[split][0] for split in few} and len(cohort.names()) == 6
    for name in cohort.names():
        marked = cohort.labels[cohort.volumes == name]
        assert set(np.unique(marked)) == {0, 1, 2, 3} and 0.01 < (marked > 0).mean() < 0.2


def test_the_notebooks_run_on_volumes_and_write_what_the_pipeline_declares(tmp_path, monkeypatch):
    """From the files of ten made-up patients to Table 1 and Figure 2, with CCT-R, at scale smoke."""
    chosen = {"train": 6, "validation": 2, "test": 2}
    for k, patient in enumerate(name for split, count in chosen.items() for name in acdc.SPLIT[split][:count]):
        for frame in (1, 9):
            write(tmp_path / "acdc", patient, frame, *heart(10 * k + frame, slices=3))
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv(
        "JOINT_SET",
        f"scale=smoke,cohort=acdc,rate=17,acdc.folder={tmp_path / 'acdc'},cctr.recipes=[strong]",
    )
    peers = [("12_peers", {"stage": stage}) for stage in params.load().strong.stages]
    for number, values in (
        ("01_data", {}),
        ("02_pretrain_segmentation", {}),
        ("03_pretrain_registration", {"recipe": "paper"}),
        ("03_pretrain_registration", {"recipe": "strong"}),
        ("04_joint_training", {}),
        ("05_mean_teacher", {}),
        ("06_joint_plus", {}),
        ("07_cctr", {}),
        *peers,
        ("08_evaluation", {}),
        ("09_table1", {}),
        ("10_figure2", {}),
    ):
        notebooks.run(number, values)
    results = tmp_path / "out" / "results" / "acdc"
    stages = YAML(typ="safe").load((params.ROOT / "dvc.yaml").read_text())["stages"]
    declared = {
        Path(path)
        for stage in stages.values()
        for kind in ("outs", "metrics", "plots")
        for output in stage.get(kind, [])
        for path in (output if isinstance(output, dict) else [output])
    }
    wanted = {path.name.replace("${item.recipe}", "strong") for path in declared if path.parts[:2] == RESULTS}
    assert len(wanted) > 20 and wanted <= {file.name for file in results.iterdir()} | {"${rate}-seed_${seed}"}
    table = pd.read_csv(results / "table1.csv")
    assert set(table["method"]) == {
        "fs",
        "mt",
        "registration",
        "joint",
        "combined",
        "fs+elastic",
        "bcp",
        "joint+",
        "cctr",
        "cctr-b",
        "classical",
    }
    assert set(pd.read_csv(results / "rounds.csv")["stage"]) == {"joint", "cctr", "cctr-b"}
    assert set(table["class"]) == {"mean", "right ventricle", "myocardium", "left ventricle"}
    quality = pd.read_csv(results / "correspondence-strong.csv", index_col="labels")
    assert list(quality.index[:2]) == ["before registration", "warped labels"] and (quality["volumes"] == 10).all()
    assert len(quality) == 5
