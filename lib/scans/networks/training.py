"""Training on a folder of scans: a network by the method that ``folder.method`` names, and what its confidence means.

Where slices of all directions are seen, there are three networks, and their mean is the mask. Quick networks see one
direction then, to save time.
Below ten labelled subjects no mask is held out from the network: all train it. What its confidence means is learnt from
two quick networks, each of half of the labelled subjects, which segment the other half. From ten subjects on a fifth is
held out from the network itself. A single one cannot be held out.
"""

import json
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib import DataError
from lib.augment import light, place
from lib.cohorts.reading import read_grid, turned, upright
from lib.methods.experiment import Experiment
from lib.methods.peers import bcp, elastic, joint_plus
from lib.methods.pretraining import pretrain_registration
from lib.metrics import dice
from lib.models import ROOT
from lib.results.evaluation import score
from lib.runs.params import Section, cohort_file, section
from lib.runs.versions import fingerprint
from lib.scans.networks.applying import Confidence, masks_of, segment
from lib.scans.networks.memory import with_less_memory
from lib.scans.networks.model_file import Model
from lib.scans.progress import case_takes, measuring_name, network_name, step_takes
from lib.scans.reading.drawing import drawn_part
from lib.scans.reading.folder import read_case
from lib.scans.reading.intake import (
    build,
    chosen_images,
    class_names,
    drawn_images,
    finer,
    folds_of,
    subjects_of,
)
from lib.scans.reading.planning import SEVERAL
from lib.scans.reading.store import images_of

DEGRADED = "rotation", "scaling", "shift", "gamma", "contrast", "brightness", "blur", "noise"
METHODS = {"fs+elastic": elastic, "bcp": bcp, "joint+": joint_plus}  # that folder.method may name
MANY = 50  # labelled slices, from which unlabelled ones bring nothing: see docs/contest.md; of volumes SEVERAL
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
    for k, store in enumerate(stores):
        if not any(len(drawn_images(store, case.name, chosen[case.name][k])) for case in intake.labelled):
            raise DataError(f"what is drawn in {options.masks} is too thin for {plans[k].title}: {finer(plans[k])}")
    about = about_of(settings, plans, intake.values)
    subjects = subjects_of([case.name for case in intake.labelled], options.subject)
    number_of = {name: number for number, names in enumerate(subjects.values()) for name in names}
    used, held, pairs, keys = [], [], [], []
    for number, names in enumerate(folds_of(subjects, settings.seed)):
        networks, seen = [], seen_by(number, stores)
        for store in seen:
            with progress.part(network_name(number, store.plan, seen)) as done:
                train_one = lambda divisor: train_fold(settings, store, intake, number, names, done, divisor)
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


def about_of(settings, plans, values):
    """``about`` of a model, see model_file.Model, before anything is trained: all but fingerprint and calibration."""
    options = settings.folder
    return {
        "classes": class_names(values),
        "values": values,
        "plans": [
            {
                "space": plan.space,
                "axis": plan.axis,
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


def seen_by(number, kinds):
    """Those of ``kinds``, a list with one part for every plan, that the networks of a fold see."""
    return kinds[:1] if number else kinds


def measure(model, case, stores, positions, settings, numerics):
    """What a held-out case says of a model.

    Returns:
        (scores by class, pandas.DataFrame; pairs of confidence and DSC, of the case and of worse views of it, unless
        nothing is marked).
    """
    with_memory = lambda work, *more: with_less_memory(
        lambda divisor: work(model, case, stores, positions, *more, numerics.sharing(1 / divisor)), case.name
    )
    scores, confidence = with_memory(score_case, settings.folder)
    own = [confidence, float(scores["dsc"].mean())]
    pairs = [own, *with_memory(degraded_pairs, settings)] if confidence else []  # what marks nothing is reviewed anyway
    return scores.assign(case=case.name), pairs


def train_fold(settings, store, intake, number, held_out, done, divisor=1):
    """A network, with the device it is on and the fingerprint of what it was trained on.

    Args:
        store: store.Store of the images that it sees.
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
    data = experiment.data
    method = method_for(experiment, settings.folder.method, number)
    if not number:
        seen = f"{store.plan.in_words}: {len(data.labelled)} labelled and {len(data.unlabelled)} unlabelled"
        tqdm.write(f"{seen}; trained by {method}" + ", change it by folder.method" * bool(len(data.unlabelled)))
    if method == "joint+":
        pretrain_registration(experiment)
    network, _ = METHODS[method].train(experiment)
    return network, experiment.numerics, experiment.origin


def method_for(experiment, wanted, number):
    """The method that trains a network, one of METHODS; see ``train_fold``.

    Args:
        experiment: Experiment of its images.
        wanted: folder.method. By ``auto`` unlabelled images train too where labelled ones are few.
    """
    if number or not len(experiment.data.unlabelled):
        return "fs+elastic"
    if wanted != "auto":
        return wanted
    return "bcp" if len(experiment.data.labelled) < (SEVERAL if experiment.whole else MANY) else "fs+elastic"


def fold_settings(settings, plan, number, divisor=1):
    """Settings of a network; see ``train_fold``."""
    own = section(json.loads(json.dumps(settings)))
    own["cohort"] = f"folder/{plan.view}_{number}"
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
    """DSC, HD and HD95 in mm of a case with a mask, on the slices ``positions``, and the confidence of its mask.

    A single slice is scored as an image: in a volume one slice thick every voxel would lie on the surface. Where masks
    are drawn in part, DSC is that of the part, and there is no distance.
    """
    _, truth, grid = read_case(case, model.plans[0].axis)
    truth, drawn, _ = drawn_part(truth, options.drawn, model.plans[0].axis)
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
    """Confidence and DSC of worse and worse views of a held-out case, as pairs.

    Held-out cases are few and much alike: they alone do not say what low confidence means. Views are made by the
    augmentation of training, up to folder.degradation times as strong, of the images as the first plan has them.
    """
    options, augmentation, pairs = settings.folder, settings.strong.augmentation, []
    plan = model.plans[0]
    images, masks, spacing = first_images(model, case, stores[0], positions[0], numerics)
    slices = (lambda part: part[0].movedim(1, 0)) if images.ndim == 5 else (lambda part: part)
    space = Space((len(slices(images)), *images.shape[-2:]), (1.0, *spacing)[-3:], plan.axis)
    generator = numerics.generator(settings.seed, "degraded", case.name)
    flip = plan.mirrored(options.symmetric)
    for strength in np.linspace(0, options.degradation, options.degraded_views + 1)[1:]:
        stronger = Section({**augmentation, **{name: strength * augmentation[name] for name in DEGRADED}})
        seen, truth = place(images, masks, generator, stronger, flip, bend=False, spacing=spacing)
        seen = light(seen.flatten(0, 1)[:, None], generator, stronger).view_as(seen)
        truth, drawn = slices(truth).tensor_split([len(model.about["values"])], dim=1)
        seen, confidence = seen if plan.space == "volumes" else slices(seen), Confidence()
        views = [seen, *(turned_images(seen, space, other) for other in model.plans[1:])]
        soft = torch.cat(list(masks_of(model, views, space, numerics, confidence)))
        pair = [(part * drawn if drawn.shape[1] else part).movedim(0, 1)[None] for part in (soft, truth)]
        if confidence.value:
            pairs.append([confidence.value, float(dice(*pair).mean())])
    return pairs


def first_images(model, case, store, positions, numerics):
    """What the first plan sees of a labelled case.

    Where slices of all directions are seen, its slices are one volume, so that all directions see one worse view.

    Returns:
        (images; masks, with a last channel for what is drawn where not all is; spacing of their space), all tensors
        ``(n, channels, *space)``.
    """
    plan, labels, drawn = model.plans[0], np.asarray(store.labels(case.name)[positions]), store.drawn(case.name)
    images = numerics.tensor(np.asarray(store.images(case.name)[positions], np.float32))
    parts = [labels == value for value in model.about["values"]]
    masks = numerics.tensor(np.stack(parts if drawn is None else [*parts, drawn[positions]], axis=1))
    if len(model.plans) == 1:
        return images, masks, plan.spacing
    between = read_grid(case.image, plan.axis).spacing[0]
    return *(numerics.tensor(part.movedim(0, 1)[None]) for part in (images, masks)), (between, *plan.spacing)


class Space(NamedTuple):
    """What a plan needs of a Grid, for scans that come from no file."""

    slices: tuple  # sides (slices, rows, columns)
    spacing: tuple  # mm between them
    axis: int  # along which slices are taken

    def along(self, axis):
        """The same, slices along another axis."""
        order = [upright(self.axis).index(side) for side in upright(axis)]
        return Space(*(tuple(part[k] for k in order) for part in (self.slices, self.spacing)), axis)


def turned_images(slices, space, plan):
    """Slices ``(slices, channels, rows, columns)`` of a Space as a plan of another direction has them; an array."""
    channels = (turned(part, space.axis, plan.axis) for part in slices.movedim(1, 0).cpu().numpy())
    return np.stack([plan.images(part, space.along(plan.axis)) for part in channels], axis=1)
