import gzip

import nibabel as nib
import numpy as np
import pytest

from lib import DataError
from lib.cohorts import hippocampus, load_cohort
from lib.cohorts.cohort import Cohort, min_max, one_hot
from lib.cohorts.reading import on_canvas, read_volume
from lib.cohorts.splitting import check_split, split_by_subject
from lib.runs import params


def settings(folder, **changes):
    section = params.load().hippocampus
    return params.Section(section, folder=str(folder), subjects=None, **changes)


def write_case(folder, name, image=None, mask=None, affine=None, mask_affine=None):
    rng = np.random.default_rng(len(name))
    image = rng.random((30, 40, 24)) * 100 if image is None else image
    if mask is None:
        mask = np.zeros((30, 40, 24), np.uint8)
        mask[10:20, 5:20, 6:18] = 1
        mask[10:20, 20:33, 6:18] = 2
        mask[14, 4, 6] = 1  # makes slice 14 the largest
    affine = np.eye(4) if affine is None else affine
    for part, array, at in (
        ("imagesTr", np.float32(image), affine),
        ("labelsTr", mask, affine if mask_affine is None else mask_affine),
    ):
        (folder / part).mkdir(exist_ok=True, parents=True)
        nib.save(nib.Nifti1Image(array, at), folder / part / f"{name}.nii.gz")


@pytest.fixture
def task(tmp_path):
    for number in range(8):
        write_case(tmp_path, f"hippocampus_{number:03d}")
    return tmp_path


def test_hippocampus_slices_masks_subjects_and_split(task):
    cohort = hippocampus.build(settings(task), seed=1)
    assert cohort.images.shape == (24, 64, 64) and cohort.images.dtype == np.float32
    assert cohort.images.min() == 0 and cohort.images.max() == 1
    assert set(np.unique(cohort.labels)) == {0, 1} and cohort.classes == ("hippocampus",)
    assert cohort.labels.sum(axis=(1, 2)).tolist() == [336, 337, 336] * 8
    check_split(cohort.subjects, cohort.split)


def test_of_the_whole_archive_the_cases_of_the_results_are_taken(tmp_path):
    (tmp_path / "imagesTr").mkdir()
    for name in [*hippocampus.CASES, "hippocampus_002"]:
        (tmp_path / "imagesTr" / f"{name}.nii.gz").touch()
    found, further = hippocampus.chosen_cases(settings(tmp_path))
    assert set(found) == hippocampus.CASES and len(found) == 230 and not further
    (tmp_path / "imagesTr" / "hippocampus_001.nii.gz").unlink()  # another collection
    found, _ = hippocampus.chosen_cases(settings(tmp_path))
    assert len(found) == 230 and "hippocampus_002" in found


def test_an_external_folder_brings_further_cases_that_are_only_tested(task, tmp_path):
    before = hippocampus.build(settings(task), seed=1)
    for number in (1, 9, 10):  # the first is of the cohort
        write_case(tmp_path / "further", f"hippocampus_{number:03d}")
    cohort = hippocampus.build(settings(task, external=str(tmp_path / "further")), seed=1)
    own = cohort.split != "external"
    assert np.unique(cohort.subjects[~own]).tolist() == ["hippocampus_009", "hippocampus_010"]
    for name in ("images", "labels", "subjects", "split"):
        assert np.array_equal(getattr(cohort, name)[own], getattr(before, name))
    with pytest.raises(DataError, match="no case that the cohort does not have already"):
        hippocampus.build(settings(task, external=str(task)), seed=1)
    with pytest.raises(DataError, match="does not exist: `external` names"):
        hippocampus.build(settings(task, external=str(tmp_path / "nowhere")), seed=1)


def test_hippocampus_with_two_classes(task):
    cohort = hippocampus.build(settings(task, classes="two"), seed=1)
    assert set(np.unique(cohort.labels)) == {0, 1, 2} and cohort.classes == ("anterior", "posterior")
    masks = one_hot(cohort.labels, 2)
    assert masks.shape == (24, 2, 64, 64) and (masks.sum(axis=1) == (cohort.labels > 0)).all()


def test_a_flipped_volume_gives_the_same_slices(tmp_path):
    image, mask = np.random.default_rng(0).random((30, 40, 24)), np.zeros((30, 40, 24), np.uint8)
    mask[12:15, 5:30, 4:20] = 1
    for number in range(3):
        write_case(tmp_path / "as_is", f"case_{number}", image, mask)
        write_case(
            tmp_path / "flipped",
            f"case_{number}",
            image[:, ::-1],
            mask[:, ::-1],
            affine=np.array([[1, 0, 0, 0], [0, -1, 0, 39], [0, 0, 1, 0], [0, 0, 0, 1]]),
        )
    first, second = (hippocampus.build(settings(tmp_path / name), seed=1) for name in ("as_is", "flipped"))
    assert np.array_equal(first.images, second.images) and np.array_equal(first.labels, second.labels)


def test_the_same_seed_gives_the_same_bytes(task, tmp_path):
    for name in ("one.npz", "two.npz"):
        hippocampus.build(settings(task), seed=1).save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    again = load_cohort(tmp_path / "one.npz")
    assert again.classes == ("hippocampus",) and again.name == "hippocampus" and again.symmetric is False


def test_missing_unreadable_and_truncated_files(task):
    image = task / "imagesTr" / "hippocampus_003.nii.gz"
    whole = image.read_bytes()
    for contents in (b"not an image", whole[: len(whole) // 2], gzip.compress(b"short"), b""):
        image.write_bytes(contents)
        with pytest.raises(DataError, match=f"hippocampus_003.*{'cannot be read' if contents else 'is empty'}"):
            hippocampus.build(settings(task), seed=1)
    with pytest.raises(DataError, match="gone.nii.gz does not exist"):
        read_volume(task / "gone.nii.gz")


def test_image_without_a_mask(task):
    (task / "labelsTr" / "hippocampus_002.nii.gz").unlink()
    with pytest.raises(DataError, match="labelsTr/hippocampus_002.nii.gz does not exist"):
        hippocampus.build(settings(task), seed=1)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"mask": np.ones((30, 40, 23), np.uint8)}, "shape"),
        ({"mask_affine": np.diag([2, 1, 1, 1])}, "different affines"),
        ({"mask": np.full((30, 40, 24), 7, np.uint8)}, r"holds the values \[7.0\]"),
        ({"image": np.full((30, 40, 24), np.nan)}, "NaN"),
        ({"image": np.full((30, 40, 24), 3.0)}, "constant"),
        ({"mask": np.zeros((30, 40, 24), np.uint8)}, "empty"),
    ],
)
def test_every_bad_case_names_its_file(task, case, words):
    write_case(task, "hippocampus_005", **case)
    with pytest.raises(DataError, match=f"(?s)hippocampus_005.*{words}"):
        hippocampus.build(settings(task), seed=1)


def test_too_few_subjects(tmp_path):
    for number in range(2):
        write_case(tmp_path, f"case_{number}")
    with pytest.raises(DataError, match="2 subjects"):
        hippocampus.build(settings(tmp_path), seed=1)


def test_wrong_layout_and_no_archive(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="imagesTr"):
        hippocampus.build(settings(tmp_path), seed=1)
    monkeypatch.setattr(hippocampus, "URL", (tmp_path / "nothing.tar").as_uri())
    with pytest.raises(DataError, match="hippocampus.folder"):
        hippocampus.build(settings(tmp_path / "missing"), seed=1)


def test_a_subject_in_two_splits():
    subjects, split = np.array(["a", "a", "b"]), np.array(["train", "test", "validation"])
    with pytest.raises(DataError, match="subject a is in the splits test and train"):
        check_split(subjects, split)
    with pytest.raises(DataError, match="test split is empty"):
        check_split(np.array(["a", "b"]), np.array(["train", "validation"]))


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_by_subject_and_in_proportion(seed):
    subjects = np.repeat([f"s{k}" for k in range(230)], 3)
    split = split_by_subject(subjects, {"train": 600, "validation": 20, "test": 200}, seed)
    check_split(subjects, split)
    counts = {name: (split == name).sum() for name in ("train", "validation", "test")}
    assert sum(counts.values()) == 690
    assert abs(counts["test"] - 690 * 200 / 820) <= 3 and abs(counts["validation"] - 690 * 20 / 820) <= 3
    assert (split != split_by_subject(subjects, {"train": 600, "validation": 20, "test": 200}, seed + 1)).any()


def test_the_papers_split_where_there_are_enough_slices():
    subjects = np.repeat([f"s{k}" for k in range(450)], 2)
    split = split_by_subject(subjects, {"train": 600, "validation": 20, "test": 200}, 1)
    assert [(split == name).sum() for name in ("train", "validation", "test", "unused")] == [600, 20, 200, 80]


def test_labelled_images_come_from_distinct_subjects_first(task):
    cohort = hippocampus.build(settings(task), seed=1)
    subjects = len(set(cohort.subjects[cohort.index("train")]))
    order = cohort.order(seed=3)
    assert len(set(cohort.subjects[order[:subjects]])) == subjects
    assert sorted(order) == cohort.index("train").tolist()
    assert cohort.count(100 * subjects / len(order)) == cohort.units(order[:subjects]) == subjects


def test_rates_are_the_papers():
    for slices, counts in ((600, [5, 60, 300, 600]), (489, [5, 49, 244, 489]), (4, [4, 1, 2, 4])):
        empty = np.zeros((slices, 2, 2))
        cohort = Cohort("a", "a", empty, empty, np.arange(slices), np.full(slices, "train"), ("x",), False, 1.0)
        assert [cohort.count(rate) for rate in (1, 10, 50, 100)] == counts


def test_a_constant_slice_is_not_a_division_by_zero():
    assert np.array_equal(min_max(np.full((4, 4), 7.0)), np.zeros((4, 4)))


def test_canvas_centres_pads_and_crops():
    small = on_canvas(np.ones((4, 10)), (8, 8))
    assert small.shape == (8, 8) and small[2:6].sum() == 32 and small[:2].sum() == small[6:].sum() == 0


def test_a_cohort_file_that_is_none(tmp_path):
    with pytest.raises(DataError, match="01_data"):
        load_cohort(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match="not a cohort file"):
        load_cohort(tmp_path / "bad.npz")


def test_the_real_hippocampus_data():
    folder = (params.ROOT / params.load().hippocampus.folder).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    cohort = hippocampus.build(settings(folder), seed=1)
    assert len(set(cohort.subjects)) >= 200 and (cohort.labels.sum(axis=(1, 2)) > 20).all()
    check_split(cohort.subjects, cohort.split)
