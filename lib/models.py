"""The two networks of P1: a residual U-Net that segments and MrRegNet that registers."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.warping import upsample_displacement

LEVELS = 5
LEAST = 4  # pixels that are left of a side at the coarsest level (nnU-Net's)
ROOT = 16  # channels of the finest level of the U-Net (P1, section 2.3)
CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}  # by the number of axes, as all that follows
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLING = {2: F.max_pool2d, 3: F.max_pool3d}
INSTANCE = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def strides_of(spacing, space=None):
    """By how much every axis shrinks from level to level, as nnU-Net plans it: LEVELS - 1 tuples of 1 and 2.

    An axis whose voxels are twice as long as the shortest waits until the others have caught up, and one that is too
    short to be halved stays as it is.

    Args:
        spacing: of the voxels along every axis, in any unit.
        space: sides of the images; None for as large as need be.
    """
    spacing, sides = list(spacing), list(space or [LEAST * 2 ** (LEVELS - 1)] * len(spacing))
    strides = []
    for _ in range(LEVELS - 1):
        able = [side >= 2 * LEAST for side in sides]
        shortest = min([length for length, can in zip(spacing, able) if can], default=1)
        halved = [can and length < 2 * shortest for length, can in zip(spacing, able)]
        strides.append(tuple(1 + half for half in halved))
        spacing = [length * (1 + half) for length, half in zip(spacing, halved)]
        sides = [-(-side // (1 + half)) for side, half in zip(sides, halved)]
    return strides


HALVED = strides_of((1, 1))  # of images with two axes and square pixels


def pad_to_multiple(strides, *tensors):
    """Each tensor, its far edges repeated until every side can be divided by what the strides make of it."""
    space = tensors[0].shape[2:]
    multiples = [math.prod(along) for along in zip(*strides)]
    padding = [part for side, of in zip(space[::-1], multiples[::-1]) for part in (0, -side % of)]
    return [F.pad(t, padding, mode="replicate") if any(padding) else t for t in tensors]


def crop_to(tensor, space):
    """The beginning of every axis of ``(batch, channels, *any)``, as long as ``space``: undoes pad_to_multiple."""
    return tensor[(..., *(slice(side) for side in space))]


def normalisation_layer(name, channels, axes):
    """``none`` (the paper) or ``instance`` (InstanceNorm with learned gain and offset)."""
    if name == "none":
        return nn.Identity()
    if name == "instance":
        return INSTANCE[axes](channels, affine=True)
    raise ValueError(f"normalisation '{name}' is not one of none, instance")


class ResidualBlock(nn.Module):
    """Convolution, then a second one whose output is added to that of the first."""

    def __init__(self, inputs, outputs, normalisation, axes):
        super().__init__()
        convolution = CONVOLUTION[axes]
        self.first = convolution(inputs, outputs, 3, padding=1)
        self.first_norm = normalisation_layer(normalisation, outputs, axes)
        self.second = convolution(outputs, outputs, 3, padding=1)
        self.second_norm = normalisation_layer(normalisation, outputs, axes)

    def forward(self, x):
        x = F.relu(self.first_norm(self.first(x)), inplace=True)
        return F.relu(x + self.second_norm(self.second(x)), inplace=True)


class ResidualUNet(nn.Module):
    """Residual U-Net (P1, section 2.3): 5 levels, 16 root channels, in 2D about 1.9 million parameters.

    Args:
        classes: foreground classes; one output channel each.
        normalisation: ``none`` or ``instance``.
        root: channels of the finest level, doubled at every level below.
        strides: see ``strides_of``; their length says whether images have two axes or three.
        inputs: channels of an image.
    """

    def __init__(self, classes=1, normalisation="none", root=ROOT, strides=HALVED, inputs=1):
        super().__init__()
        self.strides = strides
        axes = len(strides[0])
        channels = [root * 2**level for level in range(LEVELS)]
        self.down = nn.ModuleList(
            ResidualBlock(before, after, normalisation, axes) for before, after in zip([inputs] + channels, channels)
        )
        self.up = nn.ModuleList(
            TRANSPOSED[axes](2 * c, c, stride, stride=stride) for c, stride in zip(channels[:-1], strides)
        )
        self.merge = nn.ModuleList(ResidualBlock(2 * c, c, normalisation, axes) for c in channels[:-1])
        self.head = CONVOLUTION[axes](root, classes, 1)

    def features(self, image):
        """Features ``(batch, root, *space)`` of images ``(batch, inputs, *space)`` of any size."""
        space = image.shape[2:]
        (x,) = pad_to_multiple(self.strides, image)
        skips = []
        for level, block in enumerate(self.down):
            x = block(POOLING[len(space)](x, self.strides[level - 1]) if level else x)
            skips.append(x)
        for level in reversed(range(LEVELS - 1)):
            x = self.merge[level](torch.cat((skips[level], F.relu(self.up[level](x), inplace=True)), 1))
        return crop_to(x, space)

    def forward(self, image):
        """Logits ``(batch, classes, *space)`` of images ``(batch, inputs, *space)`` of any size."""
        return self.head(self.features(image)).float()

    def segment(self, image):
        """Probabilities ``(batch, classes, *space)`` in [0, 1], float32."""
        return torch.sigmoid(self(image))


class ConcatenationBlock(nn.Module):
    """Two convolutions, their output concatenated with the input and fused by a 1x1 convolution."""

    def __init__(self, inputs, outputs, normalisation, axes):
        super().__init__()
        convolution = CONVOLUTION[axes]
        self.first = convolution(inputs, outputs, 3, padding=1)
        self.norm = normalisation_layer(normalisation, outputs, axes)
        self.second = convolution(outputs, outputs, 3, padding=1)
        self.fuse = convolution(inputs + outputs, outputs, 1)

    def forward(self, x):
        features = self.second(F.leaky_relu(self.norm(self.first(x)), 0.2, inplace=True))
        both = torch.cat((x.to(features.dtype), features), 1)  # images are float32 and would make all so
        return F.leaky_relu(self.fuse(both), 0.2, inplace=True)


class MrRegNet(nn.Module):
    """MrRegNet (P1, section 2.3 and its reference 12): displacement fields from coarse to fine.

    5 levels of 32 channels, in 2D about 0.31 million parameters. Level i adds a residual field to the field of the
    coarser level before it: D_i = 2 upsample(D_{i-1}) + R_i, in pixels of its own level.

    Args:
        normalisation: ``none`` or ``instance``.
        channels: of every level.
        strides: see ``strides_of``; along an axis that is not halved, displacements are not doubled.
    """

    def __init__(self, normalisation="none", channels=32, strides=HALVED):
        super().__init__()
        self.strides = strides
        axes = len(strides[0])
        convolution = CONVOLUTION[axes]
        self.down = nn.ModuleList(
            ConcatenationBlock(channels if level else 2, channels, normalisation, axes) for level in range(LEVELS)
        )
        self.shrink = nn.ModuleList(convolution(channels, channels, 3, stride, 1) for stride in strides)
        self.grow = nn.ModuleList(
            TRANSPOSED[axes](channels, channels, 3, stride, 1, output_padding=tuple(step - 1 for step in stride))
            for stride in strides
        )
        self.up = nn.ModuleList(
            ConcatenationBlock(channels if level == LEVELS - 1 else 2 * channels, channels, normalisation, axes)
            for level in range(LEVELS)
        )
        self.heads = nn.ModuleList(convolution(channels, axes, 3, padding=1) for _ in range(LEVELS))
        for head in self.heads:  # training starts near the identity
            nn.init.normal_(head.weight, std=1e-3)
            nn.init.zeros_(head.bias)

    def forward(self, source, target):
        """Fields of all levels, for deep supervision.

        Args:
            source, target: ``(batch, 1, *space)``, sides as pad_to_multiple makes them.

        Returns:
            List of (displacement D_i, residual R_i), coarsest first, float32, in pixels of each level.
        """
        x = torch.cat((source, target), 1)
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.shrink[level - 1](x) if level else x)
            skips.append(x)
        levels = []
        for level in reversed(range(LEVELS)):
            if level == LEVELS - 1:
                x = self.up[level](x)
                residual = self.heads[level](x).float()
                levels.append((residual, residual))
            else:
                x = self.up[level](torch.cat((skips[level], self.grow[level](x)), 1))
                residual = self.heads[level](x).float()
                levels.append((upsample_displacement(levels[-1][0], self.strides[level]) + residual, residual))
        return levels

    def register(self, source, target):
        """The full-resolution displacement ``(batch, axes, *space)`` that warps source onto target."""
        levels = self(*pad_to_multiple(self.strides, source, target))
        return crop_to(levels[-1][0], target.shape[2:])
