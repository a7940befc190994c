"""Training on a folder of scans: a network by the method that ``folder.method`` names, and what its confidence means.

Where both volumes and slices are seen, there are two networks, and their mean is the mask. Quick networks see slices
alone then, to save time.
Below ten labelled subjects no mask is held out from the network: all train it. What its confidence means is learnt from
two quick networks, each of half of the labelled subjects, which segment the other half. From ten subjects on a fifth is
held out from the network itself. A single one cannot be held out.
"""

import json
from functools import partial

import numpy as np
import pandas as pd
import torch

from lib import DataError
from lib.augment import light, place
from lib.methods.experiment import Experiment
from lib.methods.peers import bcp, elastic, joint_plus
from lib.methods.pretraining import pretrain_registration
from lib.metrics import dice
from lib.models import ROOT
from lib.results.evaluation import score
from lib.runs.params import Section, cohort_file, section
from lib.runs.versions import fingerprint
from lib.scans.networks.applying import Confidence, Space, masks_of, segment
from lib.scans.networks.memory import with_less_memory
from lib.scans.networks.model_file import Model
from lib.scans.progress import case_takes, measuring_name, network_name, step_takes
from lib.scans.reading.drawing import drawn_part
from lib.scans.reading.folder import read_case
from lib.scans.reading.intake import build, chosen_images, class_names, folds_of, subjects_of
from lib.scans.reading.store import images_of

DEGRADED = "rotation", "scaling", "shift", "gamma", "contrast", "brightness", "blur", "noise"
METHODS = {"fs+elastic": elastic, "bcp": bcp, "joint+": joint_plus}  # that folder.method may name
SMALLEST_BATCH = 4  # a labelled image, and two pairs' worth of pasted ones


def train(settings, stores, intake, progress):
    """A model for a folder, by ``folder.method``.

    Args:
        settings: as params.load gives them, of recipe ``strong`` and cohort ``folder``.
        stores: list of store.Store of the cases' images, one for every plan.
        intake: intake.Intake.
        progress: progress.Progress.

    Returns:
        (model_file.Model, scores of the held-out cases: pandas.DataFrame with columns case, class, dsc, hd, hd95, the
        latter two in mm). Below ten labelled subjects they are those of the quick networks.

    Raises:
        DataError: no case has a mask, no mask marks anything, or memory does not suffice.
    """
    options = settings.folder
    if not intake.labelled:
        why = "".join(f"; {reason}" for reason in list(intake.failures.values())[:3])
        raise DataError(
            f"no image in {options.images} has a mask in {options.masks or 'any folder'} that can be used: draw "
            f"at least one{why}"
        )
    if not intake.values:
        raise DataError(f"the masks in {options.masks} mark nothing: draw at least one structure")
    chosen, plans = chosen_images(options, stores, intake.cases), [store.plan for store in stores]
    about = {
        "classes": class_names(intake.values),
        "values": intake.values,
        "axis": plans[0].axis,
        "plans": [
            {
                "space": plan.space,
                "spacing": list(plan.spacing),
                "canvas": list(plan.canvas),
                "root": settings.volumes.root if plan.space == "volumes" else ROOT,
            }
            for plan in plans
        ],
        "channels": options.channels or [""],
        "normalisation": settings.segmentation.normalisation,
        "pseudo_masks": settings.pseudo_masks,
        "symmetric": options.symmetric,
        "licence": options.licence,
    }
    subjects = subjects_of([case.name for case in intake.labelled], options.subject)
    number_of = {name: number for number, names in enumerate(subjects.values()) for name in names}
    used, held, pairs, keys = [], [], [], []
    for number, names in enumerate(folds_of(subjects, settings.seed)):
        networks, seen = [], seen_by(number, stores)
        for store in seen:
            with progress.part(network_name(number, store.plan, seen)) as done:
                train_one = lambda divisor: train_fold(settings, stores, store, intake, number, names, done, divisor)
                network, numerics, key = with_less_memory(train_one, "training")
                networks.append(network.eval())
                keys.append(key)
        model = Model(networks, {**about, "plans": seen_by(number, about["plans"])})
        used = used or networks
        with progress.part(measuring_name(number)) as done:
            for case in (case for case in intake.labelled if case.name in names):
                positions = seen_by(number, chosen[case.name])
                scores, found = measure(model, case, seen, positions, settings, numerics)
                held.append(scores)
                pairs.extend([number_of[case.name], *pair] for pair in found)
                done(case_takes(settings, seen_by(number, plans), positions, measured=True))
    columns = ["case", "class", "dsc", "hd", "hd95"]
    table = pd.concat(held)[columns] if held else pd.DataFrame(columns=columns)
    return Model(used, {**about, "fingerprint": fingerprint(keys), "calibration": pairs}), table


def seen_by(number, kinds):
    """Those of ``kinds``, a list with one part for every plan, that the networks of a fold see."""
    return kinds[-1:] if number else kinds


def measure(model, case, stores, positions, settings, numerics):
    """What a held-out case says of a model.

    Returns:
        (scores by class, pandas.DataFrame; pairs of mean confidence and DSC, of the case and of worse views of it).
    """
    with_memory = lambda work, *more: with_less_memory(
        lambda divisor: work(model, case, stores, positions, *more, numerics.sharing(1 / divisor)), case.name
    )
    scores, confidence = with_memory(score_case, settings.folder)
    own = [confidence, float(scores["dsc"].mean())]
    return scores.assign(case=case.name), [own, *with_memory(degraded_pairs, settings)]


def train_fold(settings, stores, store, intake, number, held_out, done, divisor=1):
    """A network, with the device it is on and the fingerprint of what it was trained on.

    Args:
        store: the one of ``stores`` that has the images it sees.
        number, held_out: which it is, and the names of the labelled cases that do not train. All but the first are
            quick: they are trained by the labelled images alone, for a part of the steps.
        done: of progress.Progress.part.
        divisor: of the batches, if memory does not suffice.
    """
    own = fold_settings(settings, store.plan, number, divisor)
    build(own, store, intake, held_out).save(cohort_file(own))
    experiment = Experiment(own)
    experiment.numerics.share = 1 / divisor
    experiment.after_step = partial(done, step_takes(own.strong.training, store.plan))
    method = METHODS[settings.folder.method] if len(experiment.data.unlabelled) and not number else elastic
    if method is joint_plus:
        if store is stores[0]:
            pretrain_registration(experiment)
        else:  # slices beside volumes: these have been registered
            method = bcp
    network, _ = method.train(experiment)
    return network, experiment.numerics, experiment.origin


def fold_settings(settings, plan, number, divisor=1):
    """Settings of a network; see ``train_fold``."""
    own = section(json.loads(json.dumps(settings)))
    own["cohort"] = f"folder/{plan.space}_{number}"
    own.registration["batch"] = max(1, own.registration.batch // divisor)
    training = own.strong.training
    if plan.space == "volumes":
        training.update(own.volumes.training)
        own.registration.update(own.volumes.registration)
        own.strong.joint_plus.update(own.volumes.joint_plus)
    training["batch"] = max(min(SMALLEST_BATCH, training.batch), training.batch // divisor)
    if number:
        training["steps"] = max(1, round(own.folder.quick * training.steps))
        own.folder["unlabelled"] = 0
    return own


def score_case(model, case, stores, positions, options, numerics):
    """DSC, HD and HD95 in mm of a case with a mask, on the slices ``positions``, and the mask's mean confidence.

    A single slice is scored as an image: in a volume one slice thick every voxel would lie on the surface. Where masks
    are drawn in part, DSC is that of the part, and there is no distance.
    """
    _, truth, grid = read_case(case, model.about["axis"])
    truth, drawn, _ = drawn_part(truth, options.drawn, model.about["axis"])
    planes = model.plans[0].planes(positions[0], grid)
    labels, _, confidence = segment(model, images_of(stores, case.name, positions), planes, grid, numerics)
    if drawn is not None:
        labels = np.where(drawn, labels, 0)
    masks = [
        torch.stack([torch.as_tensor(found[planes] == value) for value in model.about["values"]])[None].float()
        for found in (labels, truth)
    ]
    flat = len(planes) == 1
    masks = [part.squeeze(2) for part in masks] if flat else masks
    scores = score(*masks, model.about["classes"], grid.spacing[1:] if flat else grid.spacing)
    if drawn is not None:  # surfaces between what is drawn and what is not are no surfaces
        scores[["hd", "hd95"]] = np.nan
    return scores, confidence


@torch.no_grad()
def degraded_pairs(model, case, stores, positions, settings, numerics):
    """Mean confidence and DSC of worse and worse views of a held-out case, as pairs.

    Held-out cases are few and much alike: they alone do not say what low confidence means. Views are made by the
    augmentation of training, up to folder.degradation times as strong, of the images as the first plan has them.
    """
    options, augmentation, pairs = settings.folder, settings.strong.augmentation, []
    first, plan, at = stores[0], model.plans[0], positions[0]
    images = numerics.tensor(np.asarray(first.images(case.name)[at], np.float32))
    labels = np.asarray(first.labels(case.name)[at])
    drawn = first.drawn(case.name)
    parts = [labels == value for value in model.about["values"]]
    masks = numerics.tensor(np.stack(parts if drawn is None else [*parts, drawn[at]], axis=1))
    stack = (lambda part: part[0].movedim(1, 0)) if plan.space == "volumes" else (lambda part: part)
    space = Space((len(stack(images)), *images.shape[-2:]), (1.0, *plan.spacing)[-3:])
    generator = numerics.generator(settings.seed, "degraded", case.name)
    for strength in np.linspace(0, options.degradation, options.degraded_views + 1)[1:]:
        stronger = Section({**augmentation, **{name: strength * augmentation[name] for name in DEGRADED}})
        seen, truth = place(images, masks, generator, stronger, options.symmetric, bend=False, spacing=plan.spacing)
        seen, counts = light(seen.flatten(0, 1)[:, None], generator, stronger).view_as(seen), 1
        if drawn is not None:
            truth, counts = truth[:, :-1], truth[:, -1:]
        truth, counts = stack(truth), counts if drawn is None else stack(counts)
        others, mean = [], Confidence()
        for other in model.plans[1:]:
            channels = stack(seen).movedim(1, 0).cpu().numpy()
            others.append(np.stack([other.images(part, space) for part in channels], axis=1))
        soft = torch.cat(list(masks_of(model, [seen, *others], space, numerics, mean)))
        pair = [(part * counts).movedim(0, 1)[None] for part in (soft, truth)]
        pairs.append([mean.mean, float(dice(*pair).mean())])
    return pairs
