"""Instance-specific refinement: a displacement field is improved further for its own pair of images.

The network gives a field in one pass. A few steps of gradient descent on the field itself then align what the network
has not (as Balakrishnan et al., VoxelMorph, IEEE TMI 2019, section V-D). No mask is used.
"""

import torch
from torch import nn

from lib.losses import gncc, smoothness_loss
from lib.warping import interpolate, warp


def refine(field, source, target, options):
    """The field, changed so that the warped source looks more like the target.

    1 - GNCC plus the smoothness of the whole field is minimised by Adam: first on a coarse grid of control points,
    which follows larger motion, then pixel by pixel.

    Args:
        field: ``(batch, axes, *space)`` in pixels.
        source, target: ``(batch, 1, *space)``.
        options: control_points along the longest side, steps and rates (of the image's side, per step) on the coarse
            and on the fine grid, smoothness.

    Returns:
        A field as ``field``, float32. Each pair is refined by itself, whatever else is in the batch.
    """
    field = field.detach().float()
    space, axes = field.shape[2:], field.shape[1]
    side = max(space)
    coarse = [max(2, round(options.control_points * length / side)) for length in space]
    for shape, steps, rate in zip((coarse, space), options.steps, options.rates):
        change = torch.zeros(len(field), axes, *shape, device=field.device, requires_grad=True)
        optimiser = torch.optim.AdamW([change], rate * side, weight_decay=0, foreach=False)
        moved = lambda: field + interpolate(change, space)
        for _ in range(steps):
            with torch.enable_grad():
                whole = moved()
                similarity = gncc(warp(source, whole), target).mean()
                # The sum over pairs: the gradient of a pair does not depend on how many others are in the batch.
                loss = len(field) * (options.smoothness * smoothness_loss(whole) - similarity)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        field = moved().detach()
    return field


class Refined(nn.Module):
    """A registration network whose fields are refined, wherever a MrRegNet can stand."""

    def __init__(self, network, options):
        super().__init__()
        self.network = network
        self.options = options

    def register(self, source, target):
        """As MrRegNet.register, then ``refine``."""
        return refine(self.network.register(source, target), source, target, self.options)
