"""What the masks of held-out cases say: their scores, and which DSC a confidence leads to expect."""

from typing import NamedTuple

import numpy as np
import torch

from lib.augment import light, place
from lib.cohorts.reading import read_grid, turned, upright
from lib.metrics import dice
from lib.results.evaluation import score
from lib.runs.params import Section
from lib.scans.networks.applying import Confidence, masks_of, segment
from lib.scans.networks.memory import with_less_memory
from lib.scans.reading.drawing import drawn_part
from lib.scans.reading.folder import read_case
from lib.scans.reading.store import images_of

DEGRADED = "rotation", "scaling", "shift", "gamma", "contrast", "brightness", "blur", "noise"


def measure(model, case, stores, positions, settings, numerics):
    """What a held-out case says of a model.

    Args:
        model: Model, not trained on the case.
        case: folder.Case with a mask.
        stores: store.Store of every network of the model.
        positions: of the case's images that are segmented, one array for every store.
        settings, numerics: as params.load gives them, and compute.Numerics of the device.

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
