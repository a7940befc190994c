"""Reading images: NIfTI and DICOM with every check on what comes in, and what is done to intensities and canvases."""

import gzip
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from lib import DataError
from lib.cohorts.dicom import load_series
from lib.runs.params import ROOT

RAS = np.array([[0, 1], [1, 1], [2, 1]])  # nibabel's way to say right, anterior, superior
MM = {1: 1000.0, 3: 0.001}  # of a metre and a micron, by NIfTI's codes of units; any other, and none, is taken for mm
EXTERNAL = "`external` names a folder of further cases that are only tested, laid out as the cohort's own"
VIEWS = "sagittal", "coronal", "axial"  # slices along the canonical axes 0, 1, 2
GZIP = 1100  # no gzip file unpacks to more than so many times its size


class Grid(NamedTuple):
    """Where the voxels of a file lie, and how its slices were taken."""

    kind: type  # nibabel's class of the file
    header: object
    affine: np.ndarray
    shape: tuple  # as stored
    orientation: np.ndarray  # of the stored axes, as nibabel has it
    axis: int  # of the canonical array along which slices were taken

    @property
    def spacing(self):
        """mm between (slices, rows, columns)."""
        sizes = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))[np.argsort(self.orientation[:, 0])]
        mm = MM.get(int(self.header["xyzt_units"]) % 8, 1.0)
        return tuple(float(mm * sizes[axis]) for axis in upright(self.axis))

    @property
    def slices(self):
        """Shape (slices, rows, columns) in canonical orientation."""
        sides = np.array((*self.shape, 1, 1)[:3])[np.argsort(self.orientation[:, 0])]
        return tuple(int(sides[axis]) for axis in upright(self.axis))

    def along(self, axis):
        """The grid of the same voxels, slices along another axis."""
        return self._replace(axis=axis)

    @property
    def canonical(self):
        """Affine of the canonical array: the same for one grid however it is stored."""
        return self.affine @ nib.orientations.inv_ornt_aff(self.orientation, (*self.shape, 1, 1)[:3])

    def image(self, slices):
        """Slices ``(slices, rows, columns)`` as an image with exactly the stored shape, affine and orientation."""
        canonical = np.transpose(slices[:, ::-1], np.argsort(upright(self.axis)))
        stored = nib.apply_orientation(canonical, nib.orientations.ornt_transform(RAS, self.orientation))
        header = self.header.copy()
        header.set_data_dtype(slices.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0
        stored = np.ascontiguousarray(stored).reshape(self.shape)
        header["descrip"] = mark_of(stored)
        return self.kind(stored, self.affine, header)


def upright(axis):
    """Axes of the canonical array that are (slices, rows, columns) of slices along ``axis``.

    With their rows turned over, slices then stand upright: front or head at the top, the patient's left at the left (in
    sagittal slices the back).
    """
    first, second = (other for other in range(3) if other != axis)
    return axis, second, first


def check_size(file, least):
    """Read a .gz file to its end, before memory is taken for it. Its checksum is there; nibabel does not read that far.

    Raises:
        OSError, EOFError, zlib.error: it is broken. ValueError: it holds less than ``least`` bytes, or much more.
    """
    if not file.name.lower().endswith(".gz"):
        if file.stat().st_size < least:
            raise ValueError("it is cut short")
        return
    size = 0
    with gzip.open(file) as stream:
        while part := stream.read(2**20):
            size += len(part)
            if size > least + 2**20:
                raise ValueError("there is more in it than its header declares")
    if size < least:
        raise ValueError("it is cut short")


def open_scan(file, axis):
    """A file's header, checked, and its grid; no voxel is read yet."""
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty: export or download it again")
        stored = load_series(file) if file.is_dir() else nib.load(file)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist: check the folder's layout and the file's name") from error
    except Exception as error:  # nibabel lets whatever gzip, numpy and its own parsers raise through
        raise DataError(f"{file} cannot be read as NIfTI ({error}): export or download it again") from error
    if not isinstance(stored, (nib.Nifti1Image, nib.Nifti2Image)):
        raise DataError(f"{file} is {type(stored).__name__}, not NIfTI: export it as NIfTI")
    shape, kind = tuple(stored.shape), stored.get_data_dtype()
    if kind.fields or kind.kind == "c":
        raise DataError(f"{file} holds {'colours' if kind.fields else 'complex numbers'}: export one value per voxel")
    if 0 in shape or len(shape) < 2 or any(side < 0 for side in shape):
        raise DataError(f"{file} has the shape {shape}: there is nothing in it, leave it out")
    if any(side > 1 for side in shape[3:]):
        raise DataError(f"{file} has {len(shape)} dimensions {shape}: give every volume as a file of its own")
    if not np.isfinite(stored.affine).all() or abs(np.linalg.det(stored.affine[:3, :3])) < 1e-12:
        raise DataError(f"{file} has an affine that cannot be inverted: export it again, with its orientation")
    orientation = nib.io_orientation(stored.affine)
    if np.isnan(orientation).any():
        raise DataError(f"{file} has an affine that leaves out an axis: export it again, with its orientation")
    sides = np.array((*shape, 1, 1)[:3])[np.argsort(orientation[:, 0])]
    single = np.flatnonzero(sides == 1)
    axis = int(single[0]) if len(single) == 1 else axis
    return stored, Grid(type(stored), stored.header, stored.affine, shape, orientation, axis)


def read_grid(file, axis=2):
    """The Grid of an image or a mask alone; arguments and errors as ``read_scan`` has them."""
    return open_scan(Path(file), axis)[1]


def read_volume(file, axis=2):
    """An image or a mask in canonical (RAS) orientation.

    Args:
        file: NIfTI, 2D or 3D, or a folder that holds a DICOM series.
        axis: along which slices are taken. In an image that is one slice thick they are taken along the thin axis.

    Returns:
        (``(x, y, z)`` float32, from left to right, posterior to anterior and inferior to superior; Grid).

    Raises:
        DataError: the file is missing, empty, truncated or not NIfTI; declares more than it can hold; is 4D, in
            colour or complex; has no voxels; has an affine that cannot be inverted.
    """
    file = Path(file)
    stored, grid = open_scan(file, axis)
    declared = int(np.prod(grid.shape, dtype=object)) * stored.get_data_dtype().itemsize
    if file.is_file() and declared > GZIP * file.stat().st_size:
        raise DataError(f"{file} declares {declared / 1e9:.1f} GB but has {file.stat().st_size} bytes: export it again")
    try:
        if file.is_file():
            check_size(file, declared + stored.dataobj.offset)
        values = np.asarray(stored.dataobj, dtype=np.float32)
    except MemoryError:
        raise
    except Exception as error:  # nibabel lets whatever gzip, numpy and its own parsers raise through
        kind = "NIfTI" if file.is_file() else "DICOM"
        raise DataError(f"{file} cannot be read as {kind} ({error}): export or download it again") from error
    return nib.apply_orientation(values.reshape((*grid.shape, 1, 1)[:3]), grid.orientation), grid


def upright_slices(volume, axis):
    """The slices ``(slices, rows, columns)`` of a canonical volume along an axis, upright, see ``upright``."""
    return np.transpose(volume, upright(axis))[:, ::-1]


def turned(stack, axis, to):
    """Slices ``(slices, rows, columns)`` along ``axis`` as those along the axis ``to``, both upright; a view."""
    canonical = np.transpose(stack[:, ::-1], np.argsort(upright(axis)))
    return upright_slices(canonical, to)


def read_scan(file, axis=2):
    """The slices of an image or a mask, in canonical orientation and upright.

    Args:
        file, axis: see ``read_volume``; 0 left to right, 1 posterior to anterior, 2 inferior to superior.

    Returns:
        (``(slices, rows, columns)`` float32, Grid).

    Raises:
        DataError: see ``read_volume``.
    """
    volume, grid = read_volume(file, axis)
    return upright_slices(volume, grid.axis), grid


def read_pair(image_file, mask_file=None, values=None, axis=2):
    """An image and its mask in canonical orientation, checked.

    Args:
        mask_file: None where there is no mask.
        values: the label values that the mask may hold, background included; None for whole numbers from 0 to 255.
        axis: see ``read_volume``.

    Returns:
        (image float32, mask uint8 of the same shape or None, Grid of the image).

    Raises:
        DataError: see ``read_volume``; NaN or a constant image; image and mask of different shape or affine; a label
            that is not among ``values``.
    """
    image, grid = read_volume(image_file, axis)
    check_image(image, image_file)
    if mask_file is None:
        return image, None, grid
    mask, on = read_volume(mask_file, axis)
    if mask.shape != image.shape:
        raise DataError(
            f"{image_file} has shape {grid.shape} but its mask {mask_file} has {on.shape}: "
            "resample the mask onto the image's grid"
        )
    if not np.allclose(grid.canonical, on.canonical, atol=1e-3):
        raise DataError(
            f"{image_file} and its mask {mask_file} have different affines: resample the mask onto the image's grid"
        )
    check_labels(mask, values, mask_file)
    return image, mask.astype(np.uint8), grid


def mark_of(array):
    """The description in the header of a file that we write: a checksum of its content, the same in any byte order."""
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return f"joint segmentation {zlib.crc32(native):08x}".encode()


def without(known, found, folder):
    """``found``, a dictionary by case, without the cases that the cohort has already: what an external folder brings.

    Raises:
        DataError: nothing is left.
    """
    further = {case: files for case, files in found.items() if case not in known}
    if not further:
        raise DataError(f"{folder} holds no case that the cohort does not have already: {EXTERNAL}")
    return further


def existing_folder(folder, how):
    """``folder``, relative to the repository, as an absolute path; ``how`` says how its data are to be had.

    Raises:
        DataError: there is none.
    """
    folder = (ROOT / folder).resolve()
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: {how}")
    return folder


def files_by_case(folder, pattern, how):
    """Files of a folder that match a glob pattern: dictionary of case, such as ``case0005``, to its files in order.

    Raises:
        DataError: there are none; ``how`` says how they are to be had.
    """
    found = {}
    for file in sorted(folder.glob(pattern)):
        if match := re.match(r"[a-z]+\d+", file.name):
            found.setdefault(match[0], []).append(file)
    if not found:
        raise DataError(f"{folder} holds no {pattern}: {how}")
    return found


def check_image(image, file):
    """Raise DataError where an image holds NaN or infinity, or is constant."""
    if not np.isfinite(image).all():
        raise DataError(f"{file} holds NaN or infinite values: replace them, or leave the image out")
    if image.min() == image.max():
        raise DataError(f"{file} is constant ({image.min()}): it shows nothing, leave it out")


def check_labels(labels, values, file):
    """Raise DataError where labels hold a value outside ``values``; None stands for 0 to 255."""
    found = np.unique(labels)
    unknown = found[~np.isin(found, list(range(256) if values is None else values))].tolist()
    if unknown:
        allowed = "which are not labels from 0 to 255" if values is None else f"not only {sorted(values)}"
        raise DataError(f"{file} holds the values {unknown[:5]}, {allowed}")


def on_canvas(image, shape):
    """An image or a volume, centred on a canvas of zeros of the given shape, cropped where it is larger."""
    canvas = np.zeros(shape, image.dtype)
    to, taken = [], []
    for side, room in zip(image.shape, shape):
        length = min(side, room)
        to.append(slice((room - length) // 2, (room - length) // 2 + length))
        taken.append(slice((side - length) // 2, (side - length) // 2 + length))
    canvas[tuple(to)] = image[tuple(taken)]
    return canvas
