"""The two networks of P1: a residual U-Net that segments and MrRegNet that registers."""

import torch
import torch.nn.functional as F
from torch import nn

from lib.warping import upsample_displacement

LEVELS = 5
MULTIPLE = 2 ** (LEVELS - 1)  # sides must divide by this


def pad_to_multiple(*tensors):
    """Each tensor, its bottom and right edge repeated until both sides divide by 16."""
    height, width = tensors[0].shape[-2:]
    padding = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    return [F.pad(t, padding, mode="replicate") if any(padding) else t for t in tensors]


def normalisation_layer(name, channels):
    """``none`` (the paper) or ``instance`` (InstanceNorm with learned gain and offset)."""
    if name == "none":
        return nn.Identity()
    if name == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    raise ValueError(f"normalisation '{name}' is not one of none, instance")


class ResidualBlock(nn.Module):
    """Convolution, then a second one whose output is added to that of the first."""

    def __init__(self, inputs, outputs, normalisation):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.first_norm = normalisation_layer(normalisation, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.second_norm = normalisation_layer(normalisation, outputs)

    def forward(self, x):
        x = F.relu(self.first_norm(self.first(x)), inplace=True)
        return F.relu(x + self.second_norm(self.second(x)), inplace=True)


class ResidualUNet(nn.Module):
    """Residual U-Net (P1, section 2.3): 5 levels, 16 root channels, about 1.9 million parameters.

    Args:
        classes: foreground classes; one output channel each.
        normalisation: ``none`` or ``instance``.
        root: channels of the finest level, doubled at every level below.
    """

    def __init__(self, classes=1, normalisation="none", root=16):
        super().__init__()
        channels = [root * 2**level for level in range(LEVELS)]
        self.down = nn.ModuleList(
            ResidualBlock(before, after, normalisation) for before, after in zip([1] + channels, channels)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in channels[:-1])
        self.merge = nn.ModuleList(ResidualBlock(2 * c, c, normalisation) for c in channels[:-1])
        self.head = nn.Conv2d(root, classes, 1)

    def features(self, image):
        """Features ``(batch, root, height, width)`` of images ``(batch, 1, height, width)`` of any size."""
        height, width = image.shape[-2:]
        (x,) = pad_to_multiple(image)
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for level in reversed(range(LEVELS - 1)):
            x = self.merge[level](torch.cat((skips[level], F.relu(self.up[level](x), inplace=True)), 1))
        return x[..., :height, :width]

    def forward(self, image):
        """Logits ``(batch, classes, height, width)`` of images ``(batch, 1, height, width)`` of any size."""
        return self.head(self.features(image)).float()

    def segment(self, image):
        """Probabilities ``(batch, classes, height, width)`` in [0, 1], float32."""
        return torch.sigmoid(self(image))


class ConcatenationBlock(nn.Module):
    """Two convolutions, their output concatenated with the input and fused by a 1x1 convolution."""

    def __init__(self, inputs, outputs, normalisation):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = normalisation_layer(normalisation, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.fuse = nn.Conv2d(inputs + outputs, outputs, 1)

    def forward(self, x):
        features = self.second(F.leaky_relu(self.norm(self.first(x)), 0.2, inplace=True))
        both = torch.cat((x.to(features.dtype), features), 1)  # images are float32 and would make all so
        return F.leaky_relu(self.fuse(both), 0.2, inplace=True)


class MrRegNet(nn.Module):
    """MrRegNet (P1, section 2.3 and its reference 12): displacement fields from coarse to fine.

    5 levels of 32 channels, about 0.31 million parameters. Level i adds a residual field to the field of the
    coarser level before it: D_i = 2 upsample(D_{i-1}) + R_i, in pixels of its own level.
    """

    def __init__(self, normalisation="none", channels=32):
        super().__init__()
        self.down = nn.ModuleList(
            ConcatenationBlock(channels if level else 2, channels, normalisation) for level in range(LEVELS)
        )
        self.shrink = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(LEVELS - 1))
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(channels, channels, 3, 2, 1, output_padding=1) for _ in range(LEVELS - 1)
        )
        self.up = nn.ModuleList(
            ConcatenationBlock(channels if level == LEVELS - 1 else 2 * channels, channels, normalisation)
            for level in range(LEVELS)
        )
        self.heads = nn.ModuleList(nn.Conv2d(channels, 2, 3, padding=1) for _ in range(LEVELS))
        for head in self.heads:  # training starts near the identity
            nn.init.normal_(head.weight, std=1e-3)
            nn.init.zeros_(head.bias)

    def forward(self, source, target):
        """Fields of all levels, for deep supervision.

        Args:
            source, target: ``(batch, 1, height, width)``, sides divisible by 16 (see pad_to_multiple).

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
                levels.append((upsample_displacement(levels[-1][0]) + residual, residual))
        return levels

    def register(self, source, target):
        """The full-resolution displacement ``(batch, 2, height, width)`` that warps source onto target."""
        height, width = target.shape[-2:]
        levels = self(*pad_to_multiple(source, target))
        return levels[-1][0][..., :height, :width]
