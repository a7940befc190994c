import pytest
import torch

from lib import pseudo_masks
from lib.compute import Numerics
from lib.models import MrRegNet, ResidualUNet
from lib.runs import params


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
    assert 0 <= float(result.soft.min()) and float(result.soft.max()) <= 1
    assert torch.allclose(result.soft, (result.segmentation + result.registration) / 2, atol=1e-6)
    assert result.folding.shape == (7,)


def test_the_first_of_the_n_segmentation_masks_is_the_plain_one(parts):
    numerics, (network, _), images, *_ = parts
    with torch.no_grad():
        masks = pseudo_masks.segmentation_masks(
            network, images, 3, numerics.generator(1), params.load().pseudo_masks, True, numerics)
        assert masks.shape == (3, 7, 2, 32, 32)
        with numerics.autocast():
            plain = network.segment(images)
        assert torch.equal(masks[0], plain) and not torch.equal(masks[1], masks[0])


def test_an_untrained_registration_returns_the_source_masks(parts):
    numerics, (_, network), images, labelled, masks = parts
    with torch.no_grad():
        warped, _, displacements = pseudo_masks.registration_masks(
            network, images, labelled, masks, torch.tensor([[0, 2]] * 7), numerics)
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
        pseudo_masks.generate(networks, images, labelled, masks, params.load().pseudo_masks, True,
                              numerics.generator(5), numerics)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_no_labelled_image_is_an_error(parts):
    numerics, networks, images, labelled, masks = parts
    with pytest.raises(ValueError, match="labelled image"):
        pseudo_masks.generate(networks, images, labelled[:0], masks[:0], params.load().pseudo_masks, True,
                              numerics.generator(5), numerics)


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
