"""A user's own folder of NIfTI images or DICOM series, with masks for some; results go back onto their grids."""

from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from lib import DataError
from lib.cohorts.dicom import is_series
from lib.cohorts.reading import mark_of, read_grid, read_pair, read_scan, upright_slices
from lib.runs.files import replacing
from lib.scans.reading.region import Seen, part_of

ENDINGS = (".nii.gz", ".nii")


class Case(NamedTuple):
    """An image, and its mask where there is one."""

    name: str  # the image's file name without its endings
    image: Path
    mask: Path | None
    others: tuple = ()  # the image's further channels
    region: tuple = ()  # what is seen of it, see region.Seen

    def grid(self, axis):
        """region.Seen of the image; arguments and errors as reading.read_grid has them."""
        return Seen(read_grid(self.image, axis), self.region)

    @property
    def files(self):
        """All of them."""
        return [self.image, *self.others, *[self.mask] * (self.mask is not None)]


def name_of(file):
    """A file's name without .nii or .nii.gz; None where it has neither, or is one of a system's hidden files."""
    if file.name.startswith("."):
        return None
    return next((file.name[: -len(ending)] for ending in ENDINGS if file.name.lower().endswith(ending)), None)


def nifti_files(folder, what, series=False):
    """NIfTI files of a folder by name, sorted.

    Args:
        what: they are, in words.
        series: whether folders in it that hold DICOM files count as well.

    Raises:
        DataError: no such folder, unreadable, a name that is there twice, or a link that leads out of the folder.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: give the one that holds the {what}")
        files = sorted(file for file in folder.iterdir() if name_of(file) or series and is_series(file))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    found = {}
    for file in files:
        try:
            target = file.resolve()
        except (OSError, RuntimeError) as error:
            raise DataError(f"{file} is a link that leads nowhere ({error}): copy the file there instead") from error
        if not target.is_relative_to(folder.resolve()):
            raise DataError(f"{file} is a link out of its folder, to {target}: copy the file there instead")
        name = name_of(file) or file.name
        if name in found:
            raise DataError(f"{found[name]} and {file} have the same name: remove or rename one")
        found[name] = file
    return found


def by_channel(found, channels):
    """Images that are one file per channel, as nnU-Net has them: dictionary of case to its files.

    Args:
        found: dictionary of name to file.
        channels: what the names of the files end with, e.g. ``_0000`` and ``_0001``; empty for one file per case.

    Raises:
        DataError: a channel of a case is missing, or a file is of no channel.
    """
    if not channels:
        return {name: (file,) for name, file in found.items()}
    cases = {}
    for name, file in found.items():
        ending = max((one for one in channels if name.endswith(one)), key=len, default=None)
        if ending is None or name == ending:
            raise DataError(f"{file} ends with none of {', '.join(channels)} (folder.channels): rename or remove it")
        cases.setdefault(name[: -len(ending)], {})[ending] = file
    for files in cases.values():
        if missing := [one for one in channels if one not in files]:
            raise DataError(f"{next(iter(files.values()))} has no file beside it for the channel {missing[0]}: add it")
    return {name: tuple(files[one] for one in channels) for name, files in cases.items()}


def find_cases(images, masks=None, pattern="{case}", channels=()):
    """All images of a folder, each with its mask where there is one, sorted by name.

    Args:
        images: folder of the images: NIfTI files, and folders of one DICOM series each.
        masks: folder of the masks, which may be the same one; None for no masks.
        pattern: name of a mask without its ending, where ``{case}`` stands for the image's.
        channels: see ``by_channel``; the case's name is the image's without the channel.

    Raises:
        DataError: see ``nifti_files`` and ``by_channel``; no image; a mask without one; a pattern without ``{case}``.
    """
    if "{case}" not in pattern:
        raise DataError(f"the pattern '{pattern}' of the masks' names does not hold {{case}}: write e.g. {{case}}_mask")
    found = nifti_files(images, "images", series=True)
    by_name = nifti_files(masks, "masks") if masks else {}
    same = masks and Path(masks).resolve() == Path(images).resolve()
    if same:
        if pattern == "{case}":
            raise DataError(f"images and masks are both in {images}: give the pattern of the masks' names")
        endings = channels or [""]
        names = {pattern.replace("{case}", name.removesuffix(ending)) for name in found for ending in endings}
        found = {name: file for name, file in found.items() if name not in names}
        by_name = {name: file for name, file in by_name.items() if name in names}
    if not found and is_series(Path(images)):
        raise DataError(f"{images} is a DICOM series itself: give the folder that holds it, with a folder per series")
    if not found:
        raise DataError(
            f"{images} holds no .nii or .nii.gz file and no DICOM series: give the folder that holds the images"
        )
    mask_of = lambda name: by_name.pop(pattern.replace("{case}", name), None)
    cases = [Case(name, first, mask_of(name), others) for name, (first, *others) in by_channel(found, channels).items()]
    if by_name:
        raise DataError(
            f"{next(iter(by_name.values()))} is the mask of no image in {images} ({len(by_name)} such in all): its "
            f"name must be an image's by the pattern {pattern}"
        )
    return cases


def read_case(case, axis=2, values=None):
    """An image and its labels as slices, checked.

    Args:
        case: Case.
        axis, values: see reading.read_pair.

    Returns:
        (list of the image's channels ``(slices, rows, columns)`` float32, labels uint8 or None, region.Seen of the
        image), all of the case's region.

    Raises:
        DataError: see reading.read_pair; a channel of other shape or affine than the first.
    """
    image, labels, grid = read_pair(case.image, case.mask, values, axis)
    part = lambda volume: part_of(volume, case.region).copy() if case.region else volume  # the rest need not stay
    slices = lambda volume: None if volume is None else upright_slices(part(volume), grid.axis)
    channels = [slices(image)]
    for file in case.others:
        other, _, on = read_pair(file, axis=axis)
        if other.shape != image.shape or not np.allclose(grid.canonical, on.canonical, atol=1e-3):
            raise DataError(f"{file} and {case.image} have different shapes or affines: resample one onto the other")
        channels.append(slices(other))
    return channels, slices(labels), Seen(grid, case.region)


def write_scan(slices, grid, file):
    """Write slices back onto the grid that they came from; leaves either the old file or the whole new one.

    The header's description holds a checksum, by which ``is_others`` knows the file again.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    with replacing(file) as partial:
        nib.save(grid.image(slices), partial)


def is_others(file):
    """Whether a file is a whole image that we have not written, or that somebody has changed since."""
    try:
        read_scan(file)
    except DataError:  # there is none, or it is damaged
        return False
    stored = nib.load(file)
    return bytes(stored.header["descrip"]).rstrip(b"\0") != mark_of(np.asarray(stored.dataobj))
