"""Correspondence of the labelled volumes and the unlabelled ones by registration, found once before CCT-R (P2)."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.losses import weighted_gncc
from lib.methods.cctr.alignment import align, mean_of, region
from lib.methods.experiment import load_pretrained_registration
from lib.metrics import dice_of_groups
from lib.refinement import Refined
from lib.runs.versions import CCTR, fingerprint
from lib.training import sums_of, weights_digest
from lib.warping import compose, folding, interpolate, pixel_grid, warp


class Correspondence(NamedTuple):
    """What every unlabelled image corresponds to: in the chosen labelled volume, and in all of them."""

    sources: torch.Tensor  # (n,) its slice in the chosen volume (cctr.selection): position among the labelled images
    fields: torch.Tensor  # (n, 2, height, width) displacement from that slice
    partners: torch.Tensor  # (n, volumes) its slice in every volume: position among the labelled images
    places: torch.Tensor  # (n, volumes, 2, h, w) where every feature of the image lies in those slices, in pixels

    def masks(self, masks):
        """Masks of the chosen labelled images, warped onto the unlabelled ones."""
        return warp(masks[self.sources], self.fields)


def volume_numbers(experiment, index):
    """``(n,)`` number of the volume of each of the images ``index``, from 0; one each if they are not from volumes."""
    volumes = getattr(experiment.cohort, "volumes", np.arange(len(experiment.cohort.images)))
    return experiment.data.as_index(np.unique(volumes[index.cpu()], return_inverse=True)[1])


@torch.no_grad()
def register_labelled(experiment, network):
    """Every labelled volume registered to every unlabelled one, and one chosen: the most similar after registration.

    Volumes are first aligned (where section ``cctr`` says so), then slices are registered one by one, each to the slice
    of the labelled volume that lies nearest along the axis. The similarity of two volumes is the mean over the slices
    of the GNCC around the labels. Images that are not from volumes count as volumes of one slice.

    Args:
        experiment: Experiment. Section ``cctr`` of its settings gives the stride of the features and ``selection``,
            by which a random volume may be chosen instead.
        network: MrRegNet, or refinement.Refined.

    Returns:
        Correspondence.

    Raises:
        ValueError: ``cctr.selection`` is neither ``best`` nor ``random``.
    """
    network.eval()
    data, numerics, options = experiment.data, experiment.numerics, experiment.settings.cctr
    if options.selection not in ("best", "random"):
        raise ValueError(f"cctr.selection '{options.selection}' in params.yaml is not one of best, random")
    matches = experiment.matches(data.unlabelled)
    if matches is None:
        matches = torch.arange(len(data.labelled), device=data.labelled.device).expand(len(data.unlabelled), -1)
    members = volume_numbers(experiment, data.unlabelled)
    images, targets = data.images[data.labelled], data.images[data.unlabelled]
    regions = region(data.masks[data.labelled], volume_numbers(experiment, data.labelled))
    size, grid = numerics.batch(data.images), pixel_grid(targets.shape[2:], targets.device)
    generator = numerics.generator(experiment.settings.seed, "cctr", "selection")
    best, chosen, fields, places = None, None, None, []
    for candidate in tqdm(matches.T, desc="registering labelled images", unit="volume"):
        start = torch.zeros_like(targets).expand(-1, 2, -1, -1)
        if options.align:
            start = align(images[candidate], targets, regions[candidate], members)
        parts, similar = [], []
        for sources, target, first in zip(candidate.split(size), targets.split(size), start.split(size)):
            source, weight = images[sources], regions[sources]
            with numerics.autocast():
                second = network.register(warp(source, first), target)
            parts.append(compose(first, second.float()))
            similar.append(weighted_gncc(warp(source, parts[-1]), target, warp(weight, parts[-1])))
        found, score = torch.cat(parts), mean_of(torch.cat(similar), members)
        if options.selection == "random":
            score = torch.rand(score.shape, generator=generator, device=score.device)
        mean = score[members]
        places.append(F.avg_pool2d(grid + found, options.stride))
        if best is None:
            best, chosen, fields = mean, candidate.clone(), found
            continue
        better = mean > best
        best, chosen = torch.where(better, mean, best), torch.where(better, candidate, chosen)
        fields = torch.where(better[:, None, None, None], found, fields)
    return Correspondence(chosen, fields, matches, torch.stack(places, dim=1))


def stored_registration(experiment):
    """``register_labelled`` by the pre-trained network, computed once for all variants of CCT-R.

    The file under work/checkpoints is named by a fingerprint of what the fields depend on, and holds a checksum of
    them. If it does not fit, it is made anew.
    """
    settings, data = experiment.settings, experiment.data
    network = load_pretrained_registration(experiment)
    if settings.cctr.refine:
        network = Refined(network, settings.refinement)
    key = fingerprint(
        experiment.origin,
        CCTR,
        "registered",
        weights_digest(network),
        data.labelled.tolist(),
        [settings.cctr[name] for name in ("stride", "selection", "align")],
        settings.cctr.refine and settings.refinement,
    )
    checkpoint = experiment.cabinet.checkpoint(key)
    saved = checkpoint.load()
    if saved and saved["checksums"] == sums_of(*saved["registered"]):
        return Correspondence(*saved["registered"])
    found = register_labelled(experiment, network)
    checkpoint.save({"registered": list(found), "checksums": sums_of(*found)})
    return found


def registration_scores(experiment, correspondence):
    """How good the labels of the chosen registered volume are on the unlabelled ones, before and after registration.

    The true masks of unlabelled images are used for these figures alone.

    Returns:
        pandas.DataFrame, rows ``before registration`` and ``warped labels``: mean DSC over the unlabelled volumes per
        class and of all classes (mean), GNCC around the labels (gncc), share of pixels with a non-positive Jacobian
        determinant (folding), and the numbers of volumes and slices. Two rows say what the choice is worth:
        ``any volume``, the mean over all labelled volumes, and ``best by true masks``, the best choice there is. They
        have DSC alone, from fields at the resolution of features. ``no counterpart``: of the slices with a class, the
        share whose chosen labelled slice has none of it.
    """
    data, members = experiment.data, volume_numbers(experiment, experiment.data.unlabelled)
    targets, truth = data.images[data.unlabelled], data.masks[data.unlabelled]
    sources = data.labelled[correspondence.sources]
    regions = region(data.masks[data.labelled], volume_numbers(experiment, data.labelled))[correspondence.sources]
    count = {"volumes": int(members.max()) + 1, "slices": len(targets)}
    unmoved = torch.zeros_like(correspondence.fields)
    rows = {}

    def add(name, scores, **others):
        by_class = dict(zip(experiment.cohort.classes, scores.tolist()))
        rows[name] = {**by_class, "mean": float(scores.mean()), **others, **count}

    for name, fields in (("before registration", unmoved), ("warped labels", correspondence.fields)):
        similar = weighted_gncc(warp(data.images[sources], fields), targets, warp(regions, fields))
        add(
            name,
            dice_of_groups(warp(data.masks[sources], fields), truth, members).mean(0),
            gncc=float(similar.mean()),
            folding=float(folding(fields).mean()),
        )
    of_volumes = torch.stack(
        [
            dice_of_groups(warp(data.masks[data.labelled[partner]], fields), truth, members)
            for partner, fields in zip(
                correspondence.partners.T, coarse_fields(correspondence.places, targets.shape[-2:])
            )
        ]
    )
    add("any volume", of_volumes.mean(dim=(0, 1)))
    best = of_volumes.mean(dim=2).argmax(dim=0)
    add("best by true masks", of_volumes[best, torch.arange(len(best), device=best.device)].mean(0))
    shown, there = (masks.flatten(2).amax(2) > 0.5 for masks in (truth, data.masks[sources]))
    add("no counterpart", (shown & ~there).sum(0) / shown.sum(0).clamp(min=1))
    return pd.DataFrame(rows.values(), index=list(rows))


def coarse_fields(places, shape):
    """Displacement fields ``(n, 2, height, width)`` to every volume, interpolated from the ``places`` of features."""
    grid = pixel_grid(shape, places.device)
    features = F.adaptive_avg_pool2d(grid, places.shape[-2:])
    for there in places.unbind(1):
        yield interpolate(there - features, shape)
