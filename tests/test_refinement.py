import pytest
import torch

from lib.losses import gncc
from lib.refinement import refine
from lib.runs import params
from lib.warping import folding, warp

OPTIONS = params.Section(params.load().refinement | {"steps": [10, 20]})


def blobs(centres, side=64):
    """Smooth bright discs on a gradient, ``(n, 1, side, side)``."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    squares = [(rows - r) ** 2 + (columns - c) ** 2 for r, c in centres]
    return torch.stack([torch.exp(-square / 100) + 0.1 * columns / side for square in squares])[:, None]


def test_a_perfect_field_stays():
    image = blobs([(32, 32)])
    assert refine(torch.zeros(1, 2, 64, 64), image, image, OPTIONS).abs().max() < 0.2


def test_what_the_network_has_left_is_aligned_without_folding():
    source, target = blobs([(30, 34), (33, 30)]), blobs([(32, 32), (32, 32)])
    field = refine(torch.zeros(2, 2, 64, 64), source, target, OPTIONS)
    before, after = gncc(source, target), gncc(warp(source, field), target)
    assert ((1 - after) < 0.2 * (1 - before)).all()
    assert folding(field).max() < 0.01
    assert field[0, :, 32, 32].tolist() == pytest.approx([-2, 2], abs=0.7)


def test_pairs_are_refined_one_by_one_whatever_else_is_in_the_batch():
    source, target = blobs([(30, 34), (33, 30), (31, 31)]), blobs([(32, 32)] * 3)
    start = torch.zeros(3, 2, 64, 64)
    together = refine(start, source, target, OPTIONS)
    alone = refine(start[1:2], source[1:2], target[1:2], OPTIONS)
    assert torch.allclose(together[1:2], alone, atol=1e-3)


def test_sides_may_differ_and_no_gradient_is_left_behind():
    source, target = blobs([(30, 34)])[..., :40], blobs([(32, 32)])[..., :40]
    start = torch.zeros(1, 2, 64, 40, requires_grad=True)
    with torch.no_grad():
        field = refine(start, source, target, OPTIONS)
    assert field.shape == (1, 2, 64, 40) and not field.requires_grad and start.grad is None


def test_volumes_are_refined_as_images_are():
    grid = torch.stack(torch.meshgrid(*[torch.arange(28.0)] * 3, indexing="ij"))
    at = lambda *centre: torch.exp(-(grid - torch.tensor(centre).reshape(3, 1, 1, 1)).square().sum(0) / 30)[None, None]
    source, target = at(12.0, 15.0, 14.0), at(14.0, 14.0, 14.0)
    options = params.Section(OPTIONS | {"steps": [40, 20]})  # which are shorter in so small a volume
    field = refine(torch.zeros(1, 3, 28, 28, 28), source, target, options)
    before, after = gncc(source, target), gncc(warp(source, field), target)
    assert float(1 - after) < 0.2 * float(1 - before) and folding(field).max() < 0.01
    assert field[0, :, 14, 14, 14].tolist() == pytest.approx([-2, 1, 0], abs=0.5)
