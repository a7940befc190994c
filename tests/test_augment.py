import pytest
import torch

from lib import augment
from lib.runs import params


def smooth_mask(size=64):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.exp(-((rows - 30) ** 2 / 90 + (columns - 35) ** 2 / 50)).expand(4, 1, size, size)


@pytest.mark.parametrize(
    "ranges",
    [{"rotation": 20}, {"shift": 0.1}, {"flip": True}, {"rotation": 20, "scaling": 0.15, "shift": 0.1, "flip": True}],
)
def test_every_augmentation_followed_by_its_inverse_returns_a_smooth_mask(ranges):
    mask = smooth_mask()
    maps = augment.draw_affine(4, (64, 64), torch.Generator().manual_seed(3), **ranges)
    moved = maps.apply(mask, "zeros")
    assert (moved - mask).abs().max() > 0.1
    assert (maps.inverse().apply(moved, "zeros") - mask).abs().max() < 0.03


@pytest.mark.parametrize("axes", [2, 3])
def test_an_affine_map_and_its_inverse_cancel_in_two_and_three_dimensions(axes):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(axes) + 0.1 * torch.randn(3, axes, axes, generator=generator)
    maps = augment.Affine(matrix, 2 * torch.randn(3, axes, generator=generator))
    grid = torch.stack(torch.meshgrid(*[torch.arange(56.0)] * axes, indexing="ij"))
    blob = torch.exp(-((grid - 27).square().sum(0) / 90)).expand(3, 1, *[56] * axes)
    moved = maps.apply(blob, "zeros")
    assert (moved - blob).abs().amax(dim=tuple(range(1, axes + 2))).min() > 0.1
    assert (maps.inverse().apply(moved, "zeros") - blob).abs().max() < 0.03
    assert (maps.apply(moved, "zeros") - blob).abs().max() > 0.1  # twice is not there and back


def test_a_quarter_turn_of_a_volume_is_exact_about_every_axis():
    volume = torch.rand(1, 1, 7, 7, 7)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        matrix = torch.eye(3)
        matrix[first, first] = matrix[second, second] = 0
        matrix[first, second], matrix[second, first] = -1, 1
        turned = augment.Affine(matrix[None], torch.zeros(1, 3)).apply(volume)
        assert torch.allclose(turned, torch.rot90(volume, -1, (2 + first, 2 + second)), atol=1e-5)


def test_a_quarter_turn_is_exact():
    image = torch.rand(1, 1, 9, 9)
    turn = augment.Affine(torch.tensor([[[0.0, -1.0], [1.0, 0.0]]]), torch.zeros(1, 2))
    assert torch.allclose(turn.apply(image), torch.rot90(image, -1, (2, 3)), atol=1e-5)


def test_contrast_keeps_the_mean_and_one_is_the_identity():
    image = 0.3 + 0.4 * torch.rand(3, 1, 16, 16)
    assert torch.allclose(augment.change_contrast(image, torch.ones(3)), image)
    changed = augment.change_contrast(image, torch.full((3,), 1.2))
    assert torch.allclose(changed.mean(dim=(1, 2, 3)), image.mean(dim=(1, 2, 3)), atol=1e-5)


def test_volumes_are_turned_as_the_body_is_however_long_their_voxels_are():
    """In a volume with slices of 4 mm a ball in mm stays a ball in mm, wherever it is turned to."""
    spacing, space = (4.0, 1.0, 1.0), (24, 64, 64)
    maps = augment.draw_affine(6, space, torch.Generator().manual_seed(0), rotation=40, spacing=spacing)
    length = torch.tensor(spacing)
    in_mm = length[:, None] * maps.matrix / length
    assert torch.allclose(in_mm @ in_mm.transpose(1, 2), torch.eye(3).expand(6, 3, 3), atol=1e-5)
    assert not torch.allclose(in_mm, torch.eye(3).expand(6, 3, 3), atol=0.1)
    alike = augment.draw_affine(6, space, torch.Generator().manual_seed(0), rotation=40)
    assert torch.allclose(in_mm, alike.matrix, atol=1e-5)


def test_image_and_mask_of_a_volume_move_alike_and_smoothly():

    settings = params.load("strong").strong.augmentation
    grid = torch.stack(torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij"))
    ball = torch.exp(-((grid - 11).square().sum(0) / 12)).expand(3, 1, 24, 24, 24)
    ball = torch.where(ball > 0.05, ball, 0)  # at the edges, where image and mask differ by design, there is nothing
    moved, mask = augment.place(ball, ball.clone(), torch.Generator().manual_seed(1), settings, True)
    assert torch.allclose(moved, mask, atol=1e-3) and (moved - ball).abs().amax(dim=(1, 2, 3, 4)).min() > 0.1
    field = augment.elastic(2, (24, 20, 16), torch.Generator().manual_seed(2), 5, 2.0)
    assert field.shape == (2, 3, 24, 20, 16) and field.std() > 0.8
    assert all(field.diff(dim=axis).abs().max() < 4 for axis in (2, 3, 4))
    flat = augment.elastic(200, (8, 8, 8), torch.Generator().manual_seed(2), 5, [0.0, 1.0, 3.0])
    assert not flat[:, 0].any() and flat[:, 2].std() / flat[:, 1].std() == pytest.approx(3, rel=0.1)
    lit = augment.light(ball, torch.Generator().manual_seed(3), settings)
    assert lit.shape == ball.shape and lit.min() >= 0 and lit.max() <= 1
    sigma = torch.tensor([0.0, 0.5, 1.0])
    noise = torch.rand(3, 1, 24, 24, 24, generator=torch.Generator().manual_seed(4))
    spread = augment.blur(noise, sigma).flatten(1).std(1)
    assert spread[0] == pytest.approx(float(noise[0].std()), rel=1e-4) and spread[0] > spread[1] > spread[2]
