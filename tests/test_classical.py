import numpy as np
import pytest

from lib.methods import classical
from lib.runs import params


def blob(row, column, side=48):
    rows, columns = np.mgrid[:side, :side]
    shape = np.exp(-(((rows - row) / 9) ** 2 + ((columns - column) / 6) ** 2))
    return shape.astype(np.float32), (shape > 0.5).astype(np.float32)[None]


def overlap(first, second):
    return 2 * (first * second).sum() / (first.sum() + second.sum())


@pytest.fixture
def settings():
    return params.load().classical


def test_a_shifted_shape_is_found_again(settings):
    (source, source_mask), (target, target_mask) = blob(20, 20), blob(26, 24)
    assert overlap(source_mask, target_mask) < 0.6
    warped = classical.warp_masks(source_mask, classical.register(source, target, settings))
    assert overlap(warped > 0.5, target_mask) > 0.95


def test_demons_refines_what_no_affine_map_can(settings):
    (source, source_mask), (target, _) = blob(24, 24), blob(24, 24)
    rows = np.mgrid[:48, :48][0]
    bend = (4 * np.sin(rows / 6)).round().astype(int)
    bent = np.take_along_axis(target, np.clip(np.mgrid[:48, :48][1] + bend, 0, 47), axis=1)
    truth = (bent > 0.5)[None]
    affine_only = params.section({**settings, "demons_iterations": 0})
    alone = classical.warp_masks(source_mask, classical.register(source, bent, affine_only))
    both = classical.warp_masks(source_mask, classical.register(source, bent, settings))
    assert overlap(both > 0.5, truth) > overlap(alone > 0.5, truth) + 0.03


def test_the_mask_is_the_mean_over_sources(settings):
    (image, mask), (other, other_mask) = blob(24, 24), blob(20, 28)
    sources, masks = np.stack([image, other]), np.stack([mask, other_mask])
    found = classical.segment(image[None], sources, masks, [[0, 1]], settings)
    each = [classical.warp_masks(m, classical.register(s, image, settings)) for s, m in zip(sources, masks)]
    assert found.shape == (1, 1, 48, 48)
    assert np.allclose(found[0], np.mean(each, axis=0), atol=1e-6)
