"""The methods of recipe `strong`: copy-paste, pairs, who teaches whom; one augmentation and one loss for all."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from test_training import made_up_cohort, made_up_volumes

from lib import augment, losses
from lib.methods import table, watching
from lib.methods.experiment import Experiment
from lib.methods.mean_teacher import MeanTeacher
from lib.methods.peers import bcp, consistency, joint_plus, neighbours, pairs, unimatch
from lib.methods.peers.learning import Lesson
from lib.methods.pretraining import pretrain_registration
from lib.results import evaluation, grid
from lib.runs import params
from lib.runs.cabinet import Cabinet
from lib.training import weights_digest

PEERS = {stage.name: stage.peer for stage in table.stages() if stage.peer}


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    settings = params.load("strong")
    settings |= {"device": "cpu", "precision": "float32"}
    made_up_cohort().save(params.cohort_file(settings))
    return Experiment(settings)


@pytest.fixture
def lesson(trial):
    return Lesson(trial, trial.numerics.place(MeanTeacher(trial.segmentation_network(), 0.99)))


def test_pasting_an_image_into_itself_changes_nothing_and_a_box_covers_its_share():
    images = torch.rand(6, 1, 20, 30, generator=draws())
    inside = bcp.box(6, (20, 30), 0.5, draws())
    assert torch.equal(bcp.paste(images, images, inside), images)
    assert set(inside.unique().tolist()) == {0.0, 1.0}
    assert (
        inside.sum(dim=(1, 2, 3)).tolist() == [10 * 15] * 6
        and len({tuple(one.flatten().tolist()) for one in inside}) > 1
    )
    assert bcp.box(2, (4, 5, 6), 1.0, draws()).all()


def test_labels_follow_their_pixels_when_images_are_pasted():
    first, second = torch.full((3, 1, 16, 16), 0.25), torch.full((3, 1, 16, 16), 0.75)
    inside = bcp.box(3, (16, 16), 0.6, draws())
    image, mask = bcp.paste(first, second, inside), bcp.paste(torch.ones_like(first), torch.zeros_like(first), inside)
    assert torch.equal(mask == 1, image == 0.25)


def trained_with(trial, stage, watched):
    """Train a stage with or without looks at the test images: digest of its weights, and the rows of its course."""
    trial.settings.strong |= {"watched": watched}
    trial.settings.strong.training |= {"steps": 20}
    trial.watch = watching.watcher(trial, stage)
    network, _ = import_module(f"lib.methods.peers.{PEERS[stage]}").train(trial)
    return weights_digest(network), watching.rows_of(trial, stage)


@pytest.mark.parametrize("stage", ["bcp", "joint_plus"])
def test_looks_at_the_test_images_change_no_training_and_end_with_the_score_of_the_table(trial, stage):
    pretrain_registration(trial)
    plain, none = trained_with(trial, stage, watched=False)
    same, rows = trained_with(trial, stage, watched=True)
    assert same == plain and len(none) == 0
    assert rows["step"].tolist() == [10, 20] and rows["minutes"].is_monotonic_increasing
    scores = evaluation.evaluate(trial, stage).per_image
    assert rows["dsc"].iloc[-1] == pytest.approx(scores.groupby("subject")["dsc"].mean().mean(), abs=1e-6)


def test_registration_counts_from_the_step_at_which_it_is_needed(trial):
    trial.settings.strong.training |= {"steps": 40}
    trial.cabinet.save({"watched": [(step, torch.tensor(0.5)) for step in (10, 20, 30, 40)]}, "joint_plus")
    for name, seconds in (("joint_plus", 40), ("registration", 500), ("neighbours", 100)):
        trial.note_cost(name, seconds)
    assert (60 * watching.rows_of(trial, "joint_plus")["minutes"]).round().tolist() == [10, 20, 630, 640]


def test_other_stages_are_not_watched(trial):
    trial.settings.strong |= {"watched": True}
    assert watching.watcher(trial, "bcp") is not None
    trial.cabinet.save({"watched": [(1, {"dsc": torch.zeros(2)})]}, "cctr")
    for stage in ("mean_teacher", "cctr", "self_training", "joint"):
        assert watching.watcher(trial, stage) is None and len(watching.rows_of(trial, stage)) == 0


def test_of_every_mask_the_largest_component_is_kept():
    masks = torch.zeros(2, 2, 12, 12)
    masks[0, 0, 1:3, 1:3] = masks[0, 0, 5:10, 5:10] = masks[1, 1, 2, 2] = 1
    kept = bcp.largest_components(masks)
    assert kept[0, 0].sum() == 25 and kept[0, 0, 5:10, 5:10].all() and torch.equal(kept[1], masks[1])
    assert not kept[0, 1].any()


@pytest.mark.parametrize("module", [bcp, unimatch, consistency])
def test_no_gradient_reaches_the_averaged_network_and_one_reaches_the_student(lesson, module):
    losses_ = module.batch_loss(lesson, draws(), lesson.training.steps - 1)
    losses_["loss"].backward()
    assert all(value.grad is None for value in lesson.networks.teacher.parameters())
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in lesson.networks.student.parameters())


def test_pixels_of_which_the_weak_view_is_not_certain_do_not_count(lesson):
    lesson.options.unimatch |= {"threshold": 1.01}
    found = unimatch.batch_loss(lesson, draws(), 0)
    no_pixel = losses.segmentation_loss(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4), weight=torch.zeros(1, 1, 4, 4))
    assert float(found["strong"]) == float(found["dropping"]) == pytest.approx(float(no_pixel), abs=1e-6)
    lesson.options.unimatch |= {"threshold": 0.5}
    assert float(unimatch.batch_loss(lesson, draws(), 0)["strong"]) > 0.1


def test_the_loss_is_zero_where_all_is_right_and_looks_only_where_pixels_count():
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, 2:6, 2:6] = 1
    right = 40 * (2 * target - 1)
    assert float(losses.segmentation_loss(right, target)) < 1e-4
    half = torch.ones(2, 1, 8, 8)
    half[..., 4:] = 0
    wrong = torch.where(half > 0, right, -right)
    assert float(losses.segmentation_loss(wrong, target, weight=half)) < 1e-4
    assert float(losses.segmentation_loss(wrong, target)) > 1
    logits = torch.randn(2, 1, 8, 8, generator=draws())
    alike = losses.segmentation_loss(logits, target, weight=torch.ones(2, 1, 8, 8))
    assert float(alike) == pytest.approx(float(losses.segmentation_loss(logits, target)), rel=1e-5)


SETTINGS = params.load("strong").strong.augmentation


def test_image_and_mask_move_alike_and_light_moves_nothing():
    image = torch.zeros(8, 1, 48, 48)
    image[:, :, 16:32, 20:28] = 1
    moved, mask = augment.place(image, image.clone(), draws(), SETTINGS, True)
    assert torch.allclose(moved, mask, atol=1e-5) and not torch.allclose(moved, image, atol=0.5)
    straight, _ = augment.place(image, image, draws(), SETTINGS, True, bend=False)
    assert not torch.allclose(moved, straight, atol=0.1)
    lit = augment.light(image, draws(), SETTINGS)
    inside = lit[:, :, 18:30, 22:26].mean(dim=(1, 2, 3))
    assert (inside > lit[:, :, :10].mean(dim=(1, 2, 3)) + 0.3).all() and lit.min() >= 0 and lit.max() <= 1


def test_blur_and_low_resolution_leave_what_is_smooth_and_flatten_what_is_fine():
    flat, fine = torch.full((2, 1, 16, 16), 0.4), torch.rand(2, 1, 16, 16, generator=draws())
    sigma = torch.tensor([0.0, 1.0])
    assert torch.allclose(augment.blur(flat, sigma), flat, atol=1e-6)
    blurred = augment.blur(fine, sigma)
    assert torch.allclose(blurred[0], fine[0], atol=1e-5) and blurred[1].std() < 0.5 * fine[1].std()
    assert torch.allclose(augment.lower_resolution(fine, 1.0), fine, atol=1e-6)
    assert augment.lower_resolution(fine, 0.5).std() < 0.8 * fine.std()
    assert not augment.elastic(3, (16, 16), draws(), 5, 0.0).any()
    assert augment.elastic(200, (16, 16), draws(), 5, 2.0).std() == pytest.approx(2 * 0.7, rel=0.25)


def test_the_most_similar_labelled_images_are_kept_and_a_pair_is_of_its_own_images(trial, monkeypatch):
    """The registration moves nothing, so that the best source is the one that looks most like the target as it is."""
    data = trial.data
    still = SimpleNamespace(eval=lambda: still, register=lambda source, target: torch.zeros(len(source), 2, 32, 32))
    monkeypatch.setattr(pairs, "load_pretrained_registration", lambda experiment: torch.nn.Identity())
    monkeypatch.setattr(pairs, "Refined", lambda network, options: still)
    trial.settings.strong.pairs |= {"candidates": 5, "kept": 2}
    found = pairs.register_pairs(trial)
    similar = torch.stack(
        [
            losses.gncc(
                data.images[data.labelled[[k]]].expand(len(data.unlabelled), -1, -1, -1), data.images[data.unlabelled]
            )
            for k in range(5)
        ],
        dim=1,
    )
    assert torch.equal(found.sources, similar.argsort(1, descending=True)[:, :2])
    index, sources, fields = found.draw(7, draws())
    assert all(source in found.sources[at] for at, source in zip(index, sources)) and not fields.any()


def test_neighbours_are_the_most_similar_images_of_other_subjects_at_about_the_same_height():
    images = torch.rand(9, 1, 12, 12, generator=draws())
    subjects = torch.arange(9) // 3
    found = neighbours.nearest(images, subjects, 4, 5)
    assert found.shape == (5, 4)
    for k, chosen in enumerate(found):
        others = [m for m in range(9) if subjects[m] != subjects[k]]
        similar = [float(losses.gncc(images[[k]], images[[m]])) for m in others]
        assert chosen.tolist() == [others[m] for m in sorted(range(6), key=lambda m: -similar[m])[:4]]
    assert neighbours.nearest(images, subjects, 20, 5).shape == (5, 6)  # all that there are
    assert neighbours.nearest(images, torch.zeros(9), 4, 5).shape == (5, 0)  # of one subject
    along = torch.tensor([0.0, 0.5, 1.0] * 3)
    near = neighbours.nearest(images, subjects, 2, 9, along)
    assert (along[near] == along[:, None]).all()
    assert torch.equal(neighbours.nearest(images, subjects, 6, 9, along)[:, :2], near)


@pytest.mark.parametrize("space", [(14, 16), (8, 10, 9)])
def test_patches_do_not_see_brightness_and_contrast_and_weights_prefer_what_is_alike(space):
    target = torch.rand(2, 1, *space, generator=draws())
    found = neighbours.patches(target)
    assert found.shape == (2, 25 if len(space) == 2 else 27, *space)
    assert torch.allclose(found, neighbours.patches(0.2 + 3 * target), atol=0.05)
    assert found.mean(1).abs().max() < 1e-4 and (found.std(1) < 1.01).all()
    noise = lambda seed: torch.rand(2, *space, generator=draws(seed))
    like, wrong, other = target[:, 0] + 0.05 * noise(1), noise(2), noise(3)
    weights = neighbours.fusion_weights(neighbours.patch_errors(torch.stack((like, wrong, other), 1), target), 0.1)
    assert torch.allclose(weights.sum(1), torch.ones(2, *space), atol=1e-4)
    assert (weights[:, 0] > weights[:, 1:].amax(1)).float().mean() > 0.98
    # Two that are wrong in the same way weigh together hardly more than one of them alone.
    errors = neighbours.patch_errors(torch.stack((wrong, wrong, other), 1), target)
    twice = neighbours.fusion_weights(errors, 0.01).mean(dim=(0, *range(2, 2 + len(space))))
    assert twice[0] == pytest.approx(float(twice[1]), rel=1e-3) and twice[2] > 1.5 * twice[0]
    alike = neighbours.fusion_weights(errors, 1e4)
    assert torch.allclose(alike, torch.full_like(alike, 1 / 3), atol=1e-3)


def test_masks_are_handed_on_along_the_fields_by_their_weights():
    masks = torch.rand(3, 2, 10, 10, generator=draws())
    fields = torch.zeros(1, 2, 2, 10, 10, dtype=torch.float16)
    fields[:, 1, 0] = 2  # the second source moves by two rows
    weights = torch.tensor([0.25, 0.75]).reshape(1, 2, 1, 1).expand(1, 2, 10, 10)
    fused = neighbours.Neighbours(torch.tensor([[1, 2]]), fields, weights, None).fuse(masks)
    assert fused.shape == (1, 2, 10, 10)
    assert torch.allclose(fused[0, :, :8], 0.25 * masks[1, :, :8] + 0.75 * masks[2, :, 2:], atol=1e-5)


def test_neighbours_are_found_without_masks_and_controls_leave_out_what_they_are_to_measure(trial):
    options, data = trial.settings.strong.joint_plus, trial.data
    trial.settings.refinement |= {"steps": [1, 1]}
    trial.settings.registration |= {"epochs": 1}
    options |= {"neighbours": 3}
    pretrain_registration(trial)
    count, subjects = len(data.unlabelled), trial.cohort.subjects
    pool = torch.cat((data.unlabelled, data.labelled))
    found = neighbours.find_neighbours(trial)
    assert found.sources.shape == (count, 3) and found.fields.shape == (count, 3, 2, 32, 32) and found.fields.any()
    own, theirs = subjects[data.unlabelled][:, None], subjects[pool[found.sources]]
    assert (own != theirs).all()
    data.masks.zero_()
    again = neighbours.find_neighbours(trial)
    assert all(torch.equal(*pair) for pair in zip(found[:4], again[:4])) and found.cause == again.cause
    for control in ("unmoved", "forced"):
        options |= {"control": control}
        still = neighbours.find_neighbours(trial)
        assert torch.equal(still.sources, found.sources) and not still.fields.any() and still.cause != found.cause
    options |= {"control": "random"}
    random = neighbours.find_neighbours(trial)
    assert (subjects[pool[random.sources]] != own).all() and not torch.equal(random.sources, found.sources)


def test_a_control_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="joint_plus.control 'force' in params.yaml is not one of none, random"):
        params.load("strong", changes=["strong.joint_plus.control=force"])


def test_labelled_images_hand_on_their_true_masks_and_the_network_keeps_a_part_of_its_own(trial):
    data, options = trial.data, trial.settings.strong.joint_plus
    network = trial.segmentation_network()
    masks = joint_plus.pool_masks(trial, network)
    count = len(data.unlabelled)
    assert torch.equal(masks[count:], data.masks[data.labelled]) and masks[:count].std() > 0
    one = torch.full((count, 1), count)  # every neighbour is the first labelled image, where it lies
    alike = torch.zeros(count, 32, 32)
    given = neighbours.Neighbours(one, torch.zeros(count, 1, 2, 32, 32), torch.ones(count, 1, 32, 32), alike)
    for own in (0.0, 0.3, 1.0):
        options |= {"own": own}
        expected = own * masks[:count] + (1 - own) * data.masks[data.labelled[:1]]
        fused, weight = joint_plus.fused_masks(trial, given, network)
        assert torch.allclose(fused, expected, atol=1e-4) and weight == own
    unlike = given._replace(residuals=alike + 9)
    options |= {"own": 0.3}
    assert joint_plus.fused_masks(trial, unlike, network)[1] > 0.9
    options |= {"control": "forced"}
    assert joint_plus.fused_masks(trial, unlike, network)[1] == 0.3
    nobody = neighbours.Neighbours(one[:, :0], given.fields[:, :0], given.weights[:, :0], alike)
    assert torch.equal(joint_plus.fused_masks(trial, nobody, network)[0], masks[:count])


def test_the_less_the_neighbours_look_like_the_image_the_less_their_masks_count():
    masks = torch.zeros(3, 1, 8, 8)
    masks[:2, :, 2:4] = 0.5  # in doubt in two rows of two images
    guessed, fused = masks, torch.ones(3, 1, 8, 8)
    weight = lambda residuals: joint_plus.weight_of_own(0.3, residuals, guessed, fused)
    known = torch.full((3, 8, 8), 9.0)  # where nothing is in doubt it does not matter how unlike they are

    def at(residual):
        known[:2, 2:4] = residual
        return weight(known)

    assert at(0.0) == at(0.35) == 0.3
    assert at(joint_plus.UNLIKE) == pytest.approx(0.5) and 0.7 < at(0.72) < at(0.85) < at(1.5) < 1
    assert joint_plus.weight_of_own(1, known, guessed, fused) == 1
    assert joint_plus.weight_of_own(0.3, known, fused, fused) == 0.3  # nothing is in doubt at all


def test_what_the_network_goes_on_from_moves_with_its_images(lesson, monkeypatch):
    monkeypatch.setattr(Lesson, "light", lambda self, images, generator: images)
    images, masks = joint_plus.taught_by(lesson.unlabelled)(lesson, 6, draws())  # the images as their own masks
    middle = (..., slice(10, 22), slice(10, 22))  # beyond the edge an image goes on and a mask ends
    assert torch.allclose(images[middle], masks[middle], atol=1e-5)
    assert not any(torch.allclose(image, own, atol=1e-2) for image in images for own in lesson.unlabelled)
    batch = bcp.paste_both_ways(lesson, joint_plus.taught_by(torch.zeros_like(lesson.unlabelled)), draws())
    assert set(batch.weight.unique().tolist()) == {0.5, 1.0} and not (batch.target * (batch.weight < 1)).any()


def test_random_fields_are_as_strong_as_those_that_they_replace_and_shuffled_ones_are_of_another_image():
    strength = torch.rand(5, 2, 1, 1, 1, generator=draws()) * 4
    found = pairs.Fields(
        torch.arange(10).reshape(5, 2),
        strength * augment.elastic(10, (24, 32), draws(), 5, 1.0).reshape(5, 2, 2, 24, 32),
    )
    rms = lambda fields: fields.square().mean(dim=(2, 3, 4)).sqrt()
    random = found.random(torch.Generator().manual_seed(7), 5)
    assert torch.equal(random.sources, found.sources) and torch.allclose(
        rms(random.fields), rms(found.fields), rtol=1e-4
    )
    alike = (random.fields * found.fields).mean(dim=(2, 3, 4)) / rms(random.fields) / rms(found.fields)
    assert alike.abs().mean() < 0.6
    shuffled = found.shuffled()
    for k in range(5):
        assert torch.equal(shuffled.fields[k], found.fields[k - 1]) and torch.equal(
            shuffled.sources[k], found.sources[k - 1]
        )


@pytest.mark.parametrize("stage", PEERS)
def test_every_method_trains_sees_its_budget_and_predicts(trial, stage):
    trial.settings.strong.training |= {"steps": 6, "batch": 8}
    trial.settings.registration |= {"epochs": 1}
    seen = []
    network = trial.segmentation_network
    (made := []).clear()
    trial.segmentation_network = lambda: made.append(network()) or made[-1]
    if "registration" in table.by_stage(stage).after:
        pretrain_registration(trial)
    first = len(made)
    hooked = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: (
            seen.append(len(given[0])) if made[first:] and module in made[first:] and module.training else None
        )
    )
    try:
        _, fit = import_module(f"lib.methods.peers.{PEERS[stage]}").train(trial)
    finally:
        hooked.remove()
    steps = (
        3 if stage in ("self_training", "joint", "joint_plus") else 6
    )  # the teacher, and what comes before the rounds or the fusion, have had the other half
    assert len(fit.history) == steps
    extra = 4 if stage == "unimatch" else 0  # the second strong view of the same images
    assert seen == [8 + extra] * 6  # of self-training and joint both halves
    del trial.segmentation_network
    index = trial.cohort.index("test")
    found = evaluation.predict(trial, index, only=stage)
    assert all(mask.masks.shape == (len(index), 1, 32, 32) for mask in found.values())
    assert set(found) == {method.name for method in table.METHODS if method.stage.name == stage}


@pytest.mark.parametrize("stage", ["elastic", "bcp", "joint_plus"])
def test_methods_train_on_volumes_by_the_same_code_and_are_scored_in_mm(tmp_path, monkeypatch, stage):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    monkeypatch.setenv("JOINT_SET", "scale=smoke")
    settings = params.load("strong", "hippocampus3d")
    settings |= {"device": "cpu", "precision": "float32"}
    settings.strong.training |= {"steps": 3, "batch": 4}
    settings.registration |= {"epochs": 1}
    made_up_volumes().save(params.cohort_file(settings))
    experiment = Experiment(settings)
    assert experiment.data.images.shape[1:] == (1, 16, 20, 24)
    if stage == "joint_plus":
        pretrain_registration(experiment)
    import_module(f"lib.methods.peers.{stage}").train(experiment)
    found = evaluation.evaluate(experiment, only=stage)
    (masks,) = found.masks.values()
    assert masks.shape[1:] == (2, 16, 20, 24)
    diagonal = 2.0 * (15**2 + 19**2 + 23**2) ** 0.5  # voxels of 2 mm
    empty = found.per_image[found.per_image["empty"]]
    assert (empty["hd"].round(3) == round(diagonal, 3)).all() and found.per_image["hd"].max() <= diagonal + 1e-3
    assert set(found.per_image["class"]) == {"left", "right"}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    return params.load()


def test_every_stage_of_the_recipe_is_an_item_and_reads_its_own_settings_alone(settings):
    both = params.Section(rates=[1, 10], draws=2, stages=["bcp", "brainstorm"])
    settings.contest.methods[settings.cohort] = [both, params.Section(rates=[1], draws=1, stages=["elastic"])]
    groups = grid.contest_of(settings)
    named = [[f"strong-{stage}-{rate}-seed_{seed}" for rate in (1, 10) for stage in both.stages] for seed in (1, 2)]
    assert [[item.name for item in group] for group in groups] == [[*named[0], "strong-elastic-1-seed_1"], named[1]]
    pasted, warped = groups[0][:2]
    assert grid.notebooks_of(pasted) == ["12_peers", "08_evaluation"]
    assert grid.notebooks_of(warped) == ["03_pretrain_registration", "12_peers", "08_evaluation"]
    ours = grid.Item("strong", 1, 1, "", "joint_plus")
    assert ours.name == "strong-joint_plus-1-seed_1"
    assert grid.notebooks_of(ours) == ["03_pretrain_registration", "06_joint_plus", "08_evaluation"]
    plain = grid.Item("paper", 10, 1)
    keys = lambda: [grid.key_of(item, params.load()) for item in (pasted, warped, plain, ours)]
    before = keys()
    for change, changed in (
        ("strong.bcp.share=0.5", [0, 3]),
        ("strong.joint_plus.own=0.4", [3]),
        ("strong.pairs.kept=1", [1]),
        ("scales.smoke.strong.training.steps=7", [0, 1, 3]),
        ("registration.batch=7", [1, 2, 3]),
        ("strong.selection=validation", [0, 1, 3]),
        ("refinement.smoothness=0.4", [1, 3]),
        ("pseudo_masks.n=7", [2]),
        ("contest.precision=bfloat16", [0, 1, 3]),
        ("precision=bfloat16", [2]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JOINT_SET", f"scale=smoke,{change}")
            assert [k for k, (old, new) in enumerate(zip(before, keys())) if old != new] == changed, change


def test_an_item_says_what_its_method_took(settings):
    costs = {"registration": 60, "pairs": 12, "brainstorm": 120, "bcp": 90}
    item = grid.Item("strong", 1, 1, "", "brainstorm")
    cabinet = Cabinet(params.load("strong", seed=1), None)
    for stage, seconds in costs.items():
        cabinet.cost_file(stage).parent.mkdir(parents=True, exist_ok=True)
        cabinet.cost_file(stage).write_text(f'{{"seconds": {seconds}, "device": "CPU (1 threads)"}}')
    assert grid.cost_of(item, settings.cohort) == {"minutes": 3.2, "device": "CPU (1 threads)"}
    assert grid.cost_of(item._replace(stage="bcp"), settings.cohort)["minutes"] == 1.5
    assert grid.cost_of(item._replace(stage=""), settings.cohort) == {}
