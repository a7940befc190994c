"""Scores against true masks: DSC, HD and HD95 of every method on every test image."""

import time
from importlib import import_module
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lib.cohorts.splitting import TESTED
from lib.methods import table
from lib.metrics import dice, harden, hausdorff
from lib.pseudo_masks import mean_confidence
from lib.results.calibration import reliability
from lib.results.statistics import FURTHER
from lib.runs.files import save_arrays


def score(prediction, truth, classes, spacing=None):
    """Scores of every image and class.

    Args:
        prediction, truth: ``(images, classes, *space)``.
        classes: their names.
        spacing: see ``hausdorff``.

    Returns:
        pandas.DataFrame: image (position), class, dsc, hd, hd95 in pixels or the units of ``spacing``, and empty, which
        says that exactly one of the two masks has no pixel.
    """
    prediction, truth = harden(prediction), harden(truth)  # once for all three scores: volumes are large
    empty = prediction.flatten(2).any(2) != truth.flatten(2).any(2)
    hd, hd95 = hausdorff(prediction, truth, spacing)
    columns = {"dsc": dice(prediction, truth), "hd": hd, "hd95": hd95, "empty": empty}
    rows = {name: values.cpu().numpy().ravel() for name, values in columns.items()}
    images = np.repeat(np.arange(len(truth)), len(classes))
    return pd.DataFrame({"image": images, "class": list(classes) * len(truth), **rows})


def score_volumes(cohort, masks, index):
    """DSC, HD and HD95, in pixels, of every volume and class at the volume's original size.

    Args:
        cohort: VolumeCohort.
        masks: ``(slices, classes, size, size)`` in [0, 1], of the slices ``index``, which hold whole volumes.

    Returns:
        pandas.DataFrame with columns image (position in ``index`` of the volume's first slice), class, dsc, hd,
        hd95 and empty.
    """
    pairs = cohort.hard_volumes(masks, index)
    frames = [score(seen, truth, cohort.classes).assign(image=first) for first, seen, truth in pairs]
    return pd.concat(frames, ignore_index=True)


class Evaluation(NamedTuple):
    """What all methods of one experiment are worth."""

    per_image: pd.DataFrame  # one row per image, method and class
    reliability: pd.DataFrame  # calibration.reliability of every method's masks
    masks: dict  # method to masks of the test images


def title_of(cohort, split):
    """How tables call the test images of a cohort, or those of a further split of splitting.TESTED."""
    name, *rest = cohort.title.split(" (", 1)
    return " (".join([name + FURTHER[split], *rest])


def module_of(stage, recipe):
    """The module of a stage under lib.methods, imported when it is needed: some take seconds."""
    return import_module(f"lib.methods.{stage.module_in(recipe)}")


def trained_stages(experiment, only=None):
    """Stages of the table that have been trained for an experiment, and are part of this run.

    ``only`` is the name of a stage that is evaluated by itself.
    """
    settings = experiment.settings
    for stage in table.stages():
        last = settings.joint.rounds if stage.rounds and settings.recipe == "paper" else None
        wanted = stage.name == only if only else settings.recipe in stage.recipes
        if wanted and experiment.cabinet.file(stage.name, last).exists():
            yield stage


@torch.no_grad()
def predict(experiment, index, only=None):
    """Masks of the images ``index`` by every method of one experiment that has been trained, see ``trained_stages``.

    Test images choose nothing. Validation images choose weights and rounds in the paper's recipe, and nothing in recipe
    `strong` by default, see ``selection``.

    Returns:
        Dictionary of method to experiment.Prediction.
    """
    found = {}
    for stage in trained_stages(experiment, only):
        found |= module_of(stage, experiment.settings.recipe).predict(experiment, index)
    return found


def evaluate(experiment, only=None):
    """Every method of one experiment on the test images, and on unseen and external ones where there are any.

    Args:
        experiment: Experiment, all of whose stages have run.
        only: see ``trained_stages``.

    Returns:
        Evaluation.
    """
    cohort, data = experiment.cohort, experiment.data
    frames, bins, kept = [], [], {}
    parts = {split: cohort.index(split) for split in TESTED if len(cohort.index(split))}
    predicted = predict(experiment, np.concatenate(list(parts.values())), only)
    sizes = [len(index) for index in parts.values()]
    predicted = {method: (number, masks.split(sizes)) for method, (number, masks) in predicted.items()}
    for position, (split, index) in enumerate(parts.items()):
        for method, (number, masks) in predicted.items():
            masks = masks[position]
            frame, reliable = describe(experiment, split, index, method, masks, data.masks[index])
            frames.append(frame.assign(round=number))
            bins.append(reliable)
            if split == "test":
                kept[method] = masks
    return Evaluation(pd.concat(frames, ignore_index=True), pd.concat(bins, ignore_index=True), kept)


def describe(experiment, split, index, method, masks, truth):
    """Scores, confidence and reliability of one method's masks of the images ``index``: (per image, bins)."""
    cohort, settings = experiment.cohort, experiment.settings
    head = {
        "cohort": title_of(cohort, split),
        "recipe": settings.recipe,
        "rate": settings.rate,
        "n_labelled": cohort.units(experiment.data.labelled.cpu()),
        "seed": settings.seed,
        "variant": settings.variant,
        "method": method,
    }
    case = None
    if cohort.of_volumes:
        scores = score_volumes(cohort, masks, index)
        case = torch.as_tensor(np.unique(cohort.volumes[index], return_inverse=True)[1], device=masks.device)
    else:
        scores = score(masks, truth, cohort.classes, cohort.spacing if cohort.axes == 3 else None)
    position = scores.pop("image").to_numpy()
    confidence = mean_confidence(masks, case).cpu().numpy()[position]
    frame = scores.assign(
        **head, subject=cohort.subjects[index[position]], slice=index[position], confidence=confidence
    )
    bins = reliability(masks, truth)
    return frame[[*head, "subject", "slice", *scores.columns, "confidence"]], bins.assign(**head)[
        [*head, *bins.columns]
    ]


def evaluate_untrained(experiment, only=None):
    """Untrained methods on the test images, or on an even sample of as many as ``images`` of their section says.

    As ``evaluate``, but without a recipe. Images that are not in the sample have empty masks and no rows. ``only`` is
    the name of a stage that is evaluated by itself: on all images.
    """
    cohort, data, settings = experiment.cohort, experiment.data, experiment.settings
    frames, bins, kept = [], [], {}
    test = cohort.index("test")
    whole = getattr(cohort, "volumes", np.arange(len(cohort.images)))[test]  # volumes are scored whole
    for stage in table.stages(trained=False):
        if not (stage.name == only if only else settings.recipe in stage.recipes):
            continue
        names = whole[np.sort(np.unique(whole, return_index=True)[1])]
        count = len(names) if only else max(1, round(settings[stage.name].images * len(names) / len(test)))
        names = names[np.unique(np.linspace(0, len(names) - 1, count).round().astype(int))]
        index = test[np.isin(whole, names)]
        start = time.monotonic()
        predicted = module_of(stage, "-").predict(experiment, index)
        experiment.note_cost(stage.name, time.monotonic() - start)
        for method, (number, masks) in predicted.items():
            frame, reliable = describe(experiment, "test", index, method, masks, data.masks[index])
            frames.append(frame.assign(recipe="-", round=number))
            bins.append(reliable.assign(recipe="-"))
            kept[method] = masks.new_zeros(len(test), *masks.shape[1:])
            kept[method][np.isin(test, index)] = masks
    return Evaluation(pd.concat(frames, ignore_index=True), pd.concat(bins, ignore_index=True), kept)


def rounds(experiment):
    """What was measured while every stage was trained, one row per stage, round and split.

    Joint rounds by the paper's recipe have a row each, CCT-R for every look at its networks during training. There
    ``round`` is the step, stage ``cctr`` the U-Net, ``cctr-b`` the Swin transformer, and unlabelled images are those of
    ``watched_slices``. ``best_for`` names the methods that are tested with that round.
    """
    settings = experiment.settings
    modules = [module_of(stage, settings.recipe) for stage in trained_stages(experiment)]
    frames = [module.rounds(experiment) for module in modules if hasattr(module, "rounds")]
    if not frames:
        return pd.DataFrame()
    head = {
        "cohort": experiment.cohort.title,
        "recipe": settings.recipe,
        "rate": settings.rate,
        "seed": settings.seed,
        "variant": settings.variant,
    }
    together = pd.concat(frames, ignore_index=True).assign(**head)
    first = [*head, "stage"]
    return together[[*first, *(c for c in together.columns if c not in (*first, "best_for")), "best_for"]]


def save_watched(experiment, folder, count=5):
    """Keep, for Figure 2, the masks that stages of the table gave one image during training.

    ``count`` of them, evenly spaced, go to ``<stage>_<recipe>.npz`` in ``folder``: steps and masks.
    """
    for stage in trained_stages(experiment):
        if not stage.watched:
            continue
        watched = experiment.cabinet.load(stage.name)["watched"]
        if not watched:
            continue
        chosen = [watched[round(k)] for k in np.linspace(0, len(watched) - 1, min(count, len(watched)))]
        steps, masks = zip(*chosen)
        kept = {"steps": np.array(steps), "masks": np.stack([mask.cpu().numpy()[0] for mask in masks])}
        save_arrays(kept, folder / f"{stage.name}_{experiment.settings.recipe}.npz")
