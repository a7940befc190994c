"""Splits by subject, never by slice."""

import numpy as np

from lib import DataError

TESTED = ("test", "unseen", "external")  # unseen: another anatomy; external: a further folder. Both are only tested
SPLITS = ("train", "validation", *TESTED)


def split_by_subject(subjects, sizes, seed):
    """Splits by subject, never by slice.

    Args:
        subjects: ``(slices,)`` ids.
        sizes: slices wanted for train, validation and test; scaled down in proportion where there are fewer.
        seed: of the draw.

    Returns:
        ``(slices,)`` of train, validation, test, or ``unused`` where there are more slices than wanted.

    Raises:
        DataError: fewer subjects than splits.
    """
    names, slices = np.unique(subjects, return_counts=True)
    if len(names) < 3:
        raise DataError(f"{len(names)} subjects cannot fill train, validation and test: give at least 3")
    share = min(1.0, len(subjects) / sum(sizes.values()))
    wanted = {split: max(1, round(sizes[split] * share)) for split in ("test", "validation", "train")}
    order = list(np.random.default_rng(seed).permutation(len(names)))
    assignment = dict.fromkeys(names, "unused")
    for position, (split, count) in enumerate(wanted.items()):
        taken = 0
        while taken < count and len(order) > 2 - position:  # each split keeps at least one subject
            subject = order.pop()
            assignment[names[subject]] = split
            taken += slices[subject]
    return np.array([assignment[subject] for subject in subjects])


def check_split(subjects, split):
    """Raise DataError where a subject stands in two splits, or a split is empty."""
    for subject in np.unique(subjects):
        found = np.unique(split[subjects == subject])
        if len(found) > 1:
            raise DataError(f"subject {subject} is in the splits {' and '.join(found)}: it may be in one only")
    for name in ("train", "validation", "test"):
        if not (split == name).any():
            raise DataError(f"the {name} split is empty: give more subjects, or a smaller split in params.yaml")
