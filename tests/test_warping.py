import torch

from lib import warping


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


def test_zero_displacement_is_the_identity():
    image = torch.rand(2, 3, 17, 23)
    assert torch.allclose(warping.warp(image, torch.zeros(2, 2, 17, 23)), image, atol=1e-5)


def test_constant_displacement_shifts_by_exactly_so_many_pixels():
    image = torch.rand(1, 1, 20, 30)
    displacement = torch.zeros(1, 2, 20, 30)
    displacement[:, 0], displacement[:, 1] = 3, -5
    warped = warping.warp(image, displacement)
    assert torch.allclose(warped[..., :-3, 5:], image[..., 3:, :-5], atol=1e-5)


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
    assert torch.allclose(warping.upsample_displacement(displacement), torch.full((1, 2, 16, 24), 3.0))


def test_upsampled_displacement_is_the_same_motion():
    coarse = smooth_displacement(24, 1.0)
    fine = warping.upsample_displacement(coarse)
    image = smooth_image(48)
    shrink = lambda x: torch.nn.functional.avg_pool2d(x, 2)
    difference = shrink(warping.warp(image, fine)) - warping.warp(shrink(image), coarse)
    assert difference[..., 4:-4, 4:-4].abs().max() < 0.03


def test_jacobian_determinant_of_an_affine_map_is_its_determinant():
    matrix = torch.tensor([[1.2, 0.3], [-0.1, 0.8]])
    grid = warping.pixel_grid((20, 20), torch.device("cpu"))
    displacement = torch.einsum("ij,bjhw->bihw", matrix - torch.eye(2), grid)
    assert torch.allclose(warping.jacobian_determinant(displacement), torch.linalg.det(matrix), atol=1e-4)
    assert float(warping.folding(displacement)) == 0


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
