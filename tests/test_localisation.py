"""Where the structure is small in a scan: a coarse view finds its region, and results go back onto the whole scan."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from test_own import cases_of, settings_for
from test_views import untrained

from lib import DataError
from lib.cohorts.reading import read_volume, upright_slices
from lib.runs.files import read_lines
from lib.scans import localisation
from lib.scans import segment as own
from lib.scans.networks.model_file import load_model, save_model
from lib.scans.networks.training import TooThin
from lib.scans.progress import Progress
from lib.scans.reading.folder import Case, read_case, write_scan
from lib.scans.reading.planning import plans_of
from lib.scans.reading.region import joined, part_of, region_around, region_of

AFFINE = np.array([[0, -1.0, 0, 40], [2.0, 0, 0, -30], [0, 0, -3.0, 20], [0, 0, 0, 1]])  # stored as neither RAS nor LPS


def small_ball(seed, sides=(160, 144, 2)):
    """A bright ball of 32 pixels in dim noise, somewhere in a large scan."""
    rng = np.random.default_rng(seed)
    rows, columns, _ = np.mgrid[tuple(map(slice, sides))]
    labels = (np.hypot(rows - rng.uniform(60, 110), columns - rng.uniform(50, 100)) < 16).astype(np.uint8)
    return (500.0 * labels + 60 * rng.random(sides)).astype(np.int16), labels


def fill_large(folder, cases=4, labelled=2):
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for k in range(cases):
        image, labels = small_ball(k)
        nib.save(nib.Nifti1Image(image, AFFINE), folder / "images" / f"case {k}.nii.gz")
        if k < labelled:
            nib.save(nib.Nifti1Image(labels, AFFINE), folder / "masks" / f"case {k}.nii.gz")
    return folder


def dsc(folder, k):
    mask = np.asarray(nib.load(folder / "out" / f"case {k}_mask.nii.gz").dataobj) > 0
    truth = small_ball(k)[1] > 0
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_region_goes_back_to_where_it_came_from(tmp_path, axis):
    image = np.random.default_rng(0).integers(1, 90, (7, 6, 5)).astype(np.int16)
    nib.save(nib.Nifti1Image(image, AFFINE), tmp_path / "a.nii.gz")
    volume, grid = read_volume(tmp_path / "a.nii.gz", axis)
    region = (2, 5), (1, 7), (0, 4)
    case = Case("a", tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", region=region)
    (slices,), labels, seen = read_case(case, axis)
    assert slices.shape == labels.shape == seen.slices and seen.region == region == case.grid(axis).region
    assert np.array_equal(slices, upright_slices(part_of(volume, region), axis))
    for to in range(3):
        assert seen.along(to).slices == read_case(case, to)[0][0].shape
    write_scan(labels, seen, tmp_path / "b.nii.gz")
    found, on = read_volume(tmp_path / "b.nii.gz")
    expected = np.zeros_like(volume)
    part_of(expected, region)[...] = part_of(volume, region)
    assert np.array_equal(found, expected)
    assert on.shape == grid.shape and np.allclose(on.affine, grid.affine)


def test_every_channel_is_cut_to_the_region(tmp_path):
    files = [tmp_path / f"a_{number}.nii.gz" for number in range(2)]
    for number, file in enumerate(files):
        nib.save(nib.Nifti1Image(small_ball(number, (20, 18, 4))[0], AFFINE), file)
    region = (3, 15), (2, 18), (1, 3)
    channels, labels, seen = read_case(Case("a", files[0], None, (files[1],), region))
    assert labels is None and len(channels) == 2
    for channel, file in zip(channels, files):
        assert channel.shape == seen.slices == (2, 16, 12)
        assert np.array_equal(channel, upright_slices(part_of(read_volume(file)[0], region), 2))


def test_a_region_has_a_margin_and_leaves_strays_out():
    marked = np.zeros((100, 50, 10), bool)
    marked[40:60, 10:20, 2:8] = True
    marked[99, 49, 9] = True  # one of 1,201 voxels, far off
    assert region_around(marked, (1, 1, 1), 0, 0.005) == ((35, 65), (7, 23), (0, 10))
    assert region_around(marked, (1, 1, 4), 8, 0.005) == ((32, 68), (2, 28), (0, 10))
    assert region_around(marked, (1, 1, 1), 0) == ((25, 100), (0, 50), (0, 10))
    assert region_around(np.zeros((4, 4, 4), bool), (1, 1, 1), 8) == ()
    assert joined((), ((1, 3), (2, 4)), ((2, 5), (0, 3))) == ((1, 5), (0, 4)) and joined((), ()) == ()


def test_a_small_label_far_off_and_a_thin_end_lie_in_the_region_of_a_drawn_scan(tmp_path):
    labels = np.zeros((160, 144, 20), np.uint8)
    labels[50:100, 40:90, 4:14] = 1
    labels[100:140, 60, 8] = 1  # 40 of 25,040 voxels
    labels[10:14, 130:134, 18] = 7
    labels[0, 0, 0] = 255  # not drawn
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "a.nii.gz")
    region = region_of(tmp_path / "a.nii.gz", 0, undrawn=255)
    volume, _ = read_volume(tmp_path / "a.nii.gz")
    kept, every = part_of(volume, region), volume[volume != 255]
    assert (kept == 7).sum() == (every == 7).sum() == 16 and (kept == 1).sum() == (every == 1).sum()
    trimmed = part_of(volume, region_of(tmp_path / "a.nii.gz", 0, 255, strays=0.005))
    assert (trimmed == 7).sum() == 16 and (trimmed == 1).sum() < (every == 1).sum()  # every label by itself


def test_a_scan_in_which_nothing_is_found_does_not_make_the_pixels_of_the_others_coarser(tmp_path, monkeypatch):
    settings = settings_for(fill_large(tmp_path), monkeypatch, size=48)
    cases = [case._replace(region=((30, 90), (50, 110), (0, 2))) for case in cases_of(settings)]
    assert plans_of(settings.folder, [*cases[:3], cases[3]._replace(region=())]) == plans_of(settings.folder, cases)


def test_slices_along_the_left_right_axis_are_not_mirrored_in_the_coarse_view_either(tmp_path, monkeypatch):
    settings = settings_for(fill_large(tmp_path), monkeypatch, size=48, symmetric=True)
    symmetric = lambda: (
        localisation.coarse_settings(settings, cases_of(settings), tmp_path / "localisation").folder.symmetric
    )
    assert symmetric()
    settings.folder["axis"] = 0
    assert not symmetric() and settings.folder.symmetric


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(folder, stages as the display was told of them: pairs of the sum of their parts and ``later``, cases.csv)."""
    folder, stages = fill_large(tmp_path_factory.mktemp("large")), []

    def begin(self, parts, stage="", later=0, begin=Progress.begin):
        stages.append((sum(parts.values()), later))
        begin(self, parts, stage, later)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "begin", begin)
        settings = settings_for(folder, patch, size=48)
        return folder, stages, own.segment_folder(settings)


def test_one_display_shows_both_stages_and_foresees_the_second(found):
    (_, foreseen), (second, nothing) = found[1]
    assert foreseen == pytest.approx(second, rel=0.3) and nothing == 0


def test_a_small_structure_is_found_and_then_seen_in_finer_pixels(found, monkeypatch):
    folder, _, table = found
    assert (table["status"] == "done").all() and (table["of_slices"] == 2).all()
    model = load_model(folder / "out" / "model.safetensors")
    assert max(model.plans[0].spacing) < 3 and min(model.localiser.plans[0].spacing) > 6
    for k in range(4):
        assert dsc(folder, k) > 0.8
        for what in ("mask", "confidence"):
            file = nib.load(folder / "out" / f"case {k}_{what}.nii.gz")
            assert file.shape == (160, 144, 2) and np.allclose(file.affine, AFFINE)
    assert not table["note"].str.contains(localisation.NOT_FOUND, regex=False).any()
    whole = settings_for(folder, monkeypatch, size=48, region="whole", output=str(folder / "whole"))
    own.segment_folder(whole)
    assert load_model(folder / "whole" / "model.safetensors").localiser is None
    assert not (folder / "whole" / "work" / "localisation").exists()


def test_a_model_file_holds_its_localiser_and_applies_it(found, tmp_path, monkeypatch):
    folder = found[0]
    file = folder / "out" / "model.safetensors"
    model = load_model(file)
    save_model(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    settings = settings_for(folder, monkeypatch, masks="", model=str(file), output=str(folder / "applied"))
    own.segment_folder(settings)
    for k in (2, 3):
        own_mask, again = (folder / out / f"case {k}_mask.nii.gz" for out in ("out", "applied"))
        assert own_mask.read_bytes() == again.read_bytes()
    raw = bytearray(file.read_bytes())
    raw[-8] ^= 1  # of the last weight
    (tmp_path / "spoilt.safetensors").write_bytes(raw)
    with pytest.raises(DataError, match="has changed since it was written"):
        load_model(tmp_path / "spoilt.safetensors")
    some = settings_for(folder, monkeypatch, masks="", model=str(file), slices=[0, 0])
    with pytest.raises(DataError, match="a region is to be found: set it to all"):
        own.segment_folder(some)


def test_finished_cases_are_not_found_or_segmented_again(found, monkeypatch):
    folder, _, table = found
    logs = [folder / "out" / "work" / part / "cases.jsonl" for part in (".", "localisation/work")]
    before = [log.read_bytes() for log in logs]
    again = own.segment_folder(settings_for(folder, monkeypatch, size=48))
    assert again.equals(table) and [log.read_bytes() for log in logs] == before
    assert set(read_lines(logs[0], "case")) == {f"case {k}" for k in range(4)}


def test_whether_regions_are_found_follows_from_how_small_the_structure_is(tmp_path, monkeypatch):
    folder = fill_large(tmp_path)
    settings = settings_for(folder, monkeypatch, size=320)
    assert not localisation.worth_localising(settings.folder, cases_of(settings))  # nothing is made coarser
    settings.folder["size"] = 48
    assert localisation.worth_localising(settings.folder, cases_of(settings))
    assert not localisation.worth_localising(settings.folder, [case._replace(mask=None) for case in cases_of(settings)])
    for changes, expected in (
        ({}, True),
        ({"region": "whole"}, False),
        ({"slices": "largest"}, False),
        ({"size": 320, "region": "localised"}, True),
    ):
        own_settings = settings_for(folder, monkeypatch, **{"size": 48, **changes})
        assert localisation.is_wanted(own_settings.folder, cases_of(settings), None) == expected
    for changes, message in (
        ({"region": "small"}, "folder.region is 'small', not one of auto, localised, whole"),
        ({"region": "localised", "slices": [0, 1]}, "a region is to be found: set it to all"),
    ):
        with pytest.raises(DataError, match=message):
            localisation.is_wanted(settings_for(folder, monkeypatch, **changes).folder, cases_of(settings), None)


@pytest.mark.parametrize("size, coarse", [(96, 48), (48, 48)])
def test_a_coarse_view_is_not_so_coarse_that_the_structure_is_lost(tmp_path, monkeypatch, size, coarse):
    """Slices have 320 mm, the ball 32 and 64 mm, and half as much again with its margin."""
    folder = fill_large(tmp_path)
    settings = settings_for(folder, monkeypatch, size=size)
    found = localisation.coarse_settings(settings, cases_of(settings), tmp_path / "localisation")
    assert found.folder.size == coarse and settings.folder.size == size
    assert found.folder.output == str(tmp_path / "localisation") and settings.folder.output == str(folder / "out")


def test_where_a_coarse_view_shows_nothing_of_what_is_drawn_whole_scans_are_seen(tmp_path, monkeypatch):
    folder = fill_large(tmp_path)
    settings = settings_for(folder, monkeypatch, size=48)

    def run(*_):
        raise TooThin("it is too thin")

    cases = cases_of(settings)
    assert localisation.localise(settings, cases, None, tmp_path / "localisation", run) == (cases, {}, None)


def test_a_region_holds_what_is_drawn_and_nothing_found_is_the_whole_scan(tmp_path, monkeypatch):
    folder = fill_large(tmp_path, labelled=1)
    settings = settings_for(folder, monkeypatch, size=96)
    plan = {"space": "slices", "axis": 2, "spacing": [4.0, 4.0], "canvas": [48, 80], "root": 2}

    def run(coarse, *_):
        """Marks a corner of cases 0 and 1, and nothing of case 2; case 3 fails."""
        assert coarse.folder.size == 48 and coarse.folder.space == "slices" and not coarse.folder.dicom_seg
        out = Path(coarse.folder.output)
        out.mkdir(parents=True)
        for k in range(3):
            marked = np.zeros((160, 144, 2), np.uint8)
            marked[: 20 * (k < 2), :20] = 1
            nib.save(nib.Nifti1Image(marked, AFFINE), out / f"case {k}_mask.nii.gz")
        save_model(untrained([plan]), out / "model.safetensors")
        status = ["done", "done", "done", "failed"]
        return pd.DataFrame({"case": [f"case {k}" for k in range(4)], "status": status})

    cases, notes, localiser = localisation.localise(settings, cases_of(settings), None, tmp_path / "localisation", run)
    assert notes == {"case 2": localisation.NOT_FOUND} and localiser.plans[0].spacing == (4, 4)
    volume, _ = read_volume(cases[0].mask)
    drawn, corner, *others = [case.region for case in cases]
    assert others == [(), ()]
    # Canonical: x from stored columns, turned over, 1 mm; y from stored rows, 2 mm. 2 pixels of 4 mm are the margin.
    assert corner == ((144 - 20 - 8, 144), (0, 20 + 5), (0, 2))
    assert part_of(volume, drawn).sum() == volume.sum() and all(
        first[0] <= second[0] and first[1] >= second[1] for first, second in zip(drawn, corner)
    )
