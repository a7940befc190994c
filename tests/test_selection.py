import numpy as np
import pytest
import torch
from test_training import made_up_cohort

from lib import selection
from lib.compute import Numerics
from lib.methods import joint_plus, pretraining
from lib.methods.experiment import Experiment
from lib.runs import params


def test_the_first_choice_is_the_most_central_and_the_second_covers_what_it_misses():
    similarity = np.array(
        [
            [0.9, 0.9, 0.1, 0.1],  # good for the first two
            [0.9, 0.8, 0.1, 0.1],  # nearly as good, for the same ones
            [0.6, 0.6, 0.6, 0.3],  # the best mean
            [0.1, 0.1, 0.2, 1.0],  # the only one that is good for the last
        ]
    )
    assert selection.cover(similarity, 2) == [2, 3]
    assert selection.cover(similarity, 3) == [2, 3, 0]
    assert sorted(selection.cover(similarity, 9)) == [0, 1, 2, 3]


def test_an_image_is_similar_to_itself_and_a_trained_registration_raises_similarity():
    class Identity(torch.nn.Module):
        def register(self, source, target):
            return torch.zeros(len(target), 2, *target.shape[-2:])

    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    everything = torch.arange(5)
    found = selection.similarities(Identity(), images, everything, everything[:3], Numerics("cpu", "float32"))
    assert found.shape == (5, 3) and found.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert (found.fill_diagonal_(0) < 0.9).all()


def test_labelled_by_coverage_labels_other_images_and_keeps_them_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    plain = params.load("strong")
    made_up_cohort().save(params.cohort_file(plain))
    before = Experiment(plain)
    with pytest.raises(FileNotFoundError, match="run the notebook of the stage before"):
        _ = Experiment(params.load("strong", variant="labelled by coverage")).data.labelled
    pretraining.pretrain_segmentation(before)
    pretraining.pretrain_registration(before)
    after = Experiment(params.load("strong", variant="labelled by coverage"))
    first, second = before.data, after.data
    assert sorted(second.ordered.tolist()) == sorted(first.ordered.tolist())  # the same images, in another order
    assert second.labelled.tolist() != first.labelled.tolist() and len(second.labelled) == len(first.labelled) == 5
    assert not set(second.labelled.tolist()) & set(second.unlabelled.tolist())
    again = Experiment(params.load("strong", variant="labelled by coverage"))
    assert again.data.labelled.tolist() == second.labelled.tolist()
    assert after.cabinet.folder("segmentation") != before.cabinet.folder("segmentation")
    assert after.cabinet.folder("registration") == before.cabinet.folder("registration")
    pretraining.pretrain_segmentation(after)
    assert len(joint_plus.joint_plus_rounds(after).measured)
