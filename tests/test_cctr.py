import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import cctr, params
from lib.augment import Affine, draw_affine
from lib.evaluation import evaluate, evaluate_classical
from lib.experiment import Experiment, cohort_file
from lib.losses import gncc
from lib.params import work_folder
from lib.training import pretrain_registration, pretrain_segmentation
from lib.volumes import assemble
from lib.warping import pixel_grid
from test_volumes import heart

OPTIONS = params.Section(threshold=0.8, anchors=50, negatives=40, temperature=0.5)


def generator():
    return torch.Generator().manual_seed(0)


def test_info_nce_of_a_hand_computed_case():
    anchors, positives = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    up = math.exp(0.6 / 0.5)
    expected = -math.log(up / (up + math.exp(0) + math.exp(-1 / 0.5)))
    assert float(cctr.info_nce(anchors, positives, negatives, 0.5)) == pytest.approx(expected)
    valid = torch.tensor([True, False])
    assert float(cctr.info_nce(anchors, positives, negatives, 0.5, valid)) == pytest.approx(-math.log(up / (up + 1)))


def test_only_confident_pixels_are_anchors_and_negatives():
    features = F.normalize(torch.randn(200, 8, generator=generator()), dim=1).requires_grad_()
    labels = torch.arange(200) % 3
    confidence = (torch.arange(200) < 100).float()
    loss, reps = cctr.pixel_contrast(features, labels, confidence, 3, OPTIONS, generator())
    loss.backward()
    touched = features.grad.abs().sum(dim=1) > 0
    assert touched[:100].any() and not touched[100:].any() and reps == 0
    changed = features.detach().clone()
    changed[100:] = -changed[100:]
    assert torch.equal(loss.detach(), cctr.pixel_contrast(changed, labels, confidence, 3, OPTIONS, generator())[0])


def test_contrast_falls_where_classes_part():
    labels = torch.arange(120) % 3
    apart = F.one_hot(labels, 4).float()
    mixed = F.normalize(torch.randn(120, 4, generator=generator()), dim=1)
    confidence = torch.ones(120)
    loss = lambda features: float(cctr.pixel_contrast(features, labels, confidence, 3, OPTIONS, generator())[0])
    assert loss(apart) < 0.5 * loss(mixed)


def test_a_class_without_anchors_does_not_count():
    labels = torch.arange(120) % 2
    features = F.one_hot(labels, 4).float()
    few = params.Section({**OPTIONS, "negatives": OPTIONS.negatives // 4})  # of five classes one gives a quarter
    two = cctr.pixel_contrast(features, labels, torch.ones(120), 2, few, generator())[0]
    five = cctr.pixel_contrast(features, labels, torch.ones(120), 5, OPTIONS, generator())[0]
    assert torch.isfinite(five) and float(five) == pytest.approx(float(two), rel=0.05)


def test_negatives_come_from_every_other_class_alike(monkeypatch):
    """Background is 95 % of a heart's pixels, but not of what a structure is held against."""
    labels = torch.cat((torch.zeros(950), torch.full((25,), 1), torch.full((25,), 2))).long()
    features = F.one_hot(labels, 3).float()
    seen = []
    monkeypatch.setattr(cctr, "info_nce", lambda a, p, negatives, t, valid: seen.append(negatives[valid].sum(0))
                        or torch.zeros(len(a)))
    cctr.pixel_contrast(features, labels, torch.ones(1000), 3, OPTIONS, generator())
    assert [counts.tolist() for counts in seen] == [[0, 20, 20], [20, 0, 20], [20, 20, 0]]


def test_the_bank_gives_back_what_was_seen_at_the_place_that_it_was_seen():
    side, stride = 32, 2
    shape = (3, side // stride, side // stride)
    bank = cctr.Bank(4, shape, stride)
    smooth = F.interpolate(torch.randn(2, 3, 4, 4, generator=generator()), size=shape[1:], mode="bicubic")
    features = F.normalize(smooth, dim=1)
    still = Affine(torch.eye(2).repeat(2, 1, 1), torch.zeros(2, 2))
    index = torch.tensor([1, 3])
    bank.store(index, features, still)
    assert torch.allclose(bank.features[index], features, atol=1e-5) and bank.seen[0].sum() == 0
    maps = draw_affine(2, side, generator(), rotation=10, shift=0.05)
    again = cctr.Bank(4, shape, stride)
    seen = F.normalize(Affine(maps.matrix, maps.shift / stride).apply(features), dim=1)
    again.store(index, seen, maps)
    middle = (slice(None), slice(None), slice(4, 12), slice(4, 12))
    assert (again.features[index] * features).sum(1, keepdim=True)[middle].mean() > 0.98


def test_positives_are_looked_up_at_the_corresponding_pixel():
    side, stride = 32, 2
    bank = cctr.Bank(1, (2, side // stride, side // stride), stride)
    bank.seen[:] = 1
    bank.features[0, 0] = 1
    bank.features[0, :, 5, 9] = torch.tensor([0.0, 1.0])  # covers pixels 10, 11 and 18, 19
    displacement = torch.tensor([4.0, -6.0]).reshape(1, 2, 1, 1)
    coordinates = pixel_grid(side, side, torch.device("cpu")) + displacement
    found, known = bank.look_up(torch.tensor([0]), coordinates)
    assert found[0, :, 6, 24].tolist() != [1.0, 0.0]
    exact = (pixel_grid(side, side, torch.device("cpu")) * 0 + torch.tensor([10.5, 18.5]).reshape(1, 2, 1, 1))
    assert torch.allclose(bank.look_up(torch.tensor([0]), exact)[0][0, :, 0, 0], torch.tensor([0.0, 1.0]), atol=1e-5)
    assert not known[0, 31, 16] and known[0, 10, 16]  # four rows below the last there is nothing


def test_no_gradient_reaches_the_teaching_side():
    student = torch.randn(2, 4, 8, 8, generator=generator(), requires_grad=True)
    teacher = torch.randn(2, 4, 8, 8, generator=generator(), requires_grad=True)
    cctr.taught_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn():
    teacher = 50 * F.one_hot(torch.randint(4, (2, 8, 8), generator=generator()), 4).movedim(-1, 1).float()
    assert float(cctr.taught_loss(teacher, teacher)) == pytest.approx(0, abs=1e-3)
    assert float(cctr.taught_loss(teacher.roll(1, dims=1), teacher)) > 0.5


@pytest.mark.parametrize("side", [40, 64])
def test_both_networks_segment_images_of_any_size(side):
    for body, channels in ((cctr.ResidualUNet(4, "instance"), 16), (cctr.SwinUNet(12), 12)):
        learner = cctr.Learner(body, channels, 3, 8, 4)
        logits, features = learner(torch.rand(2, 1, side, side))
        assert logits.shape == (2, 4, side, side) and features.shape == (2, 8, side // 4, side // 4)
        assert torch.allclose(features.norm(dim=1), torch.ones(2, side // 4, side // 4), atol=1e-5)
        masks = learner.segment(torch.rand(2, 1, side, side))
        assert masks.shape == (2, 3, side, side) and 0 <= masks.min() and masks.sum(1).max() <= 1.0001


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """CCT-R trained for a moment on made-up volumes."""
    folder = tmp_path_factory.mktemp("cctr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOINT_OUTPUT", str(folder))
        settings = params.load("strong", cohort="acdc", rate=50, seed=1)
        settings.cctr |= {"steps": 10, "batch": 4, "watched": 4, "recipes": ["strong"]}
        splits = {"train": 4, "validation": 1, "test": 2}
        parts = [(f"{split}{k}", f"{split}{k}", split, k, *(np.moveaxis(part, 2, 0) for part in heart(10 * k + n)))
                 for n, (split, count) in enumerate(splits.items()) for k in range(count)]
        assemble("acdc", "made up", parts, ("a", "b", "c"), 32).save(cohort_file(settings))
        trial = Experiment(settings)
        pretrain_segmentation(trial)
        pretrain_registration(trial)
        registered = cctr.stored_registration(trial)
        yield trial, registered, cctr.train_cctr(trial, registered)


def test_every_volume_is_scored_for_both_networks_and_every_class(trial):
    per_image = evaluate(trial[0]).per_image
    for method in ("cctr", "cctr-b"):
        rows = per_image[per_image["method"] == method]
        assert len(rows) == 2 * 3 and set(rows["subject"]) == {"test0", "test1"} and rows["dsc"].between(0, 1).all()
        assert (rows["n_labelled"] == 2).all() and (rows["seconds"] > 0).all()


class Still(torch.nn.Module):
    """A registration that moves nothing."""

    def register(self, source, target):
        return torch.zeros(len(source), 2, *source.shape[-2:])


def test_labels_come_from_the_volume_that_is_most_similar(trial):
    experiment = trial[0]
    data, cohort = experiment.data, experiment.cohort
    registered = cctr.register_labelled(experiment, Still())
    matches = cohort.matches(data.unlabelled, data.labelled)
    similar = np.stack([gncc(data.images[data.labelled[torch.as_tensor(column)]], data.images[data.unlabelled]).numpy()
                        for column in matches.T], axis=1)
    volumes = cohort.volumes[data.unlabelled]
    assert matches.shape[1] == 2 and len(set(volumes)) == 2
    for volume in set(volumes):
        best = similar[volumes == volume].mean(axis=0).argmax()
        assert registered.sources[volumes == volume].tolist() == matches[volumes == volume][:, best].tolist()
    scores = cctr.registration_scores(experiment, registered)
    assert list(scores.columns) == ["a", "b", "c", "mean", "slices"]
    assert scores.loc["warped labels", "mean"] == pytest.approx(scores.loc["before registration", "mean"], abs=1e-5)


def test_registrations_are_stored_and_made_anew_where_the_file_is_not_whole(trial, monkeypatch):
    experiment, registered, _ = trial
    monkeypatch.setattr(cctr, "register_labelled", lambda *_: pytest.fail("they are there"))
    again = cctr.stored_registration(experiment)
    assert all(torch.equal(a, b) for a, b in zip(registered, again))
    file = next(file for file in work_folder("checkpoints").glob("*.pt") if "registered" in torch.load(file))
    saved = torch.load(file)
    saved["registered"][1] += 1
    torch.save(saved, file)
    made = []
    monkeypatch.setattr(cctr, "register_labelled", lambda *_: made.append(1) or registered)
    cctr.stored_registration(experiment)
    assert made == [1]


def test_the_classical_reference_takes_whole_volumes(trial):
    settings = trial[0].settings.classical
    found = evaluate_classical(trial[0]).per_image
    assert set(found["subject"]) == {"test0", "test1"} or settings.images < 8
    settings["images"] = 4
    found = evaluate_classical(trial[0]).per_image
    assert len(found["subject"].unique()) == 1 and len(found) == 3


def test_what_was_trained_is_loaded_for_testing(trial):
    experiment, _, (networks, _) = trial
    image = experiment.data.images[:1]
    again = cctr.load_cctr(experiment)
    for mine, theirs in ((networks.first, again.first), (networks.second, again.second)):
        assert torch.equal(mine.eval().segment(image), theirs.eval().segment(image))


def test_pseudo_labels_are_watched_over_the_training(trial):
    experiment, registered, (_, found) = trial
    course = cctr.course(experiment, registered, found)
    assert course["step"].iloc[-1] == 10 and course["warped labels"].nunique() == 1
    assert {"supervised", "cross", "rsl", "contrast", "reps"} <= set(found.history.columns)
    assert found.watched[-1][1]["masks"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize("variant", ["cross teaching alone", "with contrast", "with contrast and RSL"])
def test_every_part_can_be_switched_off(trial, variant):
    experiment, registered, _ = trial
    settings = params.load("strong", cohort="acdc", rate=50, seed=1, variant=variant)
    settings.cctr |= {"steps": 10, "batch": 4, "watched": 4}
    other = Experiment(settings)
    _, found = cctr.train_cctr(other, registered)
    parts = {"contrast", "rsl", "reps"}
    assert parts & set(found.history.columns) == {part for part in parts if settings.cctr[part]}
    assert other.folder("cctr") != experiment.folder("cctr")
