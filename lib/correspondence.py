"""Correspondence of the labelled volumes and the unlabelled ones by registration, found once before CCT-R (P2)."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.alignment import align, mean_of, region
from lib.evaluation import dice_of_groups
from lib.experiment import load_pretrained_registration, resume, save_atomically
from lib.losses import weighted_gncc
from lib.params import fingerprint, work_folder
from lib.refinement import Refined
from lib.training import sums_of, weights_digest
from lib.versions import CCTR
from lib.warping import compose, folding, pixel_grid, warp


class Correspondence(NamedTuple):
    """What every unlabelled image corresponds to: in the best registered labelled volume, and in all of them."""

    sources: torch.Tensor  # (n,) position among the labelled images of that in the best volume
    fields: torch.Tensor  # (n, 2, height, width) its displacement
    partners: torch.Tensor  # (n, volumes) position among the labelled images of that in every volume
    places: torch.Tensor  # (n, volumes, 2, h, w) where in it every feature of the image lies, in pixels

    def masks(self, masks):
        """Masks of the best labelled images, warped onto the unlabelled ones."""
        return warp(masks[self.sources], self.fields)


def volume_numbers(experiment, index):
    """``(n,)`` number, from 0, of the volume that each of the images ``index`` is of; its own where there are none."""
    volumes = getattr(experiment.cohort, "volumes", np.arange(len(experiment.cohort.images)))
    return experiment.data.as_index(np.unique(volumes[index.cpu()], return_inverse=True)[1])


@torch.no_grad()
def register_labelled(experiment, network):
    """Every labelled volume registered to every unlabelled one; the best is the most similar after registration.

    Volumes are first aligned (where section ``cctr`` says so), then slices are registered one by one, each to the slice
    of the labelled volume that lies nearest along the axis. The similarity of two volumes is the mean over the slices
    of the GNCC around the labels. Where images are not from volumes each stands alone.

    Args:
        experiment: Experiment. Section ``cctr`` of its settings gives the stride of the features.
        network: MrRegNet, or refinement.Refined.

    Returns:
        Correspondence.
    """
    network.eval()
    data, numerics, options = experiment.data, experiment.numerics, experiment.settings.cctr
    matches = experiment.matches(data.unlabelled)
    if matches is None:
        matches = torch.arange(len(data.labelled), device=data.labelled.device).expand(len(data.unlabelled), -1)
    members = volume_numbers(experiment, data.unlabelled)
    images, targets = data.images[data.labelled], data.images[data.unlabelled]
    regions = region(data.masks[data.labelled], volume_numbers(experiment, data.labelled))
    size, grid = numerics.batch(data.images), pixel_grid(*targets.shape[-2:], targets.device)
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
        found, mean = torch.cat(parts), mean_of(torch.cat(similar), members)[members]
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

    The file under work/checkpoints is named by a fingerprint of what the fields depend on and holds a checksum of
    them; one that does not fit is made anew.
    """
    settings, data = experiment.settings, experiment.data
    network = load_pretrained_registration(experiment)
    if settings.cctr.refine:
        network = Refined(network, settings.joint_plus.refinement)
    key = fingerprint(experiment.origin, CCTR, "registered", weights_digest(network), data.labelled.tolist(),
                      settings.cctr.stride, settings.cctr.align, settings.cctr.refine and settings.joint_plus.refinement)
    file = work_folder("checkpoints", f"{key}.pt")
    saved = resume(file, key, data.images.device)
    if saved and saved["checksums"] == sums_of(*saved["registered"]):
        return Correspondence(*saved["registered"])
    found = register_labelled(experiment, network)
    save_atomically({"fingerprint": key, "registered": list(found), "checksums": sums_of(*found)}, file)
    return found


def registration_scores(experiment, correspondence):
    """How good the labels of the best registered volume are on the unlabelled ones, before and after registration.

    The true masks of unlabelled images are used for these figures alone.

    Returns:
        pandas.DataFrame, rows ``before registration`` and ``warped labels``: mean DSC over the unlabelled volumes per
        class and of all classes (mean), GNCC around the labels (gncc), share of pixels with a non-positive Jacobian
        determinant (folding), and how many volumes and slices they are of.
    """
    data, members = experiment.data, volume_numbers(experiment, experiment.data.unlabelled)
    sources, targets = data.labelled[correspondence.sources], data.images[data.unlabelled]
    regions = region(data.masks[data.labelled], volume_numbers(experiment, data.labelled))[correspondence.sources]
    unmoved = torch.zeros_like(correspondence.fields)
    rows = {}
    for name, fields in (("before registration", unmoved), ("warped labels", correspondence.fields)):
        scores = dice_of_groups(warp(data.masks[sources], fields), data.masks[data.unlabelled], members).mean(0)
        similar = weighted_gncc(warp(data.images[sources], fields), targets, warp(regions, fields))
        rows[name] = {**dict(zip(experiment.cohort.classes, scores.tolist())), "mean": float(scores.mean()),
                      "gncc": float(similar.mean()), "folding": float(folding(fields).mean()),
                      "volumes": int(members.max()) + 1, "slices": len(targets)}
    return pd.DataFrame(rows.values(), index=list(rows))
