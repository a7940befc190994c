"""What networks see of a folder: slices or volumes, their spacing and canvas; there and back again."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_own import settings_for, taken_in

from lib import DataError
from lib.cohorts.reading import turned, upright_slices
from lib.compute import Numerics
from lib.metrics import dice
from lib.models import ResidualUNet
from lib.runs import params
from lib.scans.networks.applying import FAINT, FEW, Confidence, masks_of, soft_masks
from lib.scans.networks.measuring import Space
from lib.scans.networks.model_file import Model
from lib.scans.reading.folder import find_cases
from lib.scans.reading.planning import SEVERAL, Plan, plans_of


def folder_of(folder, scans, drawn=1):
    """Made-up scans, each (shape, mm), the first ones with masks."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for k, (shape, mm) in enumerate(scans):
        image = np.random.default_rng(k).random(shape).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.diag([*mm, 1.0])), folder / "images" / f"case_{k}.nii.gz")
        if k < drawn:
            nib.save(
                nib.Nifti1Image(np.ones(shape, np.uint8), np.diag([*mm, 1.0])), folder / "masks" / f"case_{k}.nii.gz"
            )
    return folder


def plan_for(folder, scans, monkeypatch, drawn=1, **changes):
    options = settings_for(folder_of(folder, scans, drawn), monkeypatch, size=128, **changes).folder
    (plan,) = plans_of(options, find_cases(options.images, options.masks))
    return plan


@pytest.mark.parametrize(
    ("shape", "mm", "space", "why"),
    [
        ((35, 50, 36), (1, 1, 1), "volumes", "small, and slices as close as pixels"),
        ((64, 64, 16), (1, 1, 2), "volumes", "slices twice as far apart"),
        ((64, 64, 16), (1, 1, 4), "slices", "slices too far apart"),
        ((64, 64, 9), (1, 1, 1), "slices", "too few slices"),
        ((160, 160, 100), (1, 1, 1), "slices", "too large to be seen whole"),
    ],
)
def test_volumes_are_taken_whole_where_they_are_deep_close_and_small(tmp_path, monkeypatch, shape, mm, space, why):
    assert plan_for(tmp_path, [(shape, mm)] * 2, monkeypatch).space == space, why


def test_spacing_is_the_median_of_what_is_labelled_and_the_canvas_holds_the_others(tmp_path, monkeypatch):
    scans = [((30, 40, 32), (1, 1, 1)), ((30, 40, 32), (1, 1, 1)), ((22, 30, 24), (2, 2, 2))]
    plan = plan_for(tmp_path, scans, monkeypatch, drawn=2)
    assert plan.space == "volumes" and plan.spacing == (1, 1, 1)
    assert all(room >= side for room, side in zip(plan.canvas, (48, 60, 44)))  # slices, rows, columns of the last
    assert plan.canvas == (48, 64, 48) and plan.title == "whole volumes of 48 x 64 x 48 voxels of 1 x 1 x 1 mm"


def test_slices_keep_their_proportions_and_large_ones_become_coarser(tmp_path, monkeypatch):
    plan = plan_for(tmp_path, [((256, 100, 3), (1, 1, 5))], monkeypatch)
    assert plan == Plan("slices", 2, (2.0, 2.0), (64, 128))  # rows are 100 mm, columns 256


def test_volumes_that_are_asked_for_become_coarser_until_they_fit(tmp_path, monkeypatch):
    plan = plan_for(tmp_path, [((128, 128, 32), (1, 1, 4))], monkeypatch, space="volumes")
    assert np.prod(plan.canvas) <= 150_000 and plan.spacing[0] == pytest.approx(4 * plan.spacing[1])
    assert plan.strides[0] == (1, 2, 2)  # slices lie far apart: their axis waits
    with pytest.raises(DataError, match="holds single slices: set folder.space"):
        plan_for(tmp_path / "flat", [((64, 64, 1), (1, 1, 1))], monkeypatch, space="volumes")


def test_views_are_slices_of_all_directions_of_the_same_scans(tmp_path, monkeypatch):
    scans = [((32, 24, 20), (1, 1, 2))]
    folder = settings_for(folder_of(tmp_path, scans), monkeypatch).folder
    plans = lambda **changes: plans_of(params.Section({**folder, **changes}), find_cases(folder.images, folder.masks))
    found = plans(space="views")
    assert found == sum((plans(space="slices", axis=axis) for axis in (2, 0, 1)), [])
    assert [plan.view for plan in plans(space="views", axis=1)] == ["coronal", "sagittal", "axial"]
    assert found[1].title == "sagittal slices of 32 x 32 pixels of 1.25 x 1.25 mm"
    several = settings_for(folder_of(tmp_path / "several", scans * 5, drawn=5), monkeypatch).folder
    cases = find_cases(several.images, several.masks)
    for count, views in (SEVERAL, ["axial", "sagittal", "coronal"]), (SEVERAL - 1, ["volumes"]):
        drawn = [case._replace(mask=case.mask if k < count else None) for k, case in enumerate(cases)]
        assert [plan.view for plan in plans_of(several, drawn)] == views
    with pytest.raises(DataError, match="holds single slices: set folder.space"):
        plan_for(tmp_path / "flat", [((64, 64, 1), (1, 1, 1))], monkeypatch, space="views")


def test_the_mask_of_several_networks_is_the_mean_of_theirs_on_the_grid_of_the_scan():
    """Also where they see volumes and slices, of different directions."""
    plans = [
        Plan("slices", 2, (1.0, 1.0), (32, 32)),
        Plan("slices", 0, (1.0, 0.9), (48, 32)),
        Plan("slices", 1, (1.0, 0.9), (48, 32)),
        Plan("volumes", 2, (2.0, 2.0, 2.0), (16, 16, 16)),
    ]
    networks = [ResidualUNet(2, "instance", 2, plan.strides).eval() for plan in plans]
    planned = [{name: getattr(plan, name) for name in ("space", "axis", "spacing", "canvas")} for plan in plans]
    about = {"pseudo_masks": {"n": 2, "rotation": 5, "shift": 0, "contrast": 0.1}, "symmetric": False}
    about |= {"classes": ["one", "two"]}
    grid = Space((35, 24, 20), (0.9, 1.2, 1.1), axis=2)
    stack = np.random.default_rng(0).random(grid.slices, np.float32)
    images = [
        plan.images(turned(stack, 2, plan.axis), grid.along(plan.axis))[:, None].astype(np.float32) for plan in plans
    ]
    numerics = Numerics("cpu", "float32").sharing(1 / 24)  # eleven slices at a time, which FEW does not divide
    assert FEW % numerics.batch(images[0])

    def by(*which, confidence):
        model = Model([networks[k] for k in which], {**about, "plans": [planned[k] for k in which]})
        own = grid.along(plans[which[0]].axis)
        return list(masks_of(model, [images[k] for k in which], own, numerics, confidence))

    whole, alone, each = Confidence(), Confidence(), []
    together = by(0, 1, 2, 3, confidence=whole)
    assert [len(part) for part in together] == [16, 16, 3] and torch.cat(together).shape == (35, 2, 24, 20)
    alone.add(torch.cat(together))
    assert whole.value == pytest.approx(alone.value, abs=1e-5)
    for k, plan in enumerate(plans):
        masks = torch.cat(by(k, confidence=Confidence())).numpy()
        each.append(np.stack([turned(masks[:, c], plan.axis, 2) for c in range(2)], axis=1))
    assert np.allclose(torch.cat(together), np.mean(each, axis=0), atol=1e-6)


@given(st.integers(0, 2), st.integers(0, 2))
def test_slices_that_are_turned_are_those_of_the_other_direction(axis, to):
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    stack = turned(upright_slices(volume, axis), axis, to)
    assert np.array_equal(stack, upright_slices(volume, to)) and np.shares_memory(stack, volume)
    space = Space(upright_slices(volume, axis).shape, upright_slices(volume, axis).shape, axis)
    assert space.along(to) == Space(stack.shape, stack.shape, to)


def test_confidence_is_the_dsc_that_true_masks_drawn_by_the_probabilities_have_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(1, 2, 12, 40, 40, generator=generator) ** 4 / 2
    masks[:, 0, 2:9, 5:30, 5:20] = 0.8
    masks[:, 1, 2:9, 5:30, 22:35] = 0.65
    masks = masks * (masks > FAINT)
    confidence = Confidence()
    for part in masks[0].movedim(0, 1).split(5):
        confidence.add(part)
    dsc = []
    for _ in range(100):
        drawn = torch.rand(masks[:, :1].shape, generator=generator)
        truth = torch.cat((drawn < masks[:, :1], (drawn >= masks[:, :1]) & (drawn < masks.sum(1, keepdim=True))), 1)
        dsc.append(float(dice(masks, truth).mean()))
    assert confidence.value == pytest.approx(np.mean(dsc), abs=0.002) and 0.5 < confidence.value < 0.9


def test_confidence_leaves_out_classes_that_are_not_marked_and_is_0_where_none_is():
    masks, confidence, nothing = torch.zeros(2, 2, 8, 8), Confidence(), Confidence()
    masks[:, 0, 2:5] = 0.75
    masks[:, 1] = 0.1
    confidence.add(masks)
    assert confidence.value == pytest.approx(2 * 0.75 / 1.75)
    nothing.add(0.3 * (masks > 0))
    assert nothing.value == 0


def test_confidence_of_one_network_is_that_of_its_own_pixels():
    """On the finer grid of the scan edges are smoother, on which calibration knows nothing."""
    plan = Plan("slices", 2, (4.0, 4.0), (16, 16))
    network = ResidualUNet(1, "instance", 2, plan.strides).eval()
    network.segment = lambda images: (images > 0.5).float()
    about = {"pseudo_masks": {"n": 1, "rotation": 0, "shift": 0, "contrast": 0}, "symmetric": False}
    about |= {"plans": [{"space": "slices", "axis": 2, "spacing": [4.0, 4.0], "canvas": [16, 16]}]}
    images = np.zeros((3, 1, 16, 16), np.float32)
    images[..., 4:9, 6:10] = 1
    whole, grid = Confidence(), SimpleNamespace(slices=(3, 64, 64), spacing=(2.0, 1.0, 1.0))
    (masks,) = masks_of(Model([network], about), [images], grid, Numerics("cpu", "float32"), whole)
    assert whole.value == 1 and masks.shape == (3, 1, 64, 64) and ((masks > 0.1) & (masks < 0.9)).any()


def test_a_single_slice_among_volumes_is_left_out_and_named(tmp_path, monkeypatch):
    scans = [((20, 24, 16), (1, 1, 1))] * 2 + [((20, 24, 1), (1, 1, 1))]
    settings = settings_for(folder_of(tmp_path, scans), monkeypatch)
    intake, _ = taken_in(settings, tmp_path)
    assert [case.name for case in intake.cases] == ["case_0", "case_1"]
    assert "case_2.nii.gz is a single slice among volumes: leave it out" in intake.failures["case_2"]


def test_a_scan_much_larger_than_the_canvas_is_seen_through_windows(tmp_path, monkeypatch):
    """In little memory: what the networks see at once is never larger than a few canvases; the mask is whole."""
    torch.manual_seed(0)
    plan = Plan("volumes", 2, (1.0, 1.0, 1.0), (16, 16, 16))
    network, seen = ResidualUNet(1, "instance", 2, plan.strides).eval(), []
    about = {"pseudo_masks": {"n": 1, "rotation": 0, "shift": 0, "contrast": 0}, "symmetric": False}
    monkeypatch.setattr(network, "segment", lambda images: seen.append(images[0].numel()) or (images > 0.5).float())
    image = np.zeros((1, 1, 40, 48, 33), np.float32)
    image[..., 5:30, 8:40, 3:30] = 1
    (soft,) = soft_masks(network, plan, about, image, Numerics("cpu", "float32"))
    assert max(seen) == 16**3 and torch.equal((soft > 0.5).float(), torch.as_tensor(image))
    (soft,) = soft_masks(network, plan, about, image[..., :20, :20, :20], Numerics("cpu", "float32"))
    assert seen[-1] == 20**3 and soft.shape == (1, 1, 20, 20, 20)


sides = st.integers(1, 40)
spacings = st.floats(0.4, 4)


@given(st.tuples(sides, sides, sides), st.tuples(spacings, spacings, spacings), st.sampled_from(["slices", "volumes"]))
def test_what_goes_onto_the_canvas_comes_back_to_its_place(shape, mm, space):
    """A smooth image is, within its canvas, the same after going there and back; nothing is turned or moved."""
    axes = 2 if space == "slices" else 3
    plan = Plan(space, 2, (1.0,) * axes, (16,) * axes)
    grid = SimpleNamespace(slices=shape, spacing=mm)
    places = np.meshgrid(*(np.linspace(0, 1, side) for side in shape), indexing="ij")
    stack = np.float32(sum((k + 1) * place for k, place in enumerate(places)) / 6)
    images = plan.images(stack, grid)
    assert images.shape[1:] == tuple(max(16, side) for side in plan.sides(grid))
    parts = list(plan.restored(torch.as_tensor(images)[:, None], grid, 3))
    assert all(len(part) == 3 for part in parts[:-1])
    back = torch.cat(parts)[:, 0].numpy()
    assert back.shape == shape
    coarse = max(max(1, to / side) for side, to in zip(mm[-axes:], plan.spacing)) / min(shape[-axes:])
    assert np.abs(back - stack).max() <= 0.05 + 1.5 * coarse


def test_labels_follow_their_image_and_nothing_lies_beside_the_scan():
    """A label that fills the scan fills it on the canvas, and no more; every value stays itself."""
    stack = np.full((4, 10, 6), 7, np.uint8)
    stack[:, 5:] = 3
    grid = SimpleNamespace(slices=stack.shape, spacing=(1.0, 1.0, 1.0))
    labels = Plan("slices", 2, (1.0, 1.0), (16, 16)).labels(stack, grid)
    assert (labels[:, 3:8, 5:11] == 7).all() and (labels[:, 8:13, 5:11] == 3).all() and (labels > 0).sum() == stack.size


def test_a_volume_is_restored_slice_by_slice_as_it_would_be_at_once():
    plan = Plan("volumes", 2, (2.0, 2.0, 2.0), (8, 16, 16))
    for slices in (16, 5, 1):  # finer, coarser and one
        grid = SimpleNamespace(slices=(slices, 29, 31), spacing=(16.0 / slices, 32 / 29, 32 / 31))
        soft = torch.rand(1, 3, *plan.sides(grid), generator=torch.Generator().manual_seed(0))
        canvas = torch.zeros(1, 3, *plan.canvas)
        first = [(room - side) // 2 for room, side in zip(plan.canvas, soft.shape[2:])]
        canvas[(..., *(slice(start, start + side) for start, side in zip(first, soft.shape[2:])))] = soft
        at_once = torch.nn.functional.interpolate(soft, size=grid.slices, mode="trilinear", align_corners=False)
        found = torch.cat(list(plan.restored(canvas, grid, 4)))
        assert torch.allclose(found, at_once[0].movedim(1, 0), atol=1e-5)
