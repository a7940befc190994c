"""What must hold on a GPU; skipped where there is none."""

import copy

import pytest
import torch
from test_training import made_up_cohort

from lib import augment, warping
from lib.compute import Numerics
from lib.methods import pretraining
from lib.methods.experiment import Experiment
from lib.methods.peers import bcp, elastic, joint_plus
from lib.models import MrRegNet, ResidualUNet
from lib.refinement import refine
from lib.runs import params

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
PEERS = {"elastic": elastic, "bcp": bcp, "joint_plus": joint_plus}


def smooth(n, channels, space, seed=0):
    """Smooth random images in [0, 1], on the CPU."""
    coarse = torch.rand(n, channels, *[6] * len(space), generator=torch.Generator().manual_seed(seed))
    return warping.interpolate(coarse, space)


def experiment(steps=30, **more):
    """A small one on the GPU, in float32, with sums in a fixed order."""
    settings = params.load("strong", seed=1)
    settings |= {"device": "cuda", "precision": "float32", "deterministic": True, **more}
    settings.segmentation |= {"epochs": 20, "max_steps": steps}
    settings.strong.training |= {"steps": steps, "batch": 8}
    made_up_cohort().save(params.cohort_file(settings))
    return Experiment(settings)


def far(found, expected):
    """The relative distance of two tensors."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("space", [(48, 64), (16, 24, 32)])
@pytest.mark.parametrize("make", [ResidualUNet, MrRegNet])
def test_networks_give_the_numbers_of_the_cpu(make, space):
    torch.manual_seed(0)
    strides = [[2] * len(space)] * 4
    network = make(normalisation="instance", strides=strides)
    inputs = [smooth(2, 1, space, seed) for seed in range(1 if make is ResidualUNet else 2)]
    give = lambda net, images: net.segment(*images) if make is ResidualUNet else net.register(*images)
    numerics = Numerics("cuda", "float32")
    with torch.no_grad():
        expected = give(copy.deepcopy(network), inputs)
        assert far(give(numerics.place(network), [numerics.tensor(image) for image in inputs]), expected) < 1e-3


@pytest.mark.parametrize("space", [(48, 64), (16, 24, 32)])
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sampling_gives_the_numbers_of_the_cpu(space, padding, channels):
    images, numerics = smooth(3, channels, space), Numerics("cuda", "float32")
    moved = warping.pixel_grid(space, torch.device("cpu")) + 3 * torch.randn(3, len(space), *space)
    expected = warping.sample(images, moved, padding)
    assert far(warping.sample(numerics.tensor(images), moved.cuda(), padding), expected) < 1e-4


def test_refined_fields_look_like_those_of_the_cpu():
    options = params.load().refinement
    source, target = smooth(2, 1, (32, 32), 1), smooth(2, 1, (32, 32), 2)
    start = torch.zeros(2, 2, 32, 32)
    expected = refine(start, source, target, options)
    assert far(refine(start.cuda(), source.cuda(), target.cuda(), options), expected) < 1e-2


def test_lit_images_are_those_that_went_in():
    """Blurred, made coarser and noisy: what blurring leaves in memory once made pooling read past its end."""
    images, numerics = smooth(16, 1, (64, 64)), Numerics("cuda", "float32")
    for draw in range(20):
        lit = augment.light(numerics.tensor(images), numerics.generator(draw), params.load().strong.augmentation)
        assert lit.isfinite().all() and far(lit, images) < 0.5


def test_moving_images_never_waits_for_the_gpu():
    options, generator = params.load().strong.augmentation, Numerics("cuda").generator(1)
    images = smooth(4, 1, (32, 32)).cuda()
    augment.place(images, images, generator, options, flip=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment.place(images, images, generator, options, flip=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", PEERS)
def test_training_twice_gives_the_same_bits(name):
    found = []
    for _ in range(2):
        run = experiment()
        if name == "joint_plus":
            pretraining.pretrain_registration(run)
        for file in params.work_folder("checkpoints").glob("*.pt"):
            file.unlink()
        found.append(PEERS[name].train(run)[0].state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns_as_on_the_cpu(precision):
    histories = [
        elastic.train(experiment(60, device=device, precision=precision))[1].history for device in ("cpu", "cuda")
    ]
    cpu, gpu = (history["loss"].tail(10).mean() for history in histories)
    assert gpu < histories[1]["loss"].iloc[0] and abs(gpu - cpu) < 0.15
