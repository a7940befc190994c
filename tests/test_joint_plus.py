from types import SimpleNamespace

import pytest
import torch
from test_pseudo_masks import Shift, corners, squares
from test_training import made_up_cohort

from lib.compute import Numerics
from lib.methods import joint_plus
from lib.methods.experiment import Experiment
from lib.methods.joint_plus import Pairs, fusion_weight, make_pairs, match_histogram, warp_pairs
from lib.pseudo_masks import PseudoMasks, draw_sources, fuse
from lib.runs import params
from lib.warping import warp


def discs(n=6, side=32):
    """Discs of different radius as masks ``(n, 1, side, side)``."""
    grid = torch.arange(side) - side / 2
    distance = (grid[:, None] ** 2 + grid[None] ** 2).sqrt()
    return torch.stack([(distance < 6 + k).float() for k in range(n)])[:, None]


def masks_of(segmentation, registration):
    return PseudoMasks(
        segmentation, segmentation, registration, (segmentation + registration) / 2, torch.zeros(len(segmentation))
    )


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


def test_fusing_leads_from_the_registration_to_the_segmentation_through_the_plain_mean():
    first, second = torch.rand(2, 3, 1, 8, 8)
    masks = masks_of(first, second)
    assert torch.equal(fuse(masks, 0.0).soft, second) and torch.equal(fuse(masks, 1.0).soft, first)
    assert torch.allclose(fuse(masks, 0.5).soft, masks.soft)
    distances = [float((fuse(masks, weight).soft - first).abs().mean()) for weight in (0.0, 0.25, 0.5, 1.0)]
    assert distances == pytest.approx([distances[0] * part for part in (1, 0.75, 0.5, 0)], abs=1e-6)
    assert torch.equal(fuse(masks, 0.3).plain, masks.plain)  # what a network says alone stays


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


PLACES = [(4, 6), (20, 9), (11, 22), (2, 2), (15, 3), (9, 20), (25, 25)]


@pytest.fixture
def registered():
    """Two labelled images and five others, each labelled one registered to each other one, a few at a time."""
    images, masks = squares(PLACES)
    numerics = Numerics("cpu", "float32").sharing(1 / 100)
    data = SimpleNamespace(
        images=images, masks=masks, labelled=torch.tensor([1, 4]), unlabelled=torch.tensor([0, 2, 3, 5, 6])
    )
    draw = lambda index, n, generator: draw_sources(len(index), len(data.labelled), n, generator)
    experiment = SimpleNamespace(data=data, numerics=numerics, settings=params.Section(seed=1), draw_sources=draw)
    assert 1 < numerics.batch(images) < 5
    return data, make_pairs(experiment, Shift(), 3, 1)


def test_every_field_of_a_pair_leads_from_its_source_to_its_target(registered):
    data, pairs = registered
    both = list(zip(pairs.sources.tolist(), pairs.targets.tolist(), strict=True))
    assert sorted(both) == [(source, target) for source in range(2) for target in range(5)]
    at = corners(data.images)
    for (source, target), field in zip(both, pairs.fields, strict=True):
        by = at[data.labelled[source]] - at[data.unlabelled[target]]
        assert torch.equal(field, by[:, None, None].float().expand_as(field))


def test_drawn_pairs_lie_upon_their_targets_image_and_mask_alike(registered):
    """A square's place says onto which target it was warped, its brightness from which source it came."""
    data, pairs = registered
    labelled, masks, free = data.images[data.labelled], data.masks[data.labelled], data.images[data.unlabelled]
    draw = lambda style: pairs.draw(labelled, masks, free, 10, style, torch.Generator().manual_seed(0))
    plain, plain_masks = draw(0.0)
    styled, styled_masks = draw(1.0)
    found = set()
    for image, mask, other in zip(plain, plain_masks, styled):
        (source,) = (image.max() - labelled.amax((1, 2, 3))).abs().lt(1e-4).nonzero()[0].tolist()
        (target,) = [k for k in range(5) if torch.equal(image > 1e-4, free[k] > 0)]
        assert torch.allclose(mask, torch.cat((image, image / 2)), atol=1e-5)
        assert torch.allclose(other, free[target], atol=1e-5)  # its grey values are the target's then
        found.add((source, target))
    assert len(found) == 10 and torch.equal(plain_masks, styled_masks)


class Training:
    """train_on_mixture on ellipses, and what went on in it: batches, targets, and weights after every step."""

    def __init__(self, monkeypatch, folder, **changes):
        monkeypatch.setenv("JOINT_OUTPUT", str(folder))
        settings = params.load("strong")
        settings |= {"device": "cpu", "precision": "float32"}
        settings.segmentation["augmentation"] = "none"
        settings.joint_plus |= {"style": 0.0, "segmentation_epochs": 20, "decay": 0.8, **changes}
        made_up_cohort().save(params.cohort_file(settings))
        self.experiment = Experiment(settings)
        self.data, self.images, self.targets, self.weights = self.experiment.data, [], [], []
        self.network = self.experiment.segmentation_network()
        self.network.register_forward_pre_hook(
            lambda module, given: self.images.append(given[0]) if module.training else None
        )
        loss, update = joint_plus.soft_dice_loss, joint_plus.MeanTeacher.update
        monkeypatch.setattr(
            joint_plus,
            "soft_dice_loss",
            lambda prediction, target, pooled: (self.targets.append(target), loss(prediction, target, pooled))[1],
        )

        def updated(networks):
            if not self.weights:  # the teacher begins as the student did
                self.first = copies(networks.teacher)
            update(networks)
            self.weights.append(copies(networks.student))

        monkeypatch.setattr(joint_plus.MeanTeacher, "update", updated)
        free = len(self.data.unlabelled)
        sources = torch.arange(free) % len(self.data.labelled)
        self.pairs = Pairs(sources, torch.arange(free), torch.ones(free, 2, 32, 32))
        rows = torch.linspace(0.2, 0.8, 32)[:, None].expand(32, 32)
        self.soft = torch.stack([rows.roll(k, 0) for k in range(free)])[:, None]  # nowhere 0 or 1

    def train(self, pairs=True, soft=True):
        found = joint_plus.train_on_mixture(
            self.experiment, self.network, self.pairs if pairs else None, self.soft if soft else None, 1
        )
        return found.history


def copies(network):
    return [value.detach().clone() for value in network.parameters()]


def members(batch, among):
    """How many of a batch are among other images, pixel for pixel."""
    return sum(any(torch.equal(one, other) for other in among) for one in batch)


@pytest.mark.parametrize(
    ("parts", "counts"),
    [((True, True), (3, 3, 4)), ((True, False), (3, 7, 0)), ((False, True), (3, 0, 7)), ((False, False), (10, 0, 0))],
)
def test_every_batch_keeps_its_labelled_images_and_soft_targets_stay_soft(monkeypatch, tmp_path, parts, counts):
    training = Training(monkeypatch, tmp_path, labelled=0.3, batch=10, segmentation_epochs=2)
    training.train(*parts)
    data = training.data
    labelled, masks = data.images[data.labelled], data.masks[data.labelled]
    warped = warp(torch.cat((labelled, masks), 1), torch.ones(len(labelled), 2, 32, 32))
    kinds = ((labelled, masks), (warped[:, :1], warped[:, 1:]), (data.images[data.unlabelled], training.soft))
    assert len(training.images) == len(training.targets) > 3
    for images, targets in zip(training.images, training.targets):
        assert tuple(members(images, of) for of, _ in kinds) == counts
        for image, target in zip(images, targets):
            assert any(
                torch.equal(image, one) and torch.equal(target, mask)  # the mask is that of its own image
                for of, wanted in kinds
                for one, mask in zip(of, wanted)
            )


@pytest.mark.parametrize("decay", [0.8, 0.0])
def test_what_is_returned_is_the_average_of_the_weights_where_it_was_best_or_without_decay_the_weights(
    monkeypatch, tmp_path, decay
):
    training = Training(monkeypatch, tmp_path, decay=decay)
    history = training.train()
    averages, mean = [], training.first
    for number, weights in enumerate(training.weights, 1):
        share = max(1 / (number + 1), 1 - decay)  # of what is new
        mean = [old + share * (new - old) for old, new in zip(mean, weights)]
        averages.append(mean)
    validation = history["validation"].dropna()
    best = validation.index[validation == validation.max()][-1]  # of equals the later one
    apart = lambda weights: max(
        float((mine - other).abs().max()) for mine, other in zip(copies(training.network), weights, strict=True)
    )
    assert apart(averages[best]) < 1e-6
    assert (apart(training.weights[best]) < 1e-6) == (decay == 0)
