import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_volumes import made_up_volumes

from lib import losses, warping
from lib.methods.cctr import alignment, correspondence, learners
from lib.methods.cctr import train as cctr
from lib.methods.experiment import Experiment
from lib.methods.pretraining import pretrain_registration
from lib.models import ResidualUNet
from lib.results.evaluation import evaluate, evaluate_untrained, rounds
from lib.results.figures import charts
from lib.runs import params
from lib.runs.params import cohort_file, work_folder


def generator():
    return torch.Generator().manual_seed(0)


def test_no_gradient_reaches_the_teaching_side():
    student = torch.randn(2, 4, 8, 8, generator=generator(), requires_grad=True)
    teacher = torch.randn(2, 4, 8, 8, generator=generator(), requires_grad=True)
    cctr.taught_loss(student, teacher, False).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_each_network_learns_as_if_the_other_were_constant():
    first, second = (part.requires_grad_() for part in torch.randn(2, 2, 4, 8, 8, generator=generator()))
    cctr.cross_teaching_loss(first, second, False).backward()
    for student, teacher in ((first, second), (second, first)):
        alone = student.detach().requires_grad_()
        cctr.taught_loss(alone, teacher.detach(), False).backward()
        assert student.grad.abs().sum() > 0 and torch.allclose(student.grad, alone.grad)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn():
    teacher = 50 * F.one_hot(torch.randint(4, (2, 8, 8), generator=generator()), 4).movedim(-1, 1).float()
    assert float(cctr.taught_loss(teacher, teacher, False)) == pytest.approx(0, abs=1e-3)
    assert float(cctr.taught_loss(teacher.roll(1, dims=1), teacher, False)) > 0.5


@pytest.mark.parametrize("side", [40, 64])
def test_both_networks_segment_images_of_any_size(side):
    for body, channels in ((ResidualUNet(4, "instance"), 16), (learners.SwinUNet(12), 12)):
        learner = learners.Learner(body, channels, 3, 8, 4)
        logits, features = learner(torch.rand(2, 1, side, side))
        assert logits.shape == (2, 4, side, side) and features.shape == (2, 8, side // 4, side // 4)
        assert torch.allclose(features.norm(dim=1), torch.ones(2, side // 4, side // 4), atol=1e-5)
        masks = learner.segment(torch.rand(2, 1, side, side))
        assert masks.shape == (2, 3, side, side) and masks.min() >= 0 and masks.sum(1).max() <= 1.0001


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """CCT-R trained for a moment on made-up volumes."""
    folder = tmp_path_factory.mktemp("cctr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOINT_OUTPUT", str(folder))
        settings = params.load("strong", cohort="acdc", rate=50, seed=1)
        settings["precision"] = "float32"  # the scores that are compared below are close
        settings.cctr |= {"watched": 4}
        settings.strong.training |= {"steps": 10, "batch": 4}
        made_up_volumes().save(cohort_file(settings))
        trial = Experiment(settings)
        pretrain_registration(trial)
        registered = correspondence.stored_registration(trial)
        yield trial, registered, cctr.train_cctr(trial, registered)


def test_every_volume_is_scored_for_both_networks_and_every_class(trial):
    per_image = evaluate(trial[0]).per_image
    for method in ("cctr", "cctr-b"):
        rows = per_image[per_image["method"] == method]
        assert len(rows) == 2 * 3 and set(rows["subject"]) == {"test0", "test1"} and rows["dsc"].between(0, 1).all()
        assert (rows["n_labelled"] == 2).all()


class Still(torch.nn.Module):
    """A registration that moves nothing."""

    def register(self, source, target):
        return torch.zeros(len(source), 2, *source.shape[-2:])


def test_labels_come_from_the_volume_that_is_most_similar_where_it_is_labelled(trial, monkeypatch):
    experiment = trial[0]
    data, cohort = experiment.data, experiment.cohort
    monkeypatch.setitem(experiment.settings.cctr, "align", False)
    registered = correspondence.register_labelled(experiment, Still())
    matches = cohort.matches(data.unlabelled, data.labelled)
    numbers = torch.as_tensor(np.unique(cohort.volumes[data.labelled], return_inverse=True)[1])
    regions = alignment.region(data.masks[data.labelled], numbers)
    similar = np.stack(
        [
            losses.weighted_gncc(
                data.images[data.labelled[column]], data.images[data.unlabelled], regions[column]
            ).numpy()
            for column in torch.as_tensor(matches.T)
        ],
        axis=1,
    )
    volumes = cohort.volumes[data.unlabelled]
    assert matches.shape[1] == 2 and len(set(volumes)) == 2
    for volume in set(volumes):
        best = similar[volumes == volume].mean(axis=0).argmax()
        assert registered.sources[volumes == volume].tolist() == matches[volumes == volume][:, best].tolist()
    assert registered.partners.tolist() == matches.tolist()
    assert registered.places.shape == (len(data.unlabelled), 2, 2, 8, 8)
    assert registered.places[0, 1, :, 0, 0].tolist() == [1.5, 1.5]  # nothing moves: the middle of the first 4 x 4
    scores = correspondence.registration_scores(experiment, registered)
    before, after = scores.loc["before registration"], scores.loc["warped labels"]
    assert after.to_dict() == pytest.approx(before.to_dict(), abs=1e-5)  # nothing has moved
    assert before["folding"] == 0 and (before["volumes"], before["slices"]) == (2, len(data.unlabelled))
    masks, truth = data.masks[data.labelled][registered.sources] > 0.5, data.masks[data.unlabelled] > 0.5
    of = cohort.volumes[data.unlabelled]
    for number, name in enumerate("abc"):
        both, sizes = (masks & truth)[:, number], masks[:, number].int() + truth[:, number].int()
        expected = [2 * both[of == volume].sum() / sizes[of == volume].sum() for volume in set(of)]
        assert before[name] == pytest.approx(float(sum(expected) / 2))
    assert before["mean"] == pytest.approx(before[["a", "b", "c"]].mean())


def test_the_choice_of_the_volume_can_be_left_to_chance_and_its_worth_is_reported(trial, monkeypatch):
    experiment, registered, _ = trial
    scores = correspondence.registration_scores(experiment, registered)
    worst, best = scores.loc["any volume"], scores.loc["best by true masks"]
    assert worst["mean"] <= best["mean"] and scores.loc["warped labels", "mean"] <= best["mean"] + 0.02
    assert scores.loc["no counterpart", ["a", "b", "c"]].between(0, 1).all()
    monkeypatch.setitem(experiment.settings.cctr, "align", False)
    chosen = {}
    for selection, seed in (("best", 1), ("random", 1), ("random", 2), ("random", 3), ("random", 4)):
        monkeypatch.setitem(experiment.settings.cctr, "selection", selection)
        monkeypatch.setitem(experiment.settings, "seed", seed)
        found = correspondence.register_labelled(experiment, Still())
        of = experiment.cohort.volumes[experiment.data.unlabelled]
        volumes = experiment.cohort.volumes[experiment.data.labelled[found.sources]]
        assert all(len(set(volumes[of == name])) == 1 for name in set(of))  # one labelled volume for a whole volume
        assert torch.equal(found.partners, registered.partners)
        chosen[selection, seed] = tuple(found.sources.tolist())
    assert len({chosen["random", seed] for seed in (1, 2, 3, 4)}) > 1
    monkeypatch.setitem(experiment.settings.cctr, "selection", "worst")
    with pytest.raises(ValueError, match="'worst' in params.yaml is not one of best, random"):
        correspondence.register_labelled(experiment, Still())


def test_coarse_fields_are_those_that_the_places_came_from():
    height = 32
    grid = warping.pixel_grid((height, height), "cpu")
    field = 0.1 * (grid - (height - 1) / 2) + torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1)
    places = F.avg_pool2d(grid + field, 4)
    (found,) = correspondence.coarse_fields(places[:, None], (height, height))
    inside = (..., slice(2, -2), slice(2, -2))
    assert torch.allclose(found[inside], field[inside], atol=1e-4)


def test_a_known_displacement_is_found_in_labels_and_places(trial, monkeypatch):
    """Aligning enlarges by a tenth and the network shifts by (2, -1): the labels go through both, in that order."""
    experiment = trial[0]
    shift, height = torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1), experiment.data.images.shape[-1]
    enlarge = 0.1 * (warping.pixel_grid((height, height), "cpu") - (height - 1) / 2)
    monkeypatch.setattr(correspondence, "align", lambda source, *_: enlarge.expand(len(source), -1, -1, -1).clone())
    network = Still()
    network.register = lambda source, target: shift.expand(len(source), -1, height, height).clone()
    registered = correspondence.register_labelled(experiment, network)
    whole = shift + enlarge + 0.1 * shift  # at x lies what was at x + shift + enlarge(x + shift)
    inside = (..., slice(4, -4), slice(4, -4))
    assert torch.allclose(registered.fields[inside], whole.expand_as(registered.fields)[inside], atol=1e-4)
    masks = experiment.data.masks[experiment.data.labelled]
    twice = warping.warp(
        warping.warp(masks, enlarge.expand(len(masks), -1, -1, -1)), shift.expand(len(masks), -1, height, height)
    )
    assert (registered.masks(masks) - twice[registered.sources])[inside].abs().mean() < 0.02
    place = (warping.pixel_grid((height, height), "cpu") + whole)[0, :, 8:12, 8:12].mean(dim=(1, 2))
    assert torch.allclose(registered.places[:, :, :, 2, 2], place.expand(*registered.places.shape[:2], 2), atol=1e-4)


def test_registrations_are_stored_and_made_anew_where_the_file_is_not_whole(trial, monkeypatch):
    experiment, registered, _ = trial
    monkeypatch.setattr(correspondence, "register_labelled", lambda *_: pytest.fail("they are there"))
    again = correspondence.stored_registration(experiment)
    assert all(torch.equal(a, b) for a, b in zip(registered, again))
    file = next(file for file in work_folder("checkpoints").glob("*.pt") if "registered" in torch.load(file))
    saved = torch.load(file)
    saved["registered"][1] += 1
    torch.save(saved, file)
    made = []
    monkeypatch.setattr(correspondence, "register_labelled", lambda *_: made.append(1) or registered)
    correspondence.stored_registration(experiment)
    assert made == [1]


def test_the_classical_reference_takes_whole_volumes(trial):
    settings = trial[0].settings.classical
    for images, subjects in ((8, {"test0", "test1"}), (4, {"test0"})):
        settings["images"] = images
        found = evaluate_untrained(trial[0]).per_image
        assert set(found["subject"]) == subjects and len(found) == 3 * len(subjects)


def test_what_was_trained_is_loaded_for_testing(trial):
    experiment, _, (networks, _) = trial
    image = experiment.data.images[:1]
    again = cctr.load_cctr(experiment)
    for mine, theirs in ((networks.first, again.first), (networks.second, again.second)):
        assert torch.equal(mine.eval().segment(image), theirs.eval().segment(image))


def test_there_is_no_other_recipe(trial, monkeypatch):
    monkeypatch.setitem(trial[0].settings, "recipe", "paper")
    with pytest.raises(ValueError, match="no recipe 'paper'"):
        cctr.train_cctr(trial[0], trial[1])


def test_pseudo_labels_are_watched_over_the_training(trial):
    experiment, registered, (_, found) = trial
    course = cctr.course(experiment, registered, found)
    assert course["step"].iloc[-1] == 10 and course["warped labels"].nunique() == 1
    assert {"supervised", "cross", "rsl", "contrast", "reps"} <= set(found.history.columns)
    assert not {"validation", "validation second"} & set(found.history)  # nothing is chosen by it
    assert found.watched[-1][1]["masks"].shape == (2, 3, 32, 32)


def measured_rounds(experiment, found):
    charts.thin(found.history).to_csv(experiment.cabinet.folder("cctr") / "history.csv", index=False)
    return rounds(experiment)


def test_both_networks_are_measured_at_every_look_and_the_last_is_tested(trial):
    experiment, _, (_, found) = trial
    measured = measured_rounds(experiment, found)
    assert set(measured["stage"]) == {"cctr", "cctr-b"} and set(measured["split"]) == {"unlabelled"}
    for number, stage in enumerate(("cctr", "cctr-b")):
        own = measured[measured["stage"] == stage]
        assert own["round"].tolist() == [step for step, _ in found.watched]
        assert own["dsc_segmentation"].tolist() == [float(seen["dsc"][number]) for _, seen in found.watched]
        assert own["best_for"].tolist() == [""] * (len(own) - 1) + [stage]


def test_validation_images_choose_where_they_are_to(trial):
    experiment, registered, _ = trial
    settings = params.load("strong", cohort="acdc", rate=50, seed=1, variant="chosen by validation")
    settings.cctr |= {"watched": 4}
    settings.strong.training |= {"steps": 10, "batch": 4}
    other = Experiment(settings)
    other.cabinet.save(experiment.cabinet.load("registration"), "registration")
    _, found = cctr.train_cctr(other, registered)
    measured = measured_rounds(other, found)
    for stage, column in (("cctr", "validation"), ("cctr-b", "validation second")):
        validation = measured[(measured["stage"] == stage) & (measured["split"] == "validation")]
        assert validation["dsc_segmentation"].tolist() == found.history[column].dropna().tolist()
        (best,) = validation.loc[validation["best_for"] == stage, "dsc_segmentation"]
        assert best == validation["dsc_segmentation"].max()


def test_true_masks_of_unlabelled_and_test_images_train_nothing(trial, monkeypatch):
    experiment, _, (networks, _) = trial
    again = Experiment(experiment.settings)
    hidden = torch.cat((again.data.unlabelled, again.data.as_index(again.cohort.index("test"))))
    again.data.masks[hidden] = 1 - again.data.masks[hidden]
    monkeypatch.setattr(cctr, "fingerprint", lambda *parts: "hidden masks")  # no checkpoint is to be taken up
    other, _ = cctr.train_cctr(again, correspondence.stored_registration(again))
    assert not torch.equal(again.data.masks, experiment.data.masks)
    for mine, theirs in zip(networks.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("variant", ["labels alone", "cross teaching alone", "with contrast", "with contrast and RSL"])
def test_every_part_can_be_switched_off(trial, variant):
    experiment, registered, _ = trial
    settings = params.load("strong", cohort="acdc", rate=50, seed=1, variant=variant)
    settings.cctr |= {"watched": 4}
    settings.strong.training |= {"steps": 10, "batch": 4}
    other = Experiment(settings)
    _, found = cctr.train_cctr(other, registered)
    parts = {"contrast", "rsl", "reps"}
    assert parts & set(found.history.columns) == {part for part in parts if settings.cctr[part]}
    assert other.cabinet.folder("cctr") != experiment.cabinet.folder("cctr")
