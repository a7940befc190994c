"""Scores against true masks: DSC, HD and HD95 of every method on every test image."""

import math
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lib.calibration import reliability
from lib.data import to_labels
from lib.experiment import best_rounds, load_cost, load_measured, load_round, load_saved
from lib.pseudo_masks import fuse, mean_confidence
from lib.refinement import refined
from lib.volumes import VolumeCohort, score_volumes

FAMILIES = {"joint": "", "joint_plus": "+"}  # stage, and what its methods' names end in


def harden(masks):
    """Masks in [0, 1] as disjoint binary ones: a pixel belongs to what is most probable there, see to_labels.

    Args:
        masks: ``(batch, classes, ...)`` in [0, 1]; those of type bool are disjoint already and returned as they are.

    Returns:
        As ``masks``, bool.
    """
    if masks.dtype == torch.bool:
        return masks
    labels = to_labels(masks)
    return torch.stack([labels == value for value in range(1, masks.shape[1] + 1)], dim=1)


def dice(prediction, truth):
    """DSC per image and class, of hardened masks.

    Args:
        prediction, truth: ``(batch, classes, height, width)`` in [0, 1], or volumes with a third axis.

    Returns:
        ``(batch, classes)`` in [0, 1]; 1 where both masks are empty, 0 where one is.
    """
    prediction, truth = harden(prediction), harden(truth)
    both, sizes = (prediction & truth).flatten(2).sum(2), prediction.flatten(2).sum(2) + truth.flatten(2).sum(2)
    return torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0)


def dice_of_groups(prediction, truth, groups):
    """DSC of groups of images, such as the slices of a volume, ``(groups, classes)``; otherwise as ``dice``.

    Args:
        groups: ``(batch,)`` number of the group that each image is of, from 0.
    """
    prediction, truth = harden(prediction), harden(truth)
    pixels = torch.stack((prediction & truth, prediction)).flatten(3).sum(3), truth.flatten(2).sum(2)[None]
    counted = torch.cat(pixels).float()
    both, found, true = counted.new_zeros(3, int(groups.max()) + 1, truth.shape[1]).index_add(1, groups, counted)
    return torch.where(found + true > 0, 2 * both / (found + true).clamp(min=1), 1.0)


def hausdorff(prediction, truth, spacing=None):
    """HD and HD95 per image and class, of hardened masks, in pixels or in the units of ``spacing``.

    Args:
        prediction, truth: ``(batch, classes, height, width)`` in [0, 1], or volumes with a third axis.
        spacing: between pixels along every axis; None for 1.

    Returns:
        Two tensors ``(batch, classes)``: the largest distance between both outlines, and the 95th percentile of the
        distances from one to the other, the larger of both ways. 0 where both masks are empty, the image's diagonal
        where one is.
    """
    from monai.metrics.utils import get_edge_surface_distance  # takes seconds, which stages that only train need not wait

    prediction, truth = harden(prediction).cpu(), harden(truth).cpu()
    filled = prediction.flatten(2).any(2), truth.flatten(2).any(2)
    hd, hd95 = torch.zeros(2, *filled[0].shape, dtype=torch.float64)
    sides = zip(truth.shape[2:], spacing or [1] * (truth.ndim - 2))
    hd[filled[0] != filled[1]] = math.hypot(*((side - 1) * unit for side, unit in sides))
    hd95.copy_(hd)
    for image, label in (filled[0] & filled[1]).nonzero().tolist():
        _, distances, _ = get_edge_surface_distance(prediction[image, label].float(), truth[image, label].float(),
                                                    spacing=spacing, symmetric=True)
        hd[image, label] = max(float(found.max()) for found in distances)
        hd95[image, label] = max(float(found.quantile(0.95)) for found in distances)
    return hd, hd95


def score(prediction, truth, classes, spacing=None):
    """Scores of every image and class.

    Args:
        prediction, truth: ``(images, classes, height, width)``, or volumes with a third axis.
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


class Evaluation(NamedTuple):
    """What all methods of one experiment are worth."""

    per_image: pd.DataFrame  # one row per image, method and class
    reliability: pd.DataFrame  # calibration.reliability of every method's masks
    masks: dict  # method to masks of the test images


def title_of(cohort, split):
    """How tables call the test images of a cohort, or those of its unseen anatomy."""
    return cohort.title if split == "test" else cohort.title.replace(" (", ", unseen anatomy (")


def trained_families(experiment):
    """(stage, ending) of joint and joint+ where all their rounds are done. A variant has no joint of its own."""
    for stage, ending in FAMILIES.items():
        own = stage != "joint" or not experiment.settings.variant
        if own and experiment.model_file(stage, experiment.settings[stage].rounds).exists():
            yield stage, ending


@torch.no_grad()
def predict(experiment, index):
    """Masks of the images ``index`` by every method of one experiment that has been trained.

    fs is the pre-trained segmentation network, mt the teacher; joint is the segmentation network alone, registration
    the mean of the N warped masks and combined the (weighted) mean of all 2N, each with the round that was best for
    it on the validation images; those of joint+ likewise. Test images choose nothing.

    Returns:
        Dictionary of method to (round, masks, training seconds).
    """
    settings, numerics = experiment.settings, experiment.numerics
    images = experiment.data.images[index]
    plain = lambda network: torch.cat([network.eval().segment(batch) for batch in images.split(numerics.batch(images))])
    found = {}
    network = experiment.segmentation_network()
    for method, stage in (("fs", "segmentation"), ("mt", "mean_teacher")):
        file = experiment.model_file(stage)
        if file.exists() and (method == "fs" or not settings.variant):
            network.load_state_dict(load_saved(file, numerics.device)["network"])
            with numerics.autocast():
                found[method] = 0, plain(network), load_cost(experiment, stage)
    for stage, ending in trained_families(experiment):
        seconds = load_cost(experiment, "segmentation", "registration", stage)
        chosen = best_rounds(load_measured(experiment, stage))
        masks = {}
        for number in sorted(set(chosen.values())):
            networks, kept = load_round(experiment, number, stage)
            if stage == "joint_plus":
                networks = refined(networks, settings.joint_plus)
            made = experiment.generate(networks, index, f"test, {stage} round {number}", "test", stage, number)
            masks[number] = fuse(made, kept.get("weight", 0.5))
        for method, field in (("registration", "registration"), ("joint", "plain"), ("combined", "soft")):
            found[method + ending] = chosen[method], getattr(masks[chosen[method]], field), seconds
    if has_cctr(experiment):
        from lib.cctr import load_cctr  # MONAI's networks take seconds to import

        networks = load_cctr(experiment)
        for method, learner in (("cctr", networks.first), ("cctr-b", networks.second)):
            with numerics.autocast():
                found[method] = 0, plain(learner), load_cost(experiment, "registration", "cctr")
    return found


def evaluate(experiment):
    """Every method of one experiment on the test images, and on those of the unseen anatomy where there are any.

    Args:
        experiment: lib.experiment.Experiment, all of whose stages have run.

    Returns:
        Evaluation.
    """
    cohort, data = experiment.cohort, experiment.data
    frames, bins, kept = [], [], {}
    parts = {split: cohort.index(split) for split in ("test", "unseen") if len(cohort.index(split))}
    predicted = predict(experiment, np.concatenate(list(parts.values())))
    for split, index in parts.items():
        for method, (number, masks, seconds) in predicted.items():
            masks = masks[: len(index)] if split == "test" else masks[-len(index) :]
            frame, reliable = describe(experiment, split, index, method, masks, data.masks[index])
            frames.append(frame.assign(round=number, seconds=round(seconds, 1)))
            bins.append(reliable)
            if split == "test":
                kept[method] = masks
    return Evaluation(pd.concat(frames, ignore_index=True), pd.concat(bins, ignore_index=True), kept)


def describe(experiment, split, index, method, masks, truth):
    """Scores, confidence and reliability of one method's masks of the images ``index``: (per image, bins)."""
    cohort, settings = experiment.cohort, experiment.settings
    head = {"cohort": title_of(cohort, split), "recipe": settings.recipe, "rate": settings.rate,
            "n_labelled": cohort.units(experiment.data.labelled.cpu()), "seed": settings.seed,
            "variant": settings.variant, "method": method}
    case = None
    if isinstance(cohort, VolumeCohort):
        scores = score_volumes(cohort, masks, index)
        case = torch.as_tensor(np.unique(cohort.volumes[index], return_inverse=True)[1], device=masks.device)
    else:
        scores = score(masks, truth, cohort.classes)
    position = scores.pop("image").to_numpy()
    confidence = mean_confidence(masks, case).cpu().numpy()[position]
    frame = scores.assign(**head, subject=cohort.subjects[index[position]], slice=index[position],
                          confidence=confidence, device=experiment.numerics.name)
    bins = reliability(masks, truth)
    return frame[[*head, "subject", "slice", *scores.columns, "confidence", "device"]], \
        bins.assign(**head)[[*head, *bins.columns]]


def evaluate_classical(experiment):
    """The classical reference on the test images, or an even sample of them; see lib.classical. As ``evaluate``.

    Masks of images that are not in the sample are empty; they have no rows.
    """
    from lib import classical  # SimpleITK is needed nowhere else

    cohort, data, settings = experiment.cohort, experiment.data, experiment.settings
    index = test = cohort.index("test")
    whole = getattr(cohort, "volumes", np.arange(len(cohort.images)))[index]  # volumes are scored whole
    names = whole[np.sort(np.unique(whole, return_index=True)[1])]
    count = max(1, round(settings.classical.images * len(names) / len(index)))
    names = names[np.unique(np.linspace(0, len(names) - 1, count).round().astype(int))]
    index = index[np.isin(whole, names)]
    choice = experiment.draw_sources(data.as_index(index), min(settings.pseudo_masks.n, len(data.labelled)),
                                     experiment.numerics.generator(settings.seed, "classical"))
    array = lambda tensor: tensor.cpu().numpy()
    start = time.monotonic()
    masks = classical.segment(array(data.images[index, 0]), array(data.images[data.labelled, 0]),
                              array(data.masks[data.labelled]), array(choice), settings.classical)
    seconds = time.monotonic() - start
    masks = torch.as_tensor(masks).to(data.masks.device)
    frame, bins = describe(experiment, "test", index, "classical", masks, data.masks[index])
    kept = masks.new_zeros(len(test), *masks.shape[1:])
    kept[np.isin(test, index)] = masks
    return Evaluation(frame.assign(recipe="-", round=0, seconds=round(seconds, 1)), bins.assign(recipe="-"),
                      {"classical": kept})


def rounds(experiment):
    """What was measured after every round of joint and joint+, one row per stage, round and split.

    Of CCT-R at every look at its networks: ``round`` is the step, stage ``cctr`` the U-Net and ``cctr-b`` the Swin
    transformer, and unlabelled images are those of ``cctr.watched_slices``. ``best_for`` names the methods that are
    tested with that round.
    """
    frames, settings = [], experiment.settings
    for stage, ending in trained_families(experiment):
        measured = load_measured(experiment, stage)
        best = best_rounds(measured)
        named = measured["round"].map(lambda n: " ".join(m + ending for m, chosen in best.items() if chosen == n))
        frames.append(measured.assign(stage="joint" + ending, best_for=named))
    if has_cctr(experiment):
        frames.append(cctr_rounds(experiment))
    if not frames:
        return pd.DataFrame()
    head = {"cohort": experiment.cohort.title, "recipe": settings.recipe, "rate": settings.rate,
            "seed": settings.seed, "variant": settings.variant}
    together = pd.concat(frames, ignore_index=True).assign(**head)
    first = [*head, "stage"]
    return together[[*first, *(c for c in together.columns if c not in (*first, "best_for")), "best_for"]]


def has_cctr(experiment):
    """Whether CCT-R has been trained, and is part of this run."""
    return experiment.model_file("cctr").exists() and experiment.settings.recipe in experiment.settings.cctr.recipes


def cctr_rounds(experiment):
    """``rounds`` of CCT-R: DSC of both networks on the validation images, and of their pseudo-labels."""
    from lib.cctr import watched_slices  # MONAI's networks take seconds to import

    watched = load_saved(experiment.model_file("cctr"), "cpu")["watched"]
    history = pd.read_csv(experiment.folder("cctr") / "history.csv")
    rows = []
    for number, (stage, column) in enumerate((("cctr", "validation"), ("cctr-b", "validation second"))):
        validation = history[column].dropna().tolist()
        best = max(range(len(validation)), key=lambda k: (validation[k], k))  # fit keeps the later of equals
        for k, (step, seen) in enumerate(watched):
            row = {"round": step, "stage": stage, "best_for": stage if k == best else ""}
            on = {"validation": (len(experiment.data.validation), validation[k]),
                  "unlabelled": (len(watched_slices(experiment)), float(seen["dsc"][number]))}
            rows += [{**row, "split": split, "n": n, "dsc_segmentation": dsc} for split, (n, dsc) in on.items()]
    return pd.DataFrame(rows)


def save_watched(file, watched, count=5):
    """Keep ``count`` of a Fit's watched masks, evenly spaced, as a small .npz: steps and masks."""
    chosen = [watched[round(k)] for k in np.linspace(0, len(watched) - 1, min(count, len(watched)))]
    np.savez_compressed(file, steps=np.array([step for step, _ in chosen]),
                        masks=np.stack([mask.numpy()[0] for _, mask in chosen]))
