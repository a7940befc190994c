"""Training on a folder of scans: networks by joint+, what is held out, and what confidence means.

With five or more labelled subjects, a fifth of them is held out. Their DSC says which rounds are good, and calibrates
the predicted DSC. With two to four, each is left out once, and a mask is the mean over the networks. A single one
cannot be held out.
"""

import json

import numpy as np
import pandas as pd
import torch

from lib import DataError
from lib.augment import augment
from lib.methods.experiment import Experiment, load_measured, load_round
from lib.methods.joint_plus import joint_plus_rounds
from lib.methods.pretraining import pretrain_registration, pretrain_segmentation
from lib.metrics import dice
from lib.results.evaluation import score
from lib.runs.params import Section, cohort_file, section
from lib.runs.versions import fingerprint
from lib.scans.applying import confidence_of, segment, soft_masks
from lib.scans.folder import read_case
from lib.scans.intake import build, chosen_slices, class_names, folds_of, subjects_of
from lib.scans.memory import with_less_memory
from lib.scans.model_file import Model

TOLERANCE = 0.01  # how far below the best round, in DSC of held-out cases, the one that is kept may be


def train(settings, store, intake):
    """Networks for a folder by joint+, one per fold.

    Args:
        settings: as params.load gives them, of cohort ``folder``.
        store: store.Store of the cases' slices.
        intake: intake.Intake.

    Returns:
        (model_file.Model, scores of the held-out cases: pandas.DataFrame with columns case, class, dsc, hd, hd95, the
        latter two in mm).

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
    slices = chosen_slices(options, store, intake.cases)
    about = {
        "classes": class_names(intake.values),
        "values": intake.values,
        "size": options.size,
        "axis": options.axis,
        "normalisation": settings.segmentation.normalisation,
        "pseudo_masks": settings.pseudo_masks,
        "symmetric": options.symmetric,
        "licence": options.licence,
    }
    networks, keys, held, pairs = [], [], [], []
    subjects = subjects_of([case.name for case in intake.labelled], options.subject)
    number_of = {name: number for number, names in enumerate(subjects.values()) for name in names}
    for number, held_out in enumerate(folds_of(subjects, settings.seed)):
        train_one = lambda divisor: train_fold(settings, store, intake, number, held_out, divisor)
        network, numerics, key = with_less_memory(train_one, "training")
        networks.append(network.eval())
        keys.append(key)
        for case in intake.labelled:
            if case.name in held_out:
                model, positions = Model([network], about), slices[case.name]
                with_memory = lambda work, *more: with_less_memory(
                    lambda divisor: work(model, case, store, positions, *more, numerics.sharing(1 / divisor)), case.name
                )
                scores, confidence = with_memory(score_case)
                pairs.append([number_of[case.name], confidence, float(scores["dsc"].mean())])
                pairs += [[number_of[case.name], *pair] for pair in with_memory(degraded_pairs, settings)]
                held.append(scores.assign(image=case.name))
    columns = ["case", "class", "dsc", "hd", "hd95"]
    table = pd.concat(held).rename(columns={"image": "case"})[columns] if held else pd.DataFrame(columns=columns)
    return Model(networks, {**about, "fingerprint": fingerprint(keys), "calibration": pairs}), table


def train_fold(settings, store, intake, number, held_out, divisor=1):
    """The network of one fold, with the device it is on and the fingerprint of what it was trained on.

    Args:
        number, held_out: which fold, and the names of the cases that validate.
        divisor: of the batches, if memory does not suffice.
    """
    own = fold_settings(settings, number, bool(held_out), divisor)
    build(own, store, intake, held_out).save(cohort_file(own))
    experiment = Experiment(own)
    experiment.numerics.share = 1 / divisor
    network, _ = pretrain_segmentation(experiment)
    if len(experiment.data.unlabelled):
        pretrain_registration(experiment)
        joint_plus_rounds(experiment)
        last = last_good_round(load_measured(experiment, "joint_plus")) if held_out else own.joint_plus.rounds
        network = load_round(experiment, last, "joint_plus")[0][0]
    return network, experiment.numerics, experiment.origin


def last_good_round(measured):
    """The last round whose DSC on the held-out cases is at most TOLERANCE below the best.

    Held-out cases are few. They show that a round has gone wrong, but not which of several good ones is best.

    Args:
        measured: see experiment.load_measured.
    """
    scores = measured[measured["split"] == "validation"].set_index("round")["dsc_segmentation"]
    return int(scores.index[scores >= scores.max() - TOLERANCE].max())


def fold_settings(settings, number, validated=True, divisor=1):
    """Settings of a fold; they lead back to its Experiment after training. See ``train_fold``."""
    own = section(json.loads(json.dumps(settings)))
    own["cohort"] = f"folder/fold_{number}"
    for part in (own.segmentation, own.registration, own.joint_plus):
        part["batch"] = max(1, part["batch"] // divisor)
    if not validated:  # without held-out cases there is nothing to choose the weight on
        own.joint_plus["fusion"] = "mean"
    return own


def score_case(model, case, store, positions, numerics):
    """DSC, HD and HD95 in mm of a case with a mask, on the slices ``positions``, and the mask's mean confidence.

    A single slice is scored as an image: in a volume one slice thick every voxel would lie on the surface.
    """
    _, truth, grid = read_case(case, model.about["axis"])
    labels, _, confidence = segment(model, store.images(case.name), positions, grid, numerics)
    masks = [
        torch.stack([torch.as_tensor(found[positions] == value) for value in model.about["values"]])[None].float()
        for found in (labels, truth)
    ]
    flat = len(positions) == 1
    masks = [part.squeeze(2) for part in masks] if flat else masks
    return score(*masks, model.about["classes"], grid.spacing[1:] if flat else grid.spacing), confidence


@torch.no_grad()
def degraded_pairs(model, case, store, positions, settings, numerics):
    """Mean confidence and DSC of worse and worse views of a held-out case, as pairs.

    Held-out cases are few and much alike: they alone do not say what low confidence means. Views are made by the strong
    recipe's augmentation, up to folder.degradation times as strong as in training.
    """
    options, pairs = settings.folder, []
    images = numerics.tensor(np.asarray(store.images(case.name)[positions], np.float32)[:, None])
    labels = np.asarray(store.labels(case.name)[positions])
    masks = numerics.tensor(np.stack([labels == value for value in model.about["values"]], axis=1))
    generator = numerics.generator(settings.seed, "degraded", case.name)
    for strength in np.linspace(0, options.degradation, options.degraded_views + 1)[1:]:
        stronger = Section({key: strength * value for key, value in settings.augmentation.items()})
        seen, truth = augment(images, masks, generator, stronger, options.symmetric)
        soft = torch.cat(list(soft_masks(model, seen[:, 0], numerics)))
        pair = [part.movedim(0, 1)[None] for part in (soft, truth)]
        pairs.append([confidence_of(soft), float(dice(*pair).mean())])
    return pairs
