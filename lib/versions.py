"""Names for the numbers that the code gives.

Whoever changes the code so that the same settings give other numbers changes the name as well, so that no checkpoint
or finished item of the grid is taken for one of the new code; tests/test_numerics.py fails where this was forgotten.
"""

NUMERICS = "d7fa566ff1753849"  # networks, losses, warping, augmentation, pseudo-masks and training
MEAN_TEACHER = "4fd182be9f838728"
JOINT_PLUS = "refinement"
CCTR = "aligned volumes"
VOLUMES = "labels by share"  # what differs where images are slices of volumes
EVALUATION = "first"  # scores, and the random draws of the masks that are tested
VOLUME_EVALUATION = "confidence of marked pixels"  # the same of volumes
