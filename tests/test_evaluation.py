import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric
from scipy import ndimage

from lib.metrics import dice, dice_of_groups, harden, hausdorff
from lib.results import evaluation
from lib.runs import params


def squares(*boxes, size=20):
    masks = torch.zeros(len(boxes), 1, size, size)
    for mask, box in zip(masks, boxes):
        if box:
            top, left, side = box
            mask[..., top : top + side, left : left + side] = 1
    return masks


def test_dsc_and_hd_of_a_hand_computed_case():
    truth, prediction = squares((2, 2, 4)), squares((2, 4, 4))  # shifted by two columns: half of each overlaps
    assert float(dice(prediction, truth)) == pytest.approx(0.5)
    assert float(hausdorff(prediction, truth)[0]) == pytest.approx(2)
    assert float(hausdorff(prediction, truth, spacing=(1.0, 3.0))[0]) == pytest.approx(6)


def test_empty_masks():
    truth, prediction = squares(None, (2, 2, 4), None, (2, 2, 4)), squares(None, None, (2, 2, 4), (2, 2, 4))
    assert dice(prediction, truth).ravel().tolist() == [1, 0, 0, 1]
    diagonal = math.hypot(19, 19)
    for distance in hausdorff(prediction, truth):
        assert distance.ravel().tolist() == pytest.approx([0, diagonal, diagonal, 0])
    scores = evaluation.score(prediction, truth, ["square"])
    assert scores["empty"].tolist() == [False, True, True, False]


def hausdorff_of_two(first, second, spacing=None):
    """HD and HD95 of two masks, by scipy: from every pixel of an outline to the nearest of the other one."""
    first, second = (np.asarray(mask, bool) for mask in (first, second))
    outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (first, second)]
    to = [ndimage.distance_transform_edt(~outline, sampling=spacing) for outline in outlines]
    ways = to[1][outlines[0]], to[0][outlines[1]]
    return max(way.max() for way in ways), max(np.percentile(way, 95) for way in ways)


def blobs(count, *space):
    """Smooth random masks ``(count, 1, *space)``, and the same moved by a few pixels and a little larger."""
    rng = np.random.default_rng(0)
    smooth = np.stack([ndimage.gaussian_filter(rng.standard_normal(space), 2.5) for _ in range(count)])[:, None]
    level = np.quantile(smooth, 0.6)
    return torch.as_tensor(smooth > level), torch.as_tensor(np.roll(smooth, 2, -1) > 0.9 * level)


@pytest.mark.parametrize(
    ("space", "spacing"),
    [((36, 36), None), ((36, 30), (0.8, 2.5)), ((12, 18, 20), None), ((12, 18, 20), (5.0, 0.7, 1.3))],
)
def test_distances_of_outlines_are_those_of_scipy_in_pixels_and_in_mm(space, spacing):
    prediction, truth = blobs(4, *space)
    expected = np.array([hausdorff_of_two(*pair, spacing) for pair in zip(prediction[:, 0], truth[:, 0])])
    hd, hd95 = hausdorff(prediction.float(), truth.float(), spacing)
    assert hd[:, 0].tolist() == pytest.approx(expected[:, 0], abs=1e-4)
    assert hd95[:, 0].tolist() == pytest.approx(expected[:, 1], abs=1e-4) and (hd95 < hd).any()


@pytest.mark.parametrize("swapped", [False, True])
def test_hd_and_hd95_in_mm_of_a_case_computed_by_hand(swapped):
    """One voxel too many lies two slices of 4 mm and three columns of 0.5 mm from the only true one."""
    truth = torch.zeros(1, 1, 6, 7, 8)
    truth[0, 0, 1, 2, 2] = 1
    prediction = truth.clone()
    prediction[0, 0, 3, 2, 5] = 1
    pair = (truth, prediction) if swapped else (prediction, truth)
    far = math.hypot(2 * 4, 3 * 0.5)
    hd, hd95 = (float(found) for found in hausdorff(*pair, spacing=(4.0, 1.0, 0.5)))
    assert (hd, hd95) == pytest.approx((far, 0.95 * far))  # of the distances 0 and far, linear in between
    assert float(hausdorff(*pair)[0]) == pytest.approx(math.hypot(2, 3))
    scores = evaluation.score(*pair, ["x"], (4.0, 1.0, 0.5))
    assert scores[["hd", "hd95"]].iloc[0].tolist() == pytest.approx([far, 0.95 * far])
    nothing = torch.zeros_like(truth)
    for found in hausdorff(prediction, nothing, spacing=(4.0, 1.0, 0.5)):
        assert float(found) == pytest.approx(math.hypot(5 * 4, 6, 7 * 0.5))


def test_scores_of_images_are_monais_dice_and_scipys_distances():
    prediction, truth = (mask.float() for mask in blobs(6, 32, 32))
    scores = evaluation.score(prediction, truth, ["x"])
    assert scores["dsc"].to_numpy() == pytest.approx(DiceMetric()(prediction, truth).numpy().ravel(), abs=1e-6)
    expected = np.array([hausdorff_of_two(*pair) for pair in zip(prediction[:, 0], truth[:, 0])])
    assert scores[["hd", "hd95"]].to_numpy() == pytest.approx(expected, abs=1e-4)


def test_a_pixel_belongs_to_its_most_probable_class():
    masks = torch.tensor([0.9, 0.6, 0.4, 0.2]).reshape(1, 2, 1, 2)
    hard = harden(masks)
    assert hard[0, :, 0].tolist() == [[True, True], [False, False]]
    masks[0, 1, 0, 1] = 0.8
    assert harden(masks)[0, :, 0].tolist() == [[True, False], [False, True]]
    binary = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(harden(binary), binary)


def test_dice_of_groups_is_that_of_their_pixels_together():
    masks, truth = (torch.rand(5, 2, 6, 6, generator=torch.Generator().manual_seed(k)) > 0.5 for k in (0, 1))
    masks[:, 1], truth[:, 1] = masks[:, 1] & ~masks[:, 0], truth[:, 1] & ~truth[:, 0]
    truth[3:, 1] = masks[3:, 1] = False
    found = dice_of_groups(masks, truth, torch.tensor([0, 1, 0, 2, 2]))
    for group, members in enumerate(([0, 2], [1], [3, 4])):
        volume = lambda each: each[members].movedim(0, -1)[None]
        assert torch.allclose(found[group], dice(volume(masks), volume(truth))[0])
    assert found[2, 1] == 1  # there is nothing, and nothing is marked


def test_what_this_recipe_runs_and_has_been_trained_is_evaluated(tmp_path):
    cabinet = SimpleNamespace(file=lambda stage, last: tmp_path / f"{stage}-{last}")
    named = lambda recipe, only=None: [
        stage.name
        for stage in evaluation.trained_stages(SimpleNamespace(settings=params.load(recipe), cabinet=cabinet), only)
    ]
    assert named("paper") == named("strong") == []
    cabinet.file("joint", params.load("paper").joint.rounds).touch()  # of the paper's rounds the last counts
    assert named("paper") == ["joint"] and named("strong") == []
    for stage in ("segmentation", "registration", "mean_teacher", "cctr", "bcp"):
        cabinet.file(stage, None).touch()
    assert named("paper") == ["segmentation", "mean_teacher", "joint"]
    assert named("strong") == ["segmentation", "mean_teacher", "bcp", "cctr"]
    assert named("strong", "bcp") == ["bcp"] and named("strong", "unimatch") == []
