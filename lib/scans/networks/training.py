"""Training on a folder of scans: a network by the method that ``folder.method`` names, and what its confidence means.

Where slices of all directions are seen, there are three networks, and their mean is the mask. Quick networks see one
direction then, to save time.
Below ten labelled subjects no mask is held out from the network: all train it. What its confidence means is learnt from
two quick networks, each of half of the labelled subjects, which segment the other half. From ten subjects on a fifth is
held out from the network itself. A single one cannot be held out.
"""

import json
from functools import partial

import pandas as pd
from tqdm import tqdm

from lib import DataError
from lib.methods.experiment import Experiment
from lib.methods.peers import bcp, elastic, joint_plus
from lib.methods.pretraining import pretrain_registration
from lib.models import ROOT
from lib.runs.params import cohort_file, section
from lib.runs.versions import fingerprint
from lib.scans.networks.measuring import measure
from lib.scans.networks.memory import with_less_memory
from lib.scans.networks.model_file import Model
from lib.scans.progress import case_takes, measuring_name, network_name, parts_of, step_takes
from lib.scans.reading.intake import (
    build,
    chosen_images,
    class_names,
    drawn_images,
    finer,
    folds_of,
    subjects_of,
)

METHODS = {"fs+elastic": elastic, "bcp": bcp, "joint+": joint_plus}  # that folder.method may name
MANY = {"slices": 50, "volumes": 5}  # labelled, from which unlabelled ones bring nothing: docs/contest.md, own-scans.md
SMALLEST_BATCH = 4  # a labelled image, and two pairs' worth of pasted ones


class TooThin(DataError):
    """Nothing that is drawn can be seen by the networks."""


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
            raise TooThin(f"what is drawn in {options.masks} is too thin for {plans[k].title}: {finer(plans[k])}")
    about = about_of(settings, plans, intake.values)
    subjects = subjects_of([case.name for case in intake.labelled], options.subject)
    number_of = {name: number for number, names in enumerate(subjects.values()) for name in names}
    used, held, pairs, keys = [], [], [], []
    for number, names in enumerate(folds_of(subjects, settings.seed, settings.folder.quick)):
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


def what_is_to_do(settings, plans, labelled, chosen):
    """Parts of a run for progress.Progress.

    Args:
        settings: as params.load gives them.
        plans: planning.Plan of every network.
        labelled: names of the cases that train one. None: a model is given.
        chosen: dictionary of case to the positions of its images that are segmented, see intake.chosen_images.
    """
    own = settings.folder
    folds = [] if labelled is None else folds_of(subjects_of(labelled, own.subject), settings.seed, own.quick)
    each = [seen_by(number, plans) for number in range(max(1, len(folds)))]
    trainings = [
        [fold_settings(settings, plan, number).strong.training for plan in each[number]] for number in range(len(folds))
    ]
    return parts_of(settings, each, trainings, folds, chosen)


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
    few = len(experiment.data.labelled) < MANY["volumes" if experiment.whole else "slices"]
    return "bcp" if few else "fs+elastic"


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
