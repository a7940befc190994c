"""`python benchmarks/monai_unet.py`: what `python -m lib.scans` does, with MONAI's 3D U-Net in place of ours.

Augmentation, loss, optimiser, averaged weights and steps stay the same. Channels, strides and residual units are those
of MONAI's tutorial on the spleen; normalisation is by instance, MONAI's default and ours.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from monai.networks.nets import UNet
from torch import nn

from lib.methods import experiment
from lib.models import crop_to, pad_to_multiple
from lib.scans import __main__ as scans
from lib.scans.networks import model_file

CHANNELS = 16, 32, 64, 128, 256
STRIDES = [(2, 2, 2)] * 4


class MonaiUNet(nn.Module):
    """MONAI's U-Net, called as lib.models.ResidualUNet is; normalisation, root and strides change nothing."""

    def __init__(self, classes=1, normalisation="instance", root=16, strides=STRIDES, inputs=1):
        super().__init__()
        self.strides = STRIDES
        self.network = UNet(3, inputs, classes, CHANNELS, [2] * len(STRIDES), num_res_units=2)

    def forward(self, image):
        """Logits ``(batch, classes, *space)`` of volumes ``(batch, inputs, *space)`` of any size."""
        (padded,) = pad_to_multiple(self.strides, image)
        return crop_to(self.network(padded), image.shape[2:]).float()

    def segment(self, image):
        """Probabilities ``(batch, classes, *space)`` in [0, 1], float32."""
        return torch.sigmoid(self(image))


def take_the_place_of_ours():
    """From now on all networks that segment are MonaiUNet, where they are trained and where they are read."""
    experiment.ResidualUNet = model_file.ResidualUNet = MonaiUNet


if __name__ == "__main__":
    take_the_place_of_ours()
    scans.main()
