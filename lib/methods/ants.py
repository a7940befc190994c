"""ANTs SyN, the multi-atlas reference of the field: labelled images registered to every test image, masks fused.

Registration is affine, then SyN (Avants et al., MedIA 2008), both with the defaults of antspyx. Masks are fused by
majority vote, and by joint label fusion (Wang et al., TPAMI 2013). Needs antspyx, which the project does without:
`pip install -r benchmarks/requirements.txt`. Images are slices or volumes.
"""

import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib import DataError
from lib.methods.experiment import Prediction


def load_ants():
    """The package, on one thread unless the environment says otherwise: slices are too small for more.

    Raises:
        DataError: it is not installed.
    """
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    try:
        import ants
    except ImportError as error:
        raise DataError("method ants needs antspyx: `pip install -r benchmarks/requirements.txt`") from error
    return ants


def warp_onto(target, atlases):
    """Atlases registered to one image.

    Args:
        target: ANTs image.
        atlases: pairs of ANTs images, image and labels.

    Returns:
        Pairs of ANTs images on the target's grid, warped image and warped labels.
    """
    ants, moved = load_ants(), []
    for image, labels in atlases:
        found = ants.registration(target, image, type_of_transform="SyN", random_seed=1)
        carry = lambda what, how: ants.apply_transforms(target, what, found["fwdtransforms"], interpolator=how)
        moved.append((carry(image, "linear"), carry(labels, "nearestNeighbor")))
        for file in {*found["fwdtransforms"], *found["invtransforms"]}:  # which it leaves in /tmp
            Path(file).unlink(missing_ok=True)
    return moved


def majority(target, moved, classes):
    """The label that most of the warped masks give to every pixel: an array of the target's shape.

    Args:
        target: ANTs image.
        moved: of ``warp_onto``.
        classes: how many there are; labels are 0, background, to ``classes``.
    """
    labels = np.stack([mask.numpy() for _, mask in moved])
    return np.argmax([(labels == value).sum(axis=0) for value in range(classes + 1)], axis=0)


def joint_fusion(target, moved, classes):
    """Joint label fusion within two pixels of what any warped mask marks, background elsewhere; see ``majority``."""
    ants = load_ants()
    marked = ants.threshold_image(sum(mask for _, mask in moved), 0.5, 1e9)
    if not marked.numpy().any():
        return np.zeros(target.shape, int)
    near = ants.iMath(marked, "MD", 2)
    images, labels = ([pair[k].clone() for pair in moved] for k in (0, 1))
    # Zeros are no votes to ANTs: background needs a label of its own, one above the others.
    fused = ants.joint_label_fusion(target, near, images, label_list=labels, max_lab_plus_one=True)["segmentation"]
    found = fused.numpy().round().astype(int)
    return np.where(found > classes, 0, found)


FUSIONS = {"ants": majority, "ants-jlf": joint_fusion}


def predict(experiment, index):
    """Masks of ``ants`` and, where there are several labelled images, ``ants-jlf``. See methods.table."""
    ants, data, settings = load_ants(), experiment.data, experiment.settings
    count, classes = min(settings.pseudo_masks.n, len(data.labelled)), data.masks.shape[1]
    generator = experiment.numerics.generator(settings.seed, "classical")
    choice = experiment.draw_sources(data.as_index(index), count, generator).tolist()
    image = lambda pixels: ants.from_numpy(np.ascontiguousarray(np.asarray(pixels.cpu(), np.float32)))
    values = torch.arange(1, classes + 1, device=data.masks.device).reshape(-1, *[1] * (data.masks.ndim - 2))
    atlases = [(image(data.images[k, 0]), image((data.masks[k] * values).amax(0))) for k in data.labelled]
    methods = list(FUSIONS)[: 1 if count == 1 else None]  # of one mask there is nothing to fuse
    found = {method: [] for method in methods}
    for number, chosen in tqdm(list(zip(index, choice)), desc="ants", unit="image"):
        target = image(data.images[number, 0])
        moved = warp_onto(target, [atlases[k] for k in chosen])
        for method in methods:
            found[method].append(FUSIONS[method](target, moved, classes))
    hard = lambda labels: torch.as_tensor(np.stack(labels)).to(values.device)[:, None] == values
    return {method: Prediction(0, hard(labels).float()) for method, labels in found.items()}
