import pytest
import torch

from lib import losses, warping
from lib.compute import Numerics
from lib.models import HALVED, MrRegNet, ResidualUNet, pad_to_multiple, strides_of


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_sizes_are_the_papers():
    assert parameters(ResidualUNet()) == pytest.approx(1.9e6, rel=0.03)
    assert parameters(MrRegNet()) == pytest.approx(0.31e6, rel=0.03)


@pytest.mark.parametrize("side", [(64, 64), (50, 61), (17, 33)])
@pytest.mark.parametrize("normalisation", ["none", "instance"])
def test_any_image_size_and_any_number_of_classes(side, normalisation):
    image = torch.rand(2, 1, *side)
    masks = ResidualUNet(classes=3, normalisation=normalisation).segment(image)
    assert masks.shape == (2, 3, *side) and masks.dtype == torch.float32
    assert float(masks.min()) >= 0 and float(masks.max()) <= 1
    assert MrRegNet(normalisation).register(image, image).shape == (2, 2, *side)


def test_padding_repeats_the_edge_and_leaves_divisible_images_alone():
    image = torch.rand(1, 1, 20, 32)
    (padded,) = pad_to_multiple(HALVED, image)
    assert padded.shape == (1, 1, 32, 32) and torch.equal(padded[..., 20:, :], image[..., -1:, :].expand(1, 1, 12, 32))
    assert pad_to_multiple(HALVED, padded)[0] is padded


@pytest.mark.parametrize(
    "spacing, space, wanted",
    [
        ((1, 1, 1), None, [(2, 2, 2)] * 4),
        ((10, 1.4, 1.4), None, [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]),  # the heart: 10 mm between slices
        ((2, 1), None, [(1, 2), (2, 2), (2, 2), (2, 2)]),
        ((1, 1, 1), (7, 48, 48), [(1, 2, 2)] * 3 + [(1, 1, 1)]),  # seven slices stay seven; six pixels stay six
    ],
)
def test_long_voxels_are_halved_when_the_others_have_caught_up(spacing, space, wanted):
    assert strides_of(spacing, space) == wanted


@pytest.mark.parametrize("strides", [strides_of((1, 1, 1)), strides_of((3, 1, 1))])
@pytest.mark.parametrize("normalisation", ["none", "instance"])
def test_volumes_of_any_size_go_through_both_networks(strides, normalisation):
    volume = torch.rand(1, 1, 9, 35, 40)
    masks = ResidualUNet(2, normalisation, root=4, strides=strides).segment(volume)
    assert masks.shape == (1, 2, 9, 35, 40) and torch.isfinite(masks).all()
    network = MrRegNet(normalisation, channels=4, strides=strides)
    assert network.register(volume, volume).shape == (1, 3, 9, 35, 40)
    levels = network(*pad_to_multiple(strides, volume, volume))
    for (below, _), (displacement, residual), stride in zip(levels, levels[1:], reversed(strides)):
        grown = [side * by for side, by in zip(below.shape[2:], stride)]
        assert list(displacement.shape[2:]) == grown and displacement.shape == residual.shape


def test_displacement_is_twice_the_level_below_plus_the_residual():
    network = MrRegNet()
    for head in network.heads:
        torch.nn.init.normal_(head.weight, std=0.1)
    levels = network(torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64))
    assert [level[0].shape[-1] for level in levels] == [4, 8, 16, 32, 64]
    for (below, _), (displacement, residual) in zip(levels, levels[1:]):
        assert torch.allclose(displacement, warping.upsample_displacement(below, (2, 2)) + residual, atol=1e-5)


def test_mrregnet_learns_a_known_shift():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    torch.manual_seed(0)
    network = MrRegNet(channels=16)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)

    def blobs(n):
        centre = 12 + 8 * torch.rand(n, 2, 1, 1, generator=generator)
        at = lambda c: torch.exp(-((rows - c[:, 0]) ** 2 / 30 + (columns - c[:, 1]) ** 2 / 12))[:, None]
        shift = torch.tensor([3.0, -2.0]).reshape(1, 2, 1, 1)
        return at(centre), at(centre - shift)  # source(x + shift) = target(x)

    for _ in range(120):
        source, target = blobs(8)
        loss = losses.registration_loss(network(source, target), source, target, (8, 4, 2, 1, 0.5)).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    source, target = blobs(16)
    with torch.no_grad():
        displacement = network.register(source, target)
    weight = target / target.sum(dim=(1, 2, 3), keepdim=True)
    found = (displacement * weight).sum(dim=(2, 3)).mean(dim=0)
    assert torch.allclose(found, torch.tensor([3.0, -2.0]), atol=0.5), found
    assert losses.gncc(warping.warp(source, displacement), target).mean() > 0.97


def test_bfloat16_autocast_agrees_with_float32_and_leaves_outputs_in_float32():
    numerics = Numerics("cpu", "bfloat16")
    torch.manual_seed(0)
    segmentation, registration = numerics.place(ResidualUNet()), numerics.place(MrRegNet())
    image, target = numerics.tensor(torch.rand(2, 1, 64, 64)), numerics.tensor(torch.rand(2, 1, 64, 64))
    reference = segmentation.segment(image), registration.register(image, target)
    with numerics.autocast():
        masks, displacement = segmentation.segment(image), registration.register(image, target)
    assert masks.dtype == displacement.dtype == torch.float32
    assert (masks - reference[0]).abs().max() < 0.02
    assert (displacement - reference[1]).abs().max() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_agrees_with_cpu():
    torch.manual_seed(0)
    network, image = ResidualUNet(normalisation="instance"), torch.rand(2, 1, 64, 64)
    reference = network.segment(image)
    gpu = Numerics("cuda", "float32")
    assert (gpu.place(network).segment(gpu.tensor(image)).cpu() - reference).abs().max() < 5e-3
