import pytest
import torch

from lib import warping

SPACES = [(24, 30), (16, 20, 18)]


def smooth_field(space, amplitude=1.0, seed=0):
    """A smooth field ``(1, axes, *space)`` with two or three axes."""
    coarse = torch.randn(1, len(space), *[3] * len(space), generator=torch.Generator().manual_seed(seed))
    return amplitude * warping.interpolate(coarse, space)


def smooth_displacement(size=48, amplitude=2.0, seed=0):
    coarse = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * amplitude
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)


def invert(displacement, iterations=30):
    """The inverse displacement, by fixed-point iteration; valid where the field does not fold."""
    inverse = torch.zeros_like(displacement)
    for _ in range(iterations):
        inverse = -warping.warp(displacement, inverse)
    return inverse


def smooth_image(size=48):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (0.5 + 0.25 * torch.sin(rows / 6) + 0.25 * torch.cos(columns / 5)).expand(2, 1, size, size)


@pytest.mark.parametrize("space", [(17, 23), (9, 11, 14)])
def test_zero_displacement_is_the_identity(space):
    image = torch.rand(2, 3, *space)
    assert torch.allclose(warping.warp(image, torch.zeros(2, len(space), *space)), image, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_constant_displacement_shifts_by_exactly_so_many_pixels(space):
    image, shift = torch.rand(1, 1, *space), (3, -5, 2)[: len(space)]
    displacement = torch.zeros(1, len(space), *space)
    for axis, by in enumerate(shift):
        displacement[:, axis] = by
    warped = warping.warp(image, displacement)
    inside = [slice(max(0, -by), side - max(0, by)) for by, side in zip(shift, space)]
    source = [slice(part.start + by, part.stop + by) for part, by in zip(inside, shift)]
    assert torch.allclose(warped[0, 0][tuple(inside)], image[0, 0][tuple(source)], atol=1e-5)
    assert torch.allclose(warped[0, 0, -4:], warped[0, 0, -4:-3], atol=1e-5)  # beyond the last row it is repeated


@pytest.mark.parametrize("space", SPACES)
def test_there_and_back_is_nowhere_in_two_and_three_dimensions(space):
    there = smooth_field(space)
    back = invert(there)
    inside = (..., *[slice(4, -4)] * len(space))
    for first, second in ((there, back), (back, there)):
        missed = warping.compose(first, second)[inside].abs().max()
        assert missed < 0.08 * there[inside].abs().max() and there[inside].abs().max() > 1.5
    assert warping.inverse_consistency_error(there, there).min() > 0.5  # it is the inverse that does it


@pytest.mark.parametrize(
    "matrix",
    [
        [[1.2, 0.3], [-0.1, 0.8]],
        [[1.2, 0.3, -0.2], [-0.1, 0.8, 0.4], [0.3, -0.2, 1.1]],
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]],  # two axes exchanged: it folds
    ],
)
def test_jacobian_determinant_of_an_affine_map_is_its_determinant(matrix):
    matrix = torch.tensor(matrix)
    axes = len(matrix)
    grid = warping.pixel_grid((12, 11, 10)[:axes], torch.device("cpu"))
    displacement = torch.einsum("ij,bj...->bi...", matrix - torch.eye(axes), grid)
    determinant = torch.linalg.det(matrix)
    assert torch.allclose(warping.jacobian_determinant(displacement), determinant, atol=1e-4)
    assert float(warping.folding(displacement)) == float(determinant < 0)


def test_a_translated_mask_keeps_its_area():
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 10:20, 12:25] = 1
    moved = warping.warp(mask, torch.full((1, 2, 40, 40), 4.25))
    assert abs(float(moved.sum()) - 130) < 1e-2


def test_warp_and_inverse_nearly_cancel():
    displacement, image = smooth_displacement(), smooth_image()
    inverse = invert(displacement)
    inside = (..., slice(8, -8), slice(8, -8))
    back = warping.warp(warping.warp(image, displacement), inverse)
    assert (back - image)[inside].abs().max() < 0.02
    assert warping.compose(displacement, inverse)[inside].abs().max() < 0.05


def test_compose_is_warping_twice():
    first, second, image = smooth_displacement(seed=1), smooth_displacement(seed=2), smooth_image()
    twice = warping.warp(warping.warp(image, first), second)
    once = warping.warp(image, warping.compose(first, second))
    assert (twice - once)[..., 8:-8, 8:-8].abs().max() < 0.02


def test_upsampling_doubles_a_displacement():
    displacement = torch.full((1, 2, 8, 12), 1.5)
    assert torch.allclose(warping.upsample_displacement(displacement, (2, 2)), torch.full((1, 2, 16, 24), 3.0))
    volume = torch.full((1, 3, 4, 6, 5), 1.5)
    assert torch.allclose(warping.upsample_displacement(volume, (2, 2, 2)), torch.full((1, 3, 8, 12, 10), 3.0))
    flat = warping.upsample_displacement(volume, (1, 2, 2))  # slices stay as far apart as they are
    assert flat.shape == (1, 3, 4, 12, 10) and flat[:, 0].unique() == 1.5 and flat[:, 1:].unique() == 3


def test_upsampled_displacement_is_the_same_motion():
    coarse = smooth_displacement(24, 1.0)
    fine = warping.upsample_displacement(coarse, (2, 2))
    image = smooth_image(48)
    shrink = lambda x: torch.nn.functional.avg_pool2d(x, 2)
    difference = shrink(warping.warp(image, fine)) - warping.warp(shrink(image), coarse)
    assert difference[..., 4:-4, 4:-4].abs().max() < 0.03


def test_a_mirror_folds_everywhere():
    grid = warping.pixel_grid((16, 16), torch.device("cpu"))
    mirror = torch.cat((torch.zeros_like(grid[:, :1]), 15 - 2 * grid[:, 1:]), 1)
    assert float(warping.folding(mirror)) == 1


def test_a_field_and_its_inverse_are_consistent():
    there = smooth_displacement()
    assert warping.inverse_consistency_error(there, invert(there)).max() < 0.15
    assert torch.equal(warping.inverse_consistency_error(0 * there, 0 * there), torch.zeros(2))


def test_inconsistency_is_the_distance_by_which_the_start_is_missed():
    there, back = torch.zeros(2, 1, 2, 16, 16)
    there[:, 0], back[:, 1] = 3, 4
    assert warping.inverse_consistency_error(there, back).item() == 5
