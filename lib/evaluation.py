"""Scores against true masks: DSC, HD and HD95, per image and as Table 1."""

import math

import numpy as np
import pandas as pd
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance

from lib.data import to_labels
from lib.experiment import best_rounds, load_measured, load_round
from lib.params import RECIPES

METHODS = ("fs", "registration", "joint", "combined")
COLUMNS = ["cohort", "method", "recipe", "class", "rate", "n_labelled", "seed", "n_test", "dsc_mean", "dsc_sd",
           "hd_mean", "hd_sd", "hd95_mean", "hd95_sd", "n_empty"]


def harden(masks):
    """Masks in [0, 1] as disjoint binary ones: a pixel belongs to its most probable class if that is above 0.5."""
    labels = to_labels(masks)
    return torch.stack([labels == value for value in range(1, masks.shape[1] + 1)], dim=1)


def dice(prediction, truth):
    """DSC per image and class, of masks thresholded at 0.5.

    Args:
        prediction, truth: ``(batch, classes, height, width)`` in [0, 1].

    Returns:
        ``(batch, classes)`` in [0, 1]; 1 where both masks are empty, 0 where one is.
    """
    return compute_dice(harden(prediction), harden(truth), ignore_empty=False)


def hausdorff(prediction, truth, percentile=None):
    """Hausdorff distance in pixels per image and class, of masks thresholded at 0.5.

    Args:
        prediction, truth: ``(batch, classes, height, width)`` in [0, 1].
        percentile: 95 for HD95; None for the maximum.

    Returns:
        ``(batch, classes)``; 0 where both masks are empty, the image's diagonal where one is.
    """
    prediction, truth = harden(prediction).cpu(), harden(truth).cpu()
    filled = prediction.any(dim=(2, 3)), truth.any(dim=(2, 3))
    distance = torch.zeros(filled[0].shape, dtype=torch.float64)
    distance[filled[0] != filled[1]] = math.hypot(*(side - 1 for side in truth.shape[-2:]))
    both = filled[0] & filled[1]
    images = both.any(dim=1)
    if images.any():
        scores = compute_hausdorff_distance(
            prediction[images], truth[images], include_background=True, percentile=percentile
        ).to(distance)
        distance[images] = torch.where(both[images], scores, distance[images])
    return distance


def score(prediction, truth, classes):
    """Scores of every image and class.

    Args:
        prediction, truth: ``(images, classes, height, width)``.
        classes: their names.

    Returns:
        pandas.DataFrame: image (position), class, dsc, hd, hd95 in pixels, and empty, which says that exactly one
        of the two masks has no pixel.
    """
    empty = harden(prediction).any(dim=(2, 3)) != harden(truth).any(dim=(2, 3))
    columns = {
        "dsc": dice(prediction, truth),
        "hd": hausdorff(prediction, truth),
        "hd95": hausdorff(prediction, truth, percentile=95),
        "empty": empty,
    }
    rows = {name: values.cpu().numpy().ravel() for name, values in columns.items()}
    images = np.repeat(np.arange(len(truth)), len(classes))
    return pd.DataFrame({"image": images, "class": list(classes) * len(truth), **rows})


def evaluate(experiment, split):
    """All methods of one recipe on the test images (or those of another anatomy).

    fs is the pre-trained segmentation network, joint the segmentation network alone, registration the mean of
    the N warped masks and combined the mean of all 2N; the latter three each with the round that was best for it
    on the validation images. Test images choose nothing.

    Args:
        experiment: lib.experiment.Experiment.
        split: ``test`` or ``unseen``.

    Returns:
        pandas.DataFrame, one row per image, method and class; empty where the cohort has no such split.
    """
    cohort, data, settings = experiment.cohort, experiment.data, experiment.settings
    index = cohort.index(split)
    if len(index) == 0:
        return pd.DataFrame()
    images, truth = data.images[index], data.masks[index]
    rounds = {"fs": 0, **best_rounds(load_measured(experiment))}
    masks = {
        number: experiment.generate(load_round(experiment, number)[0], images, f"{split}, round {number}",
                               "test", split, number)
        for number in sorted(set(rounds.values()))
    }
    field = {"fs": "plain", "joint": "plain", "registration": "registration", "combined": "soft"}
    frames = []
    for method in METHODS:
        scores = score(getattr(masks[rounds[method]], field[method]), truth, cohort.classes)
        position = scores.pop("image").to_numpy()
        scores.insert(0, "slice", index[position])
        scores.insert(0, "subject", cohort.subjects[index[position]])
        scores.insert(0, "round", rounds[method])
        scores.insert(0, "method", method)
        frames.append(scores)
    title = cohort.title if split == "test" else cohort.title.replace(" (", ", unseen anatomy (")
    head = {"cohort": title, "recipe": settings.recipe, "rate": settings.rate, "n_labelled": len(data.labelled),
            "seed": settings.seed}
    frame = pd.concat(frames, ignore_index=True)
    return frame.assign(**head)[[*head, *frame.columns]]


def rounds(experiments):
    """rounds.csv: what was measured after every joint round, of every recipe; ``best_for`` names the methods that
    are tested with that round."""
    frames = []
    for experiment in experiments:
        measured = load_measured(experiment)
        best = best_rounds(measured)
        named = measured["round"].map(lambda number: " ".join(m for m, chosen in best.items() if chosen == number))
        settings = experiment.settings
        head = {"cohort": experiment.cohort.title, "recipe": settings.recipe, "rate": settings.rate, "seed": settings.seed}
        frames.append(measured.assign(best_for=named, **head)[[*head, *measured.columns, "best_for"]])
    return pd.concat(frames, ignore_index=True)


def average_classes(per_image):
    """``per_image`` with a row of class ``mean`` per image and method added: the average over foreground classes."""
    keys = [c for c in per_image.columns if c not in ("class", "dsc", "hd", "hd95", "empty")]
    means = per_image.groupby(keys, sort=False, as_index=False).agg(
        dsc=("dsc", "mean"), hd=("hd", "mean"), hd95=("hd95", "mean"), empty=("empty", "any")
    )
    return pd.concat([means.assign(**{"class": "mean"}), per_image], ignore_index=True)[per_image.columns]


def table(per_image):
    """Table 1: mean and standard deviation over test images, per cohort, recipe, method and class.

    Args:
        per_image: rows of ``evaluate``, of any number of recipes and splits.

    Returns:
        pandas.DataFrame with COLUMNS; class ``mean`` is the average over foreground classes.
    """
    keys = ["cohort", "recipe", "method", "class", "rate", "n_labelled", "seed"]
    summary = average_classes(per_image).groupby(keys, sort=False).agg(
        n_test=("dsc", "size"), dsc_mean=("dsc", "mean"), dsc_sd=("dsc", "std"), hd_mean=("hd", "mean"),
        hd_sd=("hd", "std"), hd95_mean=("hd95", "mean"), hd95_sd=("hd95", "std"), n_empty=("empty", "sum"),
    ).reset_index()
    order = {name: rank for rank, name in enumerate([*RECIPES, *METHODS, "mean"])}
    ranks = summary[["cohort", "recipe", "method"]].replace(order)
    is_class = (summary["class"] != "mean").rename("is_class")
    by = pd.concat([ranks, is_class], axis=1).sort_values(["cohort", "recipe", "is_class", "method"], kind="stable")
    return summary.loc[by.index, COLUMNS].reset_index(drop=True)


def markdown(table1):
    """Table 1 as Markdown, mean ± standard deviation over test images, rounded for reading.

    With one foreground class its rows would repeat those of ``mean``, so they are left out.
    """
    classes = table1.groupby("cohort")["class"].transform("nunique")
    table1 = table1[(table1["class"] == "mean") | (classes > 2)]
    cell = lambda row, name, digits: f"{row[name + '_mean']:.{digits}f} ± {row[name + '_sd']:.{digits}f}"
    rows = [
        {
            "cohort": row.cohort, "recipe": row.recipe, "method": row.method, "class": row["class"],
            "labelled": f"{row.n_labelled} ({row.rate} %)", "n": row.n_test, "DSC": cell(row, "dsc", 3),
            "HD (px)": cell(row, "hd", 2), "HD95 (px)": cell(row, "hd95", 2), "one mask empty": row.n_empty,
        }
        for _, row in table1.iterrows()
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) + "\n"


def metrics(table1):
    """Nested figures for `dvc metrics`: cohort, recipe, method, then dsc, hd and hd95, of class ``mean``."""
    tree = {}
    for _, row in table1[table1["class"] == "mean"].iterrows():
        leaf = tree.setdefault(row.cohort, {}).setdefault(row.recipe, {})
        leaf[row.method] = {name: round(float(row[f"{name}_mean"]), 6) for name in ("dsc", "hd", "hd95")}
    return tree
