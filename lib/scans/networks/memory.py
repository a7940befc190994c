"""Smaller batches where memory does not suffice."""

import torch
from tqdm import tqdm

from lib import DataError
from lib.compute import out_of_memory


def with_less_memory(work, what):
    """``work(1)``; if memory does not suffice, ``work(2)``, then 4 and 8. ``work`` divides its batches by that number.

    Args:
        work: function of the divisor.
        what: it is, in words.

    Raises:
        DataError: memory does not suffice for an eighth of the batch either.
    """
    for divisor in (1, 2, 4, 8):
        try:
            return work(divisor)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            tqdm.write(f"{what}: out of memory with batches of 1/{divisor}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise DataError(
        f"{what}: out of memory even with an eighth of the batch: lower folder.size or the numbers of slices "
        "(folder.labelled, folder.unlabelled), or close other programs"
    )
