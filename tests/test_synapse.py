import h5py
import numpy as np
import pytest
from test_volumes import refused

from lib.cohorts import synapse
from lib.cohorts.splitting import check_split
from lib.runs import params


def organs(seed, slices):
    rng = np.random.default_rng(seed)
    labels = np.zeros((slices, 24, 24), np.uint8)
    for value in range(1, 9):
        row, column = divmod(value - 1, 3)
        labels[:, 7 * row + 1 : 7 * row + 6, 7 * column + 1 : 7 * column + 6] = value
    return (labels / 8 + 0.05 * rng.random(labels.shape)).astype(np.float32), labels


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "train_npz").mkdir()
    (tmp_path / "test_vol_h5").mkdir()
    for case in (5, 6, 7):
        image, labels = organs(case, 3 + case % 2)
        for k in range(len(image)):
            np.savez(tmp_path / "train_npz" / f"case{case:04d}_slice{k:03d}.npz", image=image[k], label=labels[k])
    with h5py.File(tmp_path / "test_vol_h5" / "case0001.npy.h5", "w") as file:
        file["image"], file["label"] = organs(1, 5)
    return params.Section(folder=str(tmp_path), external="", size=16, validation=1)


def test_slices_become_volumes_and_cases_keep_their_order(settings):
    cohort = synapse.build(settings)
    assert list(cohort.names()) == ["case0005", "case0006", "case0007", "case0001"]
    assert [len(cohort.index(split)) for split in ("train", "validation", "test")] == [4 + 3, 4, 5]
    assert cohort.images.shape[1:] == (16, 16) and len(cohort.classes) == 8
    assert np.array_equal(cohort.original(3), organs(1, 5)[1])
    assert set(cohort.subjects[cohort.order(1)[: cohort.count(50)]]) == {"case0005"}
    check_split(cohort.subjects, cohort.split)


def test_external_cases_are_only_tested(settings, tmp_path):
    (tmp_path / "further").mkdir()
    for case in (1, 8):  # the first is tested already
        with h5py.File(tmp_path / "further" / f"case{case:04d}.npy.h5", "w") as file:
            file["image"], file["label"] = organs(case, 3)
    cohort = synapse.build(params.Section(settings, external=str(tmp_path / "further")))
    assert set(cohort.subjects[cohort.index("external")]) == {"case0008"}
    assert np.array_equal(cohort.original(len(cohort.names()) - 1), organs(8, 3)[1])


def spoil_slice(folder, **changes):
    file = folder / "train_npz" / "case0006_slice001.npz"
    np.savez(file, **{**dict(np.load(file)), **changes})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: (f / "train_npz" / "case0006_slice001.npz").write_bytes(b"PK"),
            "case0006_slice001.npz does not hold",
        ),
        (lambda f: np.savez(f / "train_npz" / "case0006_slice001.npz", image=np.zeros((24, 24))), "does not hold"),
        (lambda f: spoil_slice(f, label=np.zeros((24, 20))), "but a label of"),
        (lambda f: spoil_slice(f, label=np.full((24, 24), 11)), r"holds the values \[11\]"),
        (lambda f: spoil_slice(f, image=np.full((24, 24), np.nan)), "NaN"),
        (lambda f: spoil_slice(f, image=np.zeros((20, 20)), label=np.zeros((20, 20))), "differ in shape"),
        (lambda f: (f / "test_vol_h5" / "case0001.npy.h5").write_bytes(b"HDF"), "case0001.npy.h5 does not hold"),
        (lambda f: (f / "test_vol_h5" / "case0001.npy.h5").unlink(), "holds no case.*register at"),
    ],
)
def test_bad_input_is_named(settings, tmp_path, spoil, words):
    spoil(tmp_path)
    refused(synapse.build, settings, words)


def test_too_few_cases_and_a_missing_folder_say_what_to_do(settings, tmp_path):
    refused(synapse.build, params.Section({**settings, "validation": 3}), "lower synapse.validation")
    refused(synapse.build, params.Section({**settings, "folder": str(tmp_path / "nowhere")}), "register at")
