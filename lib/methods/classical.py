"""The classical reference: labelled images registered to every test image by SimpleITK, masks warped and averaged.

What a user would do without training anything: affine registration, then diffeomorphic Demons.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import SimpleITK as sitk
import torch
from tqdm import tqdm

from lib.methods.experiment import Prediction


def affine(source, target, iterations):
    """The affine map of target points to source points that maximises correlation, coarse to fine."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, iterations)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    start = sitk.CenteredTransformInitializer(
        target, source, sitk.AffineTransform(2), sitk.CenteredTransformInitializerFilter.GEOMETRY
    )
    method.SetInitialTransform(start, inPlace=False)
    return method.Execute(target, source)


def demons(source, target, iterations, smoothing):
    """The displacement, by diffeomorphic Demons, of a source that is already aligned by an affine map."""
    matched = sitk.HistogramMatching(source, target, numberOfHistogramLevels=64, numberOfMatchPoints=7)
    found = sitk.DiffeomorphicDemonsRegistrationFilter()
    found.SetNumberOfIterations(iterations)
    found.SetStandardDeviations(smoothing)
    return sitk.DisplacementFieldTransform(sitk.Cast(found.Execute(target, matched), sitk.sitkVectorFloat64))


def register(source, target, settings):
    """The transform that takes points of the target to points of the source.

    Args:
        source, target: ``(height, width)`` arrays in [0, 1].
        settings: section ``classical`` of params.yaml.

    Returns:
        SimpleITK transform, affine followed by Demons; the affine one alone where Demons is switched off.
    """
    source, target = (sitk.GetImageFromArray(np.asarray(image, np.float32)) for image in (source, target))
    first = affine(source, target, settings.affine_iterations)
    if settings.demons_iterations == 0:
        return first
    aligned = sitk.Resample(source, target, first, sitk.sitkLinear)
    second = demons(aligned, target, settings.demons_iterations, settings.demons_smoothing)
    return sitk.CompositeTransform([first, second])  # the last one is applied first


def warp_masks(masks, transform):
    """Masks ``(classes, height, width)`` on the target's grid, bilinear, 0 outside."""
    images = [sitk.GetImageFromArray(np.asarray(mask, np.float32)) for mask in masks]
    return np.stack([sitk.GetArrayFromImage(sitk.Resample(image, transform, sitk.sitkLinear)) for image in images])


def segment(images, sources, source_masks, choice, settings):
    """The mean of the warped masks of every image.

    Args:
        images: targets ``(n, height, width)``.
        sources, source_masks: labelled images ``(m, height, width)`` and masks ``(m, classes, height, width)``.
        choice: ``(n, k)`` indices of the sources of each target.
        settings: section ``classical`` of params.yaml.

    Returns:
        ``(n, classes, height, width)`` float32 in [0, 1].
    """

    def one(image, chosen):
        warped = [warp_masks(source_masks[k], register(sources[k], image, settings)) for k in chosen]
        return np.mean(warped, axis=0)

    # Slices are so small that ITK's own threads cost more than they bring: one each, and several images at a time.
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0] or os.cpu_count() or 1
        with ThreadPoolExecutor(int(threads)) as pool:
            found = pool.map(one, images, choice)
            return np.stack(list(tqdm(found, total=len(images), desc="classical registration", unit="image")))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def predict(experiment, index):
    """Masks of ``classical``. See methods.table."""
    data, settings = experiment.data, experiment.settings
    choice = experiment.draw_sources(
        data.as_index(index),
        min(settings.pseudo_masks.n, len(data.labelled)),
        experiment.numerics.generator(settings.seed, "classical"),
    )
    array = lambda tensor: tensor.cpu().numpy()
    masks = segment(
        array(data.images[index, 0]),
        array(data.images[data.labelled, 0]),
        array(data.masks[data.labelled]),
        array(choice),
        settings.classical,
    )
    return {"classical": Prediction(0, torch.as_tensor(masks).to(data.masks.device))}
