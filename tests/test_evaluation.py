import math
from types import SimpleNamespace

import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric

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


def test_scores_agree_with_monai():
    generator = torch.Generator().manual_seed(0)
    soft = torch.nn.functional.avg_pool2d(torch.rand(6, 1, 36, 36, generator=generator), 5, 1)
    truth, prediction = (soft > 0.5).float(), (soft.roll(2, 3) > 0.5).float()
    scores = evaluation.score(prediction, truth, ["x"])
    assert scores["dsc"].to_numpy() == pytest.approx(DiceMetric()(prediction, truth).numpy().ravel(), abs=1e-6)
    for column, percentile in (("hd", None), ("hd95", 95)):
        metric = HausdorffDistanceMetric(include_background=True, percentile=percentile)
        assert scores[column].to_numpy() == pytest.approx(metric(prediction, truth).numpy().ravel(), abs=1e-5)


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


def test_a_variant_takes_on_the_baseline_and_what_it_may_vary_alone(tmp_path):
    """Nor does anything count that has not been trained, or that this recipe does not run."""
    settings = params.load("strong")
    settings.cctr["recipes"] = ["strong"]
    cabinet = SimpleNamespace(file=lambda stage, last: tmp_path / f"{stage}-{last}")
    experiment = SimpleNamespace(settings=settings, cabinet=cabinet)
    found = lambda: [stage.name for stage in evaluation.trained_stages(experiment)]
    assert found() == []
    for stage in ("joint", "joint_plus"):  # whose last round counts
        cabinet.file(stage, settings[stage].rounds).touch()
    assert found() == ["joint", "joint_plus"]
    settings["variant"] = "no pairs"
    assert found() == ["joint_plus"]
    for stage in ("segmentation", "registration", "mean_teacher", "cctr"):
        cabinet.file(stage, None).touch()
    assert found() == ["segmentation", "joint_plus", "cctr"]
    settings["variant"] = ""
    assert found() == ["segmentation", "mean_teacher", "joint", "joint_plus", "cctr"]
    settings.cctr["recipes"] = []
    cabinet.file("joint", settings.joint.rounds).unlink()
    assert found() == ["segmentation", "mean_teacher", "joint_plus"]
