"""Smaller batches where memory does not suffice."""

import torch
from tqdm import tqdm

from lib import DataError
from lib.compute import out_of_memory


def with_less_memory(work, what):
    """``work(divisor)`` with the divisor of the batches at 1; where memory does not suffice at 2, 4 and 8.

    Args:
        work: function of the divisor.
        what: it is, in words.

    Raises:
        DataError: it does not suffice then either.
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
