"""The learners of CCT-R (P2): networks that segment and describe every pixel."""

import torch.nn.functional as F
from monai.networks.nets import SwinUNETR
from torch import nn

SWIN_MULTIPLE = 32  # sides must divide by this


class SwinUNet(nn.Module):
    """MONAI's SwinUNETR in 2D as a network of features; not pre-trained, since there are no weights for it.

    Args:
        width: channels of the finest level, a multiple of 12.
    """

    def __init__(self, width):
        super().__init__()
        self.network = SwinUNETR(in_channels=1, out_channels=1, feature_size=width, spatial_dims=2)
        self.network.out = nn.Identity()

    def features(self, image):
        """Features ``(batch, width, height, width)`` of images ``(batch, 1, height, width)`` of any size."""
        height, width = image.shape[-2:]
        more = lambda side: max(2, -(-side // SWIN_MULTIPLE)) * SWIN_MULTIPLE - side  # normalisation needs two pixels
        padding = (0, more(width), 0, more(height))
        return self.network(F.pad(image, padding, mode="replicate"))[..., :height, :width]


class Learner(nn.Module):
    """A network that segments and describes every pixel.

    Args:
        body: has ``features``.
        channels: of those.
        classes: foreground classes.
        dimension: of the space that features are projected to.
        stride: pixels per projected feature.
    """

    def __init__(self, body, channels, classes, dimension, stride):
        super().__init__()
        self.body = body
        self.head = nn.Conv2d(channels, classes + 1, 1)
        self.project = nn.Conv2d(channels, dimension, 1)
        self.stride = stride

    def forward(self, images):
        """Logits ``(batch, 1 + classes, height, width)``, background first, and features of unit length
        ``(batch, dimension, height / stride, width / stride)``, both float32."""
        features = self.body.features(images)
        projected = self.project(F.avg_pool2d(features, self.stride)).float()
        return self.head(features).float(), F.normalize(projected, dim=1)

    def segment(self, images):
        """Probabilities of the foreground classes ``(batch, classes, height, width)``, float32."""
        return self.head(self.body.features(images)).float().softmax(dim=1)[:, 1:]
