import math

import pytest
import torch
import torch.nn.functional as F

from lib.augment import Affine, draw_affine
from lib.methods.cctr import contrast
from lib.runs import params
from lib.warping import pixel_grid

OPTIONS = params.Section(threshold=0.8, anchors=50, negatives=40, temperature=0.5)


def generator():
    return torch.Generator().manual_seed(0)


def test_info_nce_of_a_hand_computed_case():
    anchors, positives = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    up = math.exp(0.6 / 0.5)
    expected = -math.log(up / (up + math.exp(0) + math.exp(-1 / 0.5)))
    assert float(contrast.info_nce(anchors, positives, negatives, 0.5)) == pytest.approx(expected)
    valid = torch.tensor([True, False])
    without = contrast.info_nce(anchors, positives, negatives, 0.5, valid)
    assert float(without) == pytest.approx(-math.log(up / (up + 1)))
    none = contrast.info_nce(anchors.requires_grad_(), positives, negatives, 0.5, torch.zeros(2, dtype=torch.bool))
    none.backward()
    assert none.item() == 0 and torch.isfinite(anchors.grad).all()


def test_every_positive_is_held_against_the_negatives_by_itself():
    anchors, one, other, negatives = F.normalize(torch.randn(4, 5, 8, generator=generator()), dim=-1)
    both = contrast.info_nce(anchors, torch.stack((one, other)), negatives, 0.5)
    assert torch.equal(both[0], contrast.info_nce(anchors, one, negatives, 0.5))
    assert torch.equal(both[1], contrast.info_nce(anchors, other, negatives, 0.5))


def test_counterparts_in_every_volume_draw_and_unknown_ones_do_not():
    features = F.normalize(torch.randn(2, 120, 8, generator=generator()), dim=-1)
    labels, confidence = torch.arange(120) % 3, torch.ones(120)
    known = torch.zeros(2, 120, dtype=torch.bool)
    reps = lambda: contrast.pixel_contrast(features[0], labels, confidence, 3, OPTIONS, generator(), (far, known))[1]
    far = torch.stack((features[0], features[1]))
    assert float(reps()) == 0
    known[1] = True
    unlike = float(reps())
    known[0] = True  # there every pixel has itself
    assert 0 < float(reps()) < unlike


def test_the_true_mask_speaks_on_labelled_images_and_the_network_on_the_others():
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :4], masks[0, 1, 4:, :2] = 1, 1  # the lower left block of 4 x 4 is half of class 2, half background
    logits = torch.zeros(2, 3, 8, 8)
    logits[0, 2], logits[1, 1] = 20, math.log(8)
    labels, confidence = (part.reshape(2, 2, 2) for part in contrast.describe(logits, masks, 1, 4))
    assert labels[0, 0].tolist() == [1, 1] and labels[0, 1, 1] == 0 and (labels[1] == 1).all()
    assert confidence[0].tolist() == [[1, 1], [0.5, 1]]
    assert torch.allclose(confidence[1], torch.full((2, 2), 0.8))
    options = params.Section(stride=4, threshold=0.9)
    found = contrast.eligible(masks, ("background", "a", "b"), options).set_index("class")
    assert found["features"].tolist() == [2, 2, 0] and found["share"].tolist() == [0.5, 1, 0]
    assert found.loc["a", "per_image"] == 2


def test_only_confident_pixels_are_anchors_and_negatives():
    features = F.normalize(torch.randn(200, 8, generator=generator()), dim=1).requires_grad_()
    labels = torch.arange(200) % 3
    confidence = (torch.arange(200) < 100).float()
    loss, reps = contrast.pixel_contrast(features, labels, confidence, 3, OPTIONS, generator())
    loss.backward()
    touched = features.grad.abs().sum(dim=1) > 0
    assert touched[:100].any() and not touched[100:].any() and reps == 0
    changed = features.detach().clone()
    changed[100:] = -changed[100:]
    assert torch.equal(loss.detach(), contrast.pixel_contrast(changed, labels, confidence, 3, OPTIONS, generator())[0])


def test_contrast_falls_where_classes_part():
    labels = torch.arange(120) % 3
    apart = F.one_hot(labels, 4).float()
    mixed = F.normalize(torch.randn(120, 4, generator=generator()), dim=1)
    confidence = torch.ones(120)
    loss = lambda features: float(contrast.pixel_contrast(features, labels, confidence, 3, OPTIONS, generator())[0])
    assert loss(apart) < 0.5 * loss(mixed)


def test_a_class_without_anchors_does_not_count():
    labels = torch.arange(120) % 2
    features = F.one_hot(labels, 4).float()
    few = params.Section({**OPTIONS, "negatives": OPTIONS.negatives // 4})  # of five classes one gives a quarter
    two = contrast.pixel_contrast(features, labels, torch.ones(120), 2, few, generator())[0]
    five = contrast.pixel_contrast(features, labels, torch.ones(120), 5, OPTIONS, generator())[0]
    assert torch.isfinite(five) and float(five) == pytest.approx(float(two), rel=0.05)


def test_negatives_come_from_every_other_class_alike(monkeypatch):
    """Background is 95 % of a heart's pixels, but not of what a structure is held against."""
    labels = torch.cat((torch.zeros(950), torch.full((25,), 1), torch.full((25,), 2))).long()
    features = F.one_hot(labels, 3).float()
    seen = []
    monkeypatch.setattr(
        contrast,
        "info_nce",
        lambda a, positives, negatives, t, valid: (
            seen.append(negatives[valid].sum(0)) or torch.zeros(positives.shape[:2])
        ),
    )
    contrast.pixel_contrast(features, labels, torch.ones(1000), 3, OPTIONS, generator())
    assert [counts.tolist() for counts in seen] == [[0, 20, 20], [20, 0, 20], [20, 20, 0]]


def test_the_bank_gives_back_what_was_seen_at_the_place_that_it_was_seen():
    side, stride = 32, 2
    shape = (3, side // stride, side // stride)
    bank = contrast.Bank(4, shape, stride)
    smooth = F.interpolate(torch.randn(2, 3, 4, 4, generator=generator()), size=shape[1:], mode="bicubic")
    features = F.normalize(smooth, dim=1)
    still = Affine(torch.eye(2).repeat(2, 1, 1), torch.zeros(2, 2))
    index = torch.tensor([1, 3])
    bank.store(index, features, still)
    assert torch.allclose(bank.features[index], features, atol=1e-5) and bank.seen[0].sum() == 0
    maps = draw_affine(2, (side, side), generator(), rotation=10, shift=0.05)
    again = contrast.Bank(4, shape, stride)
    seen = F.normalize(Affine(maps.matrix, maps.shift / stride).apply(features), dim=1)
    again.store(index, seen, maps)
    middle = (slice(None), slice(None), slice(4, 12), slice(4, 12))
    assert (again.features[index] * features).sum(1, keepdim=True)[middle].mean() > 0.98


def test_positives_are_looked_up_at_the_corresponding_pixel():
    side, stride = 32, 2
    bank = contrast.Bank(1, (2, side // stride, side // stride), stride)
    bank.seen[:] = 1
    bank.features[0, 0] = 1
    bank.features[0, :, 5, 9] = torch.tensor([0.0, 1.0])  # covers pixels 10, 11 and 18, 19
    displacement = torch.tensor([4.0, -6.0]).reshape(1, 2, 1, 1)
    coordinates = pixel_grid((side, side), torch.device("cpu")) + displacement
    found, known = bank.look_up(torch.tensor([0]), coordinates)
    assert found[0, :, 6, 24].tolist() != [1.0, 0.0]
    exact = pixel_grid((side, side), torch.device("cpu")) * 0 + torch.tensor([10.5, 18.5]).reshape(1, 2, 1, 1)
    assert torch.allclose(bank.look_up(torch.tensor([0]), exact)[0][0, :, 0, 0], torch.tensor([0.0, 1.0]), atol=1e-5)
    assert not known[0, 31, 16] and known[0, 10, 16]  # four rows below the last there is nothing


def test_counterparts_are_what_the_bank_has_at_the_corresponding_places():
    """Two volumes: the first labelled image lies 4 pixels lower than the unlabelled one, the second is unknown."""
    side, stride = 32, 2
    grid = pixel_grid((side, side), torch.device("cpu"))
    bank = contrast.Bank(2, (2, side // stride, side // stride), stride)
    bank.seen[0] = 1
    angle = F.avg_pool2d(grid[:, :1] / side, stride)  # a feature says in which row it is
    bank.features[0] = torch.cat((angle.cos(), angle.sin()), 1)
    places = F.avg_pool2d(torch.cat((grid + torch.tensor([4.0, 0.0]).reshape(1, 2, 1, 1), grid)), stride)[None]
    partners = torch.tensor([[0, 1]])
    still = Affine(torch.eye(2)[None], torch.zeros(1, 2))
    found, known = bank.counterparts(partners, places, still)
    assert found.shape == (2, 256, 2) and not known[1].any()
    row = lambda features: torch.atan2(features[:, 1], features[:, 0]).reshape(16, 16) * side
    assert known[0].reshape(16, 16)[1:13, 1:15].all() and not known[0].reshape(16, 16)[14:].any()
    assert torch.allclose(row(found[0])[1:13], F.avg_pool2d(grid[:, 0], stride)[0, 1:13] + 4, atol=0.05)
    moved, known = bank.counterparts(partners, places, Affine(torch.eye(2)[None], torch.tensor([[6.0, 0.0]])))
    assert known[0].reshape(16, 16)[1:10, 1:15].all()
    assert torch.allclose(row(moved[0])[1:10], F.avg_pool2d(grid[:, 0], stride)[0, 1:10] + 10, atol=0.05)
