import pytest
import torch

from lib import pseudo_masks
from lib.compute import Numerics
from lib.models import MrRegNet, ResidualUNet
from lib.runs import params

SIDE = 32


def squares(places):
    """Images ``(n, 1, side, side)`` of one square each, brighter from image to image, and the squares as masks of two
    classes, as strong as they are bright and half as strong; ``places`` are their upper left corners."""
    images = torch.zeros(len(places), 1, SIDE, SIDE)
    for k, (row, column) in enumerate(places):
        images[k, 0, row : row + 5, column : column + 5] = (k + 1) / 10
    return images, torch.cat((images, images / 2), 1)


def corners(images):
    """The upper left corner of every image's square: ``(n, 2)``."""
    return torch.stack([(image[0] > 0).nonzero().amin(0) for image in images])


class Shift(torch.nn.Module):
    """A registration that knows where the squares are: warped by its field a source lies upon its target."""

    def register(self, source, target):
        by = (corners(source) - corners(target)).float()  # at x lies what was at x + by
        return by[:, :, None, None].expand(-1, -1, *target.shape[-2:])


class Equivariant(torch.nn.Module):
    """A network that sees every pixel by itself, so that its masks move with the image."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def segment(self, images):
        self.seen.append(images)
        return torch.cat((images, 1 - images, torch.ones_like(images)), 1)


class Sideways(Equivariant):
    """One whose masks lie five columns beside what they are of."""

    def segment(self, images):
        return super().segment(images).roll(5, dims=-1)


@pytest.mark.parametrize("changes", [{}, {"shift": 0.1}, {"rotation": 60, "shift": 0.2}])
def test_masks_of_augmented_views_are_mapped_back_to_where_the_image_is(changes):
    """Wherever a pixel stays in view, every one of the N masks is the plain one."""
    numerics = Numerics("cpu", "float32")
    settings = params.Section(params.load().pseudo_masks, contrast=0.0, **changes)
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.stack(
        [0.4 + 0.3 * torch.sin(rows / 9 + k) * torch.cos(columns / 7) + columns / 300 for k in range(3)]
    )[:, None]

    def masks_by(network):
        return pseudo_masks.segmentation_masks(network, images, 6, numerics.generator(1), settings, True, numerics)

    network = Equivariant()
    masks = masks_by(network)
    assert torch.equal(masks[0, :, :1], images)
    assert all((seen - images).abs().mean() > 0.05 for seen in network.seen[1:])  # other views they are
    in_view = (masks[:, :, 2:] > 0.999).expand(-1, -1, 2, -1, -1)
    assert in_view.float().mean() > 0.5
    apart = (masks[:, :, :2] - masks[:1, :, :2]).abs()
    assert apart[in_view].max() < 0.02
    wrong = masks_by(Sideways())
    assert (wrong[1:, :, :2] - wrong[:1, :, :2]).abs()[in_view[1:]].max() > 0.1


def test_masks_and_images_are_warped_onto_the_target_each_from_its_own_source():
    numerics = Numerics("cpu", "float32")
    targets, _ = squares([(4, 6), (20, 9), (11, 22)])
    sources, masks = squares([(2, 2), (15, 3), (9, 20), (25, 25)])
    choice = torch.tensor([[0, 3], [2, 1], [3, 0]])
    found, warped, fields = pseudo_masks.registration_masks(Shift(), targets, sources, masks, choice, numerics)
    assert found.shape == (2, 3, 2, SIDE, SIDE) and warped.shape == (2, 3, 1, SIDE, SIDE)
    for k in range(2):
        for image, source in enumerate(choice[:, k].tolist()):
            there = (targets[image] > 0) * (source + 1) / 10  # the target's place, the source's brightness
            assert torch.allclose(warped[k, image], there, atol=1e-5)
            assert torch.allclose(found[k, image], torch.cat((there, there / 2)), atol=1e-5)
            by = corners(sources)[source] - corners(targets)[image]
            assert fields[k, image, :, 7, 7].tolist() == by.tolist() and by.abs().max() > 0


@pytest.fixture
def parts():
    torch.manual_seed(0)
    numerics = Numerics("cpu")
    networks = numerics.place(ResidualUNet(classes=2)), numerics.place(MrRegNet())
    return numerics, networks, torch.rand(7, 1, 32, 32), torch.rand(3, 1, 32, 32), torch.rand(3, 2, 32, 32)


@pytest.mark.parametrize("sources", ["random", "best"])
def test_the_soft_pseudo_mask_is_the_mean_of_the_2n_masks_and_in_range(parts, sources):
    numerics, networks, images, labelled, masks = parts
    settings = params.Section(params.load().pseudo_masks, sources=sources)
    result = pseudo_masks.generate(networks, images, labelled, masks, settings, True, numerics.generator(1), numerics)
    assert result.soft.shape == (7, 2, 32, 32)
    assert float(result.soft.min()) >= 0 and float(result.soft.max()) <= 1
    assert torch.allclose(result.soft, (result.segmentation + result.registration) / 2, atol=1e-6)
    assert result.folding.shape == (7,)


def test_the_first_of_the_n_segmentation_masks_is_the_plain_one(parts):
    numerics, (network, _), images, *_ = parts
    with torch.no_grad():
        masks = pseudo_masks.segmentation_masks(
            network, images, 3, numerics.generator(1), params.load().pseudo_masks, True, numerics
        )
        assert masks.shape == (3, 7, 2, 32, 32)
        with numerics.autocast():
            plain = network.segment(images)
        assert torch.equal(masks[0], plain) and not torch.equal(masks[1], masks[0])


def test_an_untrained_registration_returns_the_source_masks(parts):
    numerics, (_, network), images, labelled, masks = parts
    with torch.no_grad():
        warped, _, displacements = pseudo_masks.registration_masks(
            network, images, labelled, masks, torch.tensor([[0, 2]] * 7), numerics
        )
    assert displacements.abs().max() < 0.2
    assert (warped[1] - masks[2]).abs().max() < 0.2


def test_sources_differ_while_there_are_enough_and_repeat_otherwise():
    generator = torch.Generator().manual_seed(0)
    assert all(len(set(row)) == 5 for row in pseudo_masks.draw_sources(50, 9, 5, generator).tolist())
    assert all(set(row) == {0, 1, 2} for row in pseudo_masks.draw_sources(50, 3, 5, generator).tolist())


def test_best_sources_put_the_target_itself_first(parts):
    numerics, (_, network), _, labelled, masks = parts
    with torch.no_grad():
        chosen = pseudo_masks.best_sources(network, labelled, labelled, masks, 2, 20, numerics.generator(0), numerics)
    assert chosen[:, 0].tolist() == [0, 1, 2]


def test_the_same_seed_gives_the_same_masks(parts):
    numerics, networks, images, labelled, masks = parts
    first, second = (
        pseudo_masks.generate(
            networks, images, labelled, masks, params.load().pseudo_masks, True, numerics.generator(5), numerics
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_no_labelled_image_is_an_error(parts):
    numerics, networks, images, labelled, masks = parts
    with pytest.raises(ValueError, match="labelled image"):
        pseudo_masks.generate(
            networks, images, labelled[:0], masks[:0], params.load().pseudo_masks, True, numerics.generator(5), numerics
        )


def test_mean_confidence_is_one_for_hard_masks_and_half_for_undecided_ones():
    hard = torch.zeros(1, 1, 8, 8)
    hard[..., 2:5, 2:5] = 1
    assert float(pseudo_masks.mean_confidence(hard)) == 1
    assert float(pseudo_masks.mean_confidence(0.5 * hard)) == 0.5
    assert float(pseudo_masks.mean_confidence(0 * hard)) == 1


def test_slices_of_a_volume_weigh_by_what_is_marked_in_them():
    soft = torch.zeros(4, 1, 8, 8)
    soft[0, 0, 0, :1] = 0.9  # one pixel of 0.9 and three of 0.5, on two slices of volume 1; its third is empty
    soft[2, 0, 0, :3] = 0.5
    soft[3, 0, 0, :2] = 0.8  # volume 0
    found = pseudo_masks.mean_confidence(soft, torch.tensor([1, 1, 1, 0]))
    assert found.tolist() == pytest.approx([0.6, 0.6, 0.6, 0.8])
