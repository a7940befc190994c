import math

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from lib import losses, warping
from lib.metrics import dice


def disc(size=32, radius=9, centre=(16, 16)):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2).float()[None, None]


def ball(centre, radius, side=40):
    """A ball, of two axes a disc, as a mask ``(1, 1, *space)``."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(side)] * len(centre), indexing="ij"))
    centre = torch.tensor(centre).reshape(-1, *[1] * len(centre))
    return ((grid - centre).square().sum(0) <= radius**2).float()[None, None]


def share_of_overlap(axes, radius, distance):
    """What two equal discs, or balls, have in common, as a share of one of them."""
    if axes == 2:
        angle = 2 * math.acos(distance / (2 * radius))
        return (angle - math.sin(angle)) / math.pi
    return (4 * radius + distance) * (2 * radius - distance) ** 2 / (16 * radius**3)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("shift", [4, 8, 12])
def test_the_overlap_of_two_balls_is_that_of_geometry(axes, shift):
    first, second = ball((14,) * axes, 11.0), ball((14 + shift, *(14,) * (axes - 1)), 11.0)
    expected = share_of_overlap(axes, 11.0, shift)
    assert float(dice(first, second)) == pytest.approx(expected, abs=0.015)
    assert float(losses.soft_dice_loss(first, second)) == pytest.approx(1 - float(dice(first, second)), abs=1e-6)


def test_soft_dice_of_equal_hard_masks_is_zero():
    assert float(losses.soft_dice_loss(disc(), disc())) == pytest.approx(0, abs=1e-6)


def test_soft_dice_of_disjoint_masks_is_one():
    assert float(losses.soft_dice_loss(disc(radius=4), disc(radius=4, centre=(5, 5)))) == pytest.approx(1, abs=1e-6)


def test_soft_dice_equals_monai_with_squared_denominator():
    prediction, target = torch.rand(3, 2, 16, 16), torch.rand(3, 2, 16, 16)
    monai = DiceLoss(squared_pred=True, smooth_nr=losses.SMOOTH, smooth_dr=losses.SMOOTH)
    assert float(losses.soft_dice_loss(prediction, target)) == pytest.approx(float(monai(prediction, target)), abs=1e-6)


def test_soft_dice_of_empty_masks_is_zero_and_differentiable():
    prediction = torch.zeros(1, 1, 8, 8, requires_grad=True)
    loss = losses.soft_dice_loss(prediction, torch.zeros(1, 1, 8, 8))
    loss.backward()
    assert float(loss) == pytest.approx(0) and torch.isfinite(prediction.grad).all()


def test_pooled_soft_dice_of_a_hand_computed_case():
    prediction = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).reshape(2, 1, 1, 2)
    target = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).reshape(2, 1, 1, 2)
    pooled = losses.soft_dice_loss(prediction, target, pooled=True)
    assert float(pooled) == pytest.approx(1 - 2 * 0.5 / (0.5 + 1 + 1 + 0), abs=1e-4)
    single = losses.soft_dice_loss(prediction, target)
    assert float(single) == pytest.approx(((1 - 2 * 0.5 / (0.5 + 1)) + 1) / 2, abs=1e-4)
    assert torch.equal(
        losses.soft_dice_loss(prediction[:1], target[:1], pooled=True),
        losses.soft_dice_loss(prediction[:1], target[:1]),
    )


def test_an_image_without_the_class_learns_from_pooled_soft_dice():
    target = torch.cat((disc(), torch.zeros_like(disc())))
    slopes = {}
    for pooled in (True, False):
        prediction = torch.full_like(target, 0.3, requires_grad=True)
        losses.soft_dice_loss(prediction, target, pooled).backward()
        slopes[pooled] = prediction.grad[1]
    assert (slopes[True] > 1e-4).all() and slopes[False].abs().max() < 1e-8


@pytest.mark.parametrize("space", [(20, 20), (8, 10, 9)])
def test_gncc_is_the_correlation_and_invariant_to_gain_and_offset(space):
    first, noise = torch.rand(4, 1, *space), torch.rand(4, 1, *space)
    second = 0.4 * first + 0.6 * noise
    found = losses.gncc(first, second)
    expected = [np.corrcoef(one.flatten(), other.flatten())[0, 1] for one, other in zip(first, second)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5) and found.min() > 0.3 and found.max() < 0.8
    assert torch.allclose(losses.gncc(3 * first + 2, 0.5 * second - 1), found, atol=1e-5)
    assert torch.allclose(losses.gncc(-first, second), -found, atol=1e-5)


def test_gncc_loss_runs_from_zero_to_two():
    image = torch.rand(2, 1, 20, 20)
    assert float(losses.gncc_loss(image, 5 * image + 1)) == pytest.approx(0, abs=1e-5)
    assert float(losses.gncc_loss(image, 1 - image)) == pytest.approx(2, abs=1e-5)


def test_gncc_of_a_constant_image_is_zero_with_finite_gradient():
    image = torch.full((1, 1, 8, 8), 0.3, requires_grad=True)
    loss = losses.gncc_loss(image, torch.rand(1, 1, 8, 8))
    loss.backward()
    assert float(loss) == pytest.approx(1) and torch.isfinite(image.grad).all()


def test_smoothness_is_zero_for_a_translation_and_known_for_a_ramp():
    assert float(losses.smoothness_loss(torch.full((1, 2, 8, 8), 3.0))) == 0
    ramp = torch.zeros(1, 2, 8, 8)
    ramp[:, 0] = 2 * torch.arange(8)[:, None]
    assert float(losses.smoothness_loss(ramp)) == pytest.approx((4 / 2 + 0) / 2)


@pytest.mark.parametrize("axes", [2, 3])
def test_smoothness_of_a_linear_field_is_the_mean_square_of_its_slopes(axes):
    slopes = torch.randn(axes, axes, generator=torch.Generator().manual_seed(0))
    grid = warping.pixel_grid((6, 7, 8)[:axes], torch.device("cpu"))
    field = torch.einsum("ij,bj...->bi...", slopes, grid) + 5
    assert float(losses.smoothness_loss(field)) == pytest.approx(float(slopes.square().mean()), rel=1e-4)


@pytest.mark.parametrize("space", [(16, 24), (8, 12, 16)])
def test_registration_loss_where_nothing_moves_is_that_of_the_images_shrunk_by_blocks(space):
    """By hand: blocks of voxels are averaged, compared by numpy's correlation, and masks by their voxels."""
    axes, generator = len(space), torch.Generator().manual_seed(0)
    source, target = torch.rand(2, 1, 1, *space, generator=generator)
    masks = (torch.rand(2, 1, 2, *space, generator=generator) > 0.6).float()
    still = [torch.zeros(1, axes, *[side // shrink for side in space]) for shrink in (4, 2, 1)]
    pushed = [field + torch.tensor([0.5, 1.0, -1.0])[k] for k, field in enumerate(still)]
    parts = losses.registration_loss(list(zip(still, pushed)), source, target, (4, 2, 1), *masks)

    def shrunk(image, by):
        sides = [part for side in space for part in (side // by, by)]
        return image.numpy().reshape(*image.shape[:2], *sides).mean(axis=tuple(range(3, 3 + 2 * axes, 2)))

    levels = [[shrunk(part, by) for part in (source, target, *masks)] for by in (4, 2, 1)]
    correlation = [np.corrcoef(first.ravel(), second.ravel())[0, 1] for first, second, *_ in levels]
    overlap = [
        2 * (a * b)[0, k].sum() / ((a * a)[0, k].sum() + (b * b)[0, k].sum()) for *_, a, b in levels for k in range(2)
    ]
    assert float(parts.similarity) == pytest.approx(1 - np.mean(correlation), abs=1e-4)
    assert float(parts.dice) == pytest.approx(1 - np.mean(overlap), abs=1e-4)
    assert float(parts.smoothness) == 0  # of residual fields that are the same everywhere
    bent = [(field, 3 * warping.pixel_grid(field.shape[2:], field.device)) for field in still]
    alone = losses.registration_loss(bent, source, target, (4, 2, 1))
    assert float(alone.smoothness) == pytest.approx((4 + 2 + 1) / 3 * 9 / axes, rel=1e-4) and float(alone.dice) == 0
    assert float(alone.total) == pytest.approx(float(alone.similarity + alone.smoothness), rel=1e-5)


def test_registration_loss_has_the_parts_of_equation_3():
    source, target = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    fields = [torch.randn(2, 2, 16, 16), torch.randn(2, 2, 32, 32)]
    guides = disc().expand(2, -1, -1, -1), disc(radius=7).expand(2, -1, -1, -1)
    parts = losses.registration_loss([(f, f) for f in fields], source, target, (4, 2), *guides)
    half = torch.nn.functional.avg_pool2d
    similarity = (
        losses.gncc_loss(warping.warp(half(source, 2), fields[0]), half(target, 2))
        + losses.gncc_loss(warping.warp(source, fields[1]), target)
    ) / 2
    smoothness = (4 * losses.smoothness_loss(fields[0]) + 2 * losses.smoothness_loss(fields[1])) / 2
    assert float(parts.similarity) == pytest.approx(float(similarity), abs=1e-5)
    assert float(parts.smoothness) == pytest.approx(float(smoothness), rel=1e-5)
    assert 0 < float(parts.dice) < 1
    assert float(parts.total) == pytest.approx(float(parts.similarity + parts.dice + parts.smoothness), rel=1e-5)


def test_unguided_registration_loss_has_no_dice():
    image = torch.rand(1, 1, 16, 16)
    field = torch.zeros(1, 2, 16, 16)
    parts = losses.registration_loss([(field, field)], image, image, (1,))
    assert float(parts.dice) == 0 and float(parts.total) == pytest.approx(0, abs=1e-5)


def test_weighted_gncc_counts_where_the_weight_is():
    image, other = (torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    left = torch.zeros_like(image)
    left[..., :16] = 1
    mixed = torch.where(left > 0, 0.3 + 0.5 * image, other)
    assert float(losses.weighted_gncc(image, mixed, left)) == pytest.approx(1, abs=1e-4)
    whole = float(losses.weighted_gncc(image, mixed, torch.ones_like(image)))
    assert whole == pytest.approx(float(losses.gncc(image, mixed)), abs=1e-4) and whole < 0.9


def test_an_axis_of_one_voxel_has_nothing_to_be_smooth_along():
    field = torch.rand(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    along = [field.diff(dim=axis).square().mean() for axis in (3, 4)]
    assert float(losses.smoothness_loss(field)) == pytest.approx(float(sum(along) / 2))
    assert float(losses.smoothness_loss(field[:, :, :, :1, :1])) == 0
