"""ANTs is not a dependency: what is ours about it is tested without, and the whole where it is installed."""

import sys

import numpy as np
import pytest
import torch

from lib import DataError
from lib.methods import ants, table
from lib.results import grid
from lib.runs import params
from lib.runs.params import Section


class Image:
    """As much of an ANTs image as the fusions read."""

    def __init__(self, array):
        self.array, self.shape = np.asarray(array), np.shape(array)

    def numpy(self):
        return self.array


def test_most_masks_decide_and_background_is_one_of_the_labels():
    moved = [(None, Image(mask)) for mask in ([0, 1, 2, 0], [0, 1, 2, 1], [0, 0, 1, 2])]
    assert ants.majority(Image(np.zeros(4)), moved, 2).tolist() == [0, 1, 2, 0]


def test_without_antspyx_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ants", None)
    with pytest.raises(DataError, match=r"pip install -r benchmarks/requirements.txt"):
        ants.load_ants()


def test_an_item_of_an_untrained_method_is_its_evaluation_alone():
    item = grid.Item("strong", 1, 1, stage="ants")
    assert grid.notebooks_of(item) == [grid.EVALUATION]
    assert table.by_stage("ants") not in table.stages_of("paper", 1) + table.stages_of("strong", 1)


def test_its_key_knows_how_many_atlases_there_are_and_nothing_of_training(monkeypatch):
    item, settings = grid.Item("strong", 1, 1, stage="ants"), params.load("strong", "midbrain")
    key = lambda **changes: (
        [monkeypatch.setenv("JOINT_SET", ",".join(f"{k}={v}" for k, v in changes.items()))]
        and (grid.key_of(item, settings))
    )
    plain = key()
    assert key(**{"strong.training.steps": 7}) == plain
    assert key(**{"pseudo_masks.n": 3}) != plain


def test_shifted_copies_are_found_again_by_both_fusions():
    pytest.importorskip("ants")

    def blob(row, column):
        rows, columns = np.mgrid[:48, :48]
        return np.exp(-(((rows - row) / 9) ** 2 + ((columns - column) / 6) ** 2))

    images = torch.as_tensor(np.stack([blob(20, 20), blob(26, 28), blob(24, 24)]), dtype=torch.float32)[:, None]
    masks = torch.cat((images > 0.5, (images > 0.2) & (images <= 0.5)), 1).float()
    data = Section(images=images, masks=masks, labelled=torch.tensor([0, 1]), as_index=torch.as_tensor)
    trial = Section(
        data=data,
        settings=Section(seed=1, pseudo_masks=Section(n=5)),
        numerics=Section(generator=lambda *names: None),
        draw_sources=lambda index, count, generator: torch.tensor([[0, 1]]),
    )
    found = ants.predict(trial, [2])
    overlap = lambda mask: (mask * masks[2]).sum((1, 2)) * 2 / (mask + masks[2]).sum((1, 2))
    for prediction in found.values():
        assert (overlap(prediction.masks[0]) > overlap(masks[0]) + 0.2).all()
    assert set(found) == {"ants", "ants-jlf"}
