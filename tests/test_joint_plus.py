import pytest
import torch

from lib.methods.joint_plus import Pairs, fusion_weight, match_histogram, warp_pairs
from lib.pseudo_masks import PseudoMasks, fuse
from lib.warping import warp


def discs(n=6, side=32):
    """Discs of different radius as masks ``(n, 1, side, side)``."""
    grid = torch.arange(side) - side / 2
    distance = (grid[:, None] ** 2 + grid[None] ** 2).sqrt()
    return torch.stack([(distance < 6 + k).float() for k in range(n)])[:, None]


def masks_of(segmentation, registration):
    return PseudoMasks(segmentation, segmentation, registration, (segmentation + registration) / 2,
                       torch.zeros(len(segmentation)))


def test_the_reliable_network_gets_the_weight():
    truth = discs()
    wrong = torch.roll(truth, 12, dims=-1)
    assert fusion_weight(masks_of(truth, wrong), truth) > 0.5
    assert fusion_weight(masks_of(wrong, truth), truth) < 0.5
    assert fusion_weight(masks_of(truth, truth), truth) == 0.5  # no reason to leave the plain mean


def test_masks_that_err_in_different_places_are_best_together():
    truth = discs()
    left, right = truth.clone(), truth.clone()
    left[..., :16] *= 0.2
    right[..., 16:] *= 0.2
    weight = fusion_weight(masks_of(left, right), truth)
    assert 0.2 < weight < 0.8


def test_fusing_is_the_weighted_mean():
    first, second = torch.rand(2, 3, 1, 8, 8)
    masks = masks_of(first, second)
    assert torch.allclose(fuse(masks, 0.3).soft, 0.3 * first + 0.7 * second)
    assert torch.allclose(fuse(masks, 0.5).soft, masks.soft)
    assert torch.equal(fuse(masks, 1.0).soft, first)


def test_the_mask_of_a_warped_pair_is_the_warped_mask():
    masks = discs()
    images = masks * 0.6 + 0.2
    fields = torch.nn.functional.interpolate(3 * torch.randn(6, 2, 4, 4), size=(32, 32), mode="bicubic")
    warped, warped_masks = warp_pairs(images, masks, fields)
    assert torch.equal(warped_masks, warp(masks, fields))
    assert torch.allclose(warped, warped_masks * 0.6 + 0.2, atol=1e-5)  # image and mask moved together


def test_pairs_warp_each_source_by_its_own_field():
    images, masks = torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    sources = torch.tensor([0, 1, 1])
    fields = torch.zeros(3, 2, 8, 8)
    fields[1, 1] = 2  # the second pair is its source, two columns to the left
    pairs = Pairs(sources, torch.tensor([0, 0, 0]), fields)
    drawn, _ = pairs.draw(images, masks, torch.rand(1, 1, 8, 8), 30, 0.0, torch.Generator().manual_seed(0))
    shifted = warp(images[1:], fields[1:2])
    expected = torch.cat((images[:1], shifted, images[1:]))
    matches = (drawn[:, None] - expected[None]).abs().amax(dim=(2, 3, 4)) < 1e-5
    assert matches.any(dim=1).all() and matches.any(dim=0).all()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_extreme_weights_keep_one_network(weight):
    first, second = torch.rand(2, 3, 1, 8, 8)
    assert torch.equal(fuse(masks_of(first, second), weight).soft, first if weight else second)


def test_matching_keeps_the_order_of_grey_values_and_takes_the_others_histogram():
    images, references = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8) ** 2
    matched = match_histogram(images, references)
    assert torch.equal(matched.flatten(1).sort().values, references.flatten(1).sort().values)
    assert torch.equal(matched.flatten(1).argsort(), images.flatten(1).argsort())
    assert torch.equal(match_histogram(images, images), images)


def test_style_changes_images_but_not_masks():
    images, masks, unlabelled = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8), torch.rand(1, 1, 8, 8) + 5
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.zeros(2, 2, 8, 8))
    drawn, drawn_masks = pairs.draw(images, masks, unlabelled, 8, 1.0, torch.Generator().manual_seed(0))
    plain, plain_masks = pairs.draw(images, masks, unlabelled, 8, 0.0, torch.Generator().manual_seed(0))
    assert (drawn >= 5).all() and (plain <= 1).all() and torch.equal(drawn_masks, plain_masks)
