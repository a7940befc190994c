import pytest
import torch

from lib import augment
from lib.runs import params


def smooth_mask(size=64):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.exp(-((rows - 30) ** 2 / 90 + (columns - 35) ** 2 / 50)).expand(4, 1, size, size)


@pytest.mark.parametrize("ranges", [{"rotation": 20}, {"shift": 0.1}, {"flip": True},
                                    {"rotation": 20, "scaling": 0.15, "shift": 0.1, "flip": True}])
def test_every_augmentation_followed_by_its_inverse_returns_a_smooth_mask(ranges):
    mask = smooth_mask()
    maps = augment.draw_affine(4, 64, torch.Generator().manual_seed(3), **ranges)
    moved = maps.apply(mask, "zeros")
    assert (moved - mask).abs().max() > 0.1
    assert (maps.inverse().apply(moved, "zeros") - mask).abs().max() < 0.03


def test_a_quarter_turn_is_exact():
    image = torch.rand(1, 1, 9, 9)
    turn = augment.Affine(torch.tensor([[[0.0, -1.0], [1.0, 0.0]]]), torch.zeros(1, 2))
    assert torch.allclose(turn.apply(image), torch.rot90(image, -1, (2, 3)), atol=1e-5)


def test_contrast_keeps_the_mean_and_one_is_the_identity():
    image = 0.3 + 0.4 * torch.rand(3, 1, 16, 16)
    assert torch.allclose(augment.change_contrast(image, torch.ones(3)), image)
    changed = augment.change_contrast(image, torch.full((3,), 1.2))
    assert torch.allclose(changed.mean(dim=(1, 2, 3)), image.mean(dim=(1, 2, 3)), atol=1e-5)


def test_training_augmentation_moves_image_and_mask_alike_and_stays_in_range():
    settings = params.load().augmentation
    plain = params.Section(settings, gamma=0, contrast=0, brightness=0, noise_std=0)
    mask = smooth_mask().contiguous()
    image, moved = augment.augment(mask, mask, torch.Generator().manual_seed(1), plain, flip=True)
    assert (image - moved).abs().mean() < 1e-3
    image, moved = augment.augment(mask, mask, torch.Generator().manual_seed(1), settings, flip=True)
    assert 0 <= float(image.min()) and float(image.max()) <= 1


def test_the_same_seed_gives_the_same_batch():
    settings, mask = params.load().augmentation, smooth_mask()
    first, second = (augment.augment(mask, mask, torch.Generator().manual_seed(7), settings, True) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
