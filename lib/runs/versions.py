"""Names for the numbers that the code gives, and fingerprints of what results depend on.

If you change code so that the same settings give other numbers, change its name as well. Otherwise checkpoints and
finished items of the grid are taken for those of the new code. tests/test_numerics.py fails if you forget.
"""

import hashlib
import json

NUMERICS = "d7fa566ff1753849"  # networks, losses, warping, augmentation, pseudo-masks and training
MEAN_TEACHER = "4fd182be9f838728"
CCTR = "last state"
STRONG = "first"  # the methods of recipe `strong`
VOLUMES = "labels by share"  # what differs where images are slices of volumes
EVALUATION = "first"  # scores, and the random draws of the masks that are tested
VOLUME_EVALUATION = "confidence of marked pixels"  # the same of volumes
PREDICTED_DSC = "soft Dice confidence"  # and its interval, of a user's own cases


def fingerprint(*parts):
    """A hash of settings and data, by which a checkpoint knows whether it may be resumed."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
