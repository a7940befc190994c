import math

import numpy as np
import pytest
import torch

from lib.methods.cctr import alignment
from lib.metrics import dice
from lib.warping import warp


def organ(seed, height=64, width=64):
    """An image of an organ of two parts among others, and its mask: ``(1, 1, height, width)`` and two classes."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    blob = lambda y, x, a, b: ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1
    left, right = blob(34, 26, 11, 7), blob(32, 39, 8, 6)
    image = 0.2 + 0.7 * left + 0.4 * (right & ~left) + 0.02 * rng.random((height, width))
    masks = torch.as_tensor(np.stack([left, right & ~left])[None]).float()
    return torch.as_tensor(np.clip(image, 0, 1))[None, None].float(), masks


def moved(image, angle, scale, shift, centre=(2 / 64, 0)):
    """``image`` as it looks after a similarity transform: what ``align`` has to find is its displacement."""
    motion = torch.tensor([[math.radians(angle), math.log(scale), *shift]])
    return alignment.displacement(motion, torch.tensor([centre]), image.shape[-2:])


def test_no_motion_is_no_displacement_and_a_shift_is_the_same_everywhere():
    image, _ = organ(0, 40, 64)
    assert moved(image, 0, 1, (0, 0)).abs().max() < 1e-4
    field = moved(image, 0, 1, (0.1, -0.05))
    assert torch.allclose(field[:, 0], torch.tensor(-6.4), atol=1e-4)
    assert torch.allclose(field[:, 1], torch.tensor(3.2), atol=1e-4)


def test_a_turn_keeps_distances_in_images_of_any_shape():
    field = moved(torch.zeros(1, 1, 40, 64), 30, 1, (0.1, 0))
    rows, columns = field[0]
    step = torch.stack((rows[20, 31] - rows[20, 30], 1 + columns[20, 31] - columns[20, 30]))
    assert float(step.norm()) == pytest.approx(1, abs=1e-4)
    assert math.degrees(math.atan2(*step)) == pytest.approx(-30, abs=1e-2)


@pytest.mark.parametrize("angle, scale, shift", [(25, 1, (0.1, -0.12)), (-35, 1.15, (0, 0.1)), (5, 0.8, (-0.1, 0))])
def test_an_organ_is_found_where_it_lies(angle, scale, shift):
    image, masks = organ(0)
    field = moved(image, angle, scale, shift)
    target, truth = warp(image, field), warp(masks, field)
    target = target * torch.linspace(0.7, 1, 64)  # and another light
    region = alignment.region(masks, torch.tensor([0]))
    found = alignment.align(image, target, region, torch.tensor([0]))
    assert dice(masks, truth).mean() < 0.75
    assert dice(warp(masks, found), truth).mean() > 0.93


def test_all_slices_of_a_volume_move_alike_and_volumes_do_not():
    image, masks = organ(0)
    sources = image.expand(4, -1, -1, -1)
    fields = [moved(image, 20, 1, (0.1, 0)), moved(image, -20, 1, (0, 0.1))]
    targets = torch.cat([warp(image, fields[k]) for k in (0, 0, 1, 1)])
    targets[1] = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))  # a slice that shows nothing
    weight = alignment.region(masks, torch.tensor([0])).expand(4, -1, -1, -1)
    found = alignment.align(sources, targets, weight, torch.tensor([0, 0, 1, 1]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    for k in (0, 2):
        assert dice(warp(masks, found[k : k + 1]), warp(masks, fields[k // 2])).mean() > 0.93


def test_a_region_holds_all_slices_of_its_volume_and_a_margin():
    masks = torch.zeros(3, 2, 40, 40)
    masks[0, 0, 18:22, 18:22] = 1
    masks[1, 1, 18:22, 24:28] = 1
    masks[2, 0, 5:9, 5:9] = 1
    region = alignment.region(masks, torch.tensor([3, 3, 7]))
    assert torch.equal(region[0], region[1]) and not torch.equal(region[0], region[2])
    assert region[0, 0, 20, 16:30].min() == 1 and region[0, 0, :10].max() == 0 and region[2, 0, 20:].max() == 0
