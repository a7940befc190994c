"""Semi-supervised medical image segmentation by joint segmentation and registration.

Shapes used throughout, unless a docstring says otherwise:

- images: ``(batch, 1, height, width)`` float32 in [0, 1];
- masks: ``(batch, classes, height, width)`` in [0, 1], one channel per foreground class;
- displacement fields: ``(batch, 2, height, width)`` float32 in pixels, row then column.

"P1" in docstrings is Li et al., "A unified framework for semi-supervised image segmentation and registration", the
paper that this package implements; "P2" is Liu et al., "Learning semi-supervised medical image segmentation from
spatial registration" (CCT-R).
"""


class DataError(ValueError):
    """Input that cannot be used; the message names the file and says what to do."""
