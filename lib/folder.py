"""A user's own folder of NIfTI images, with masks for some; and results written back onto the grids they came from."""

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from lib import DataError
from lib.data import check_image
from lib.files import replacing

ENDINGS = (".nii.gz", ".nii")
RAS = np.array([[0, 1], [1, 1], [2, 1]])  # nibabel's way to say right, anterior, superior
MM = {1: 1000.0, 3: 0.001}  # of a metre and a micron, by NIfTI's codes of units; any other, and none, is taken for mm
GZIP = 1100  # no gzip file unpacks to more than so many times its size


class Case(NamedTuple):
    """An image, and its mask where there is one."""

    name: str  # the image's file name without its endings
    image: Path
    mask: Path | None


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

    Slices then stand upright once their rows are turned over: the patient's left at the left, or where the slices are
    sagittal the back; front or head at the top.
    """
    first, second = (other for other in range(3) if other != axis)
    return axis, second, first


def name_of(file):
    """A file's name without .nii or .nii.gz; None where it has neither, or is one of a system's hidden files."""
    if file.name.startswith("."):
        return None
    return next((file.name[: -len(ending)] for ending in ENDINGS if file.name.lower().endswith(ending)), None)


def nifti_files(folder, what):
    """NIfTI files of a folder by name, sorted.

    Raises:
        DataError: no such folder, unreadable, a name that is there twice, or a link that leads out of the folder.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: give the one that holds the {what}")
        files = sorted(file for file in folder.iterdir() if name_of(file))
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
        if name_of(file) in found:
            raise DataError(f"{found[name_of(file)]} and {file} have the same name: remove or rename one")
        found[name_of(file)] = file
    return found


def find_cases(images, masks=None, pattern="{case}"):
    """All images of a folder, each with its mask where there is one, sorted by name.

    Args:
        images: folder of the images.
        masks: folder of the masks, which may be the same one; None for no masks.
        pattern: name of a mask without its ending, where ``{case}`` stands for the image's.

    Raises:
        DataError: see ``nifti_files``; no image; a mask without an image; a pattern without ``{case}``.
    """
    if "{case}" not in pattern:
        raise DataError(f"the pattern '{pattern}' of the masks' names does not hold {{case}}: write e.g. {{case}}_mask")
    found = nifti_files(images, "images")
    by_name = nifti_files(masks, "masks") if masks else {}
    same = masks and Path(masks).resolve() == Path(images).resolve()
    if same:
        if pattern == "{case}":
            raise DataError(f"images and masks are both in {images}: give the pattern of the masks' names")
        names = {pattern.replace("{case}", name) for name in found}
        found = {name: file for name, file in found.items() if name not in names}
        by_name = {name: file for name, file in by_name.items() if name in names}
    if not found:
        raise DataError(f"{images} holds no .nii or .nii.gz file: give the folder that holds the images")
    cases = [Case(name, file, by_name.pop(pattern.replace("{case}", name), None)) for name, file in found.items()]
    if by_name:
        raise DataError(
            f"{next(iter(by_name.values()))} is the mask of no image in {images} ({len(by_name)} such in all): its name "
            f"must be an image's by the pattern {pattern}"
        )
    return cases


def check_size(file, least):
    """Read a .gz file to its end, where its checksum is, which nibabel does not, before memory is taken for it.

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
        stored = nib.load(file)
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


def read_scan(file, axis=2):
    """The slices of an image or a mask, in canonical (RAS) orientation and upright, see ``upright``.

    Args:
        file: NIfTI, 2D or 3D.
        axis: along which slices are taken: 0 left to right, 1 posterior to anterior, 2 inferior to superior. Where an
            image has one slice only, along that axis.

    Returns:
        (``(slices, rows, columns)`` float32, Grid).

    Raises:
        DataError: the file is missing, empty, truncated or not NIfTI; declares more than it can hold; is 4D, in
            colour or complex; has no voxels; has an affine that cannot be inverted.
    """
    file = Path(file)
    stored, grid = open_scan(file, axis)
    declared = int(np.prod(grid.shape, dtype=object)) * stored.get_data_dtype().itemsize
    if declared > GZIP * file.stat().st_size:
        raise DataError(f"{file} declares {declared / 1e9:.1f} GB but has {file.stat().st_size} bytes: export it again")
    try:
        check_size(file, declared + stored.dataobj.offset)
        values = np.asarray(stored.dataobj, dtype=np.float32)
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise DataError(f"{file} cannot be read as NIfTI ({error}): export or download it again") from error
    canonical = nib.apply_orientation(values.reshape((*grid.shape, 1, 1)[:3]), grid.orientation)
    return np.transpose(canonical, upright(grid.axis))[:, ::-1], grid


def read_case(case, axis=2, values=None):
    """An image and its labels, checked.

    Args:
        values: the label values that masks may hold, background included; None for any whole numbers from 0 to 255.

    Returns:
        (image ``(slices, rows, columns)`` float32, labels uint8 or None, Grid of the image).

    Raises:
        DataError: see ``read_scan``; NaN or a constant image; image and mask of different shape or affine; labels
            that are not whole, negative or not among ``values``.
    """
    image, grid = read_scan(case.image, axis)
    check_image(image, case.image)
    if case.mask is None:
        return image, None, grid
    labels, on = read_scan(case.mask, axis)
    if labels.shape != image.shape:
        raise DataError(f"{case.image} has shape {grid.shape} but its mask {case.mask} has {on.shape}: "
                        "resample the mask onto the image's grid")
    if not np.allclose(grid.canonical, on.canonical, atol=1e-3):
        raise DataError(f"{case.image} and its mask {case.mask} have different affines: "
                        "resample the mask onto the image's grid")
    found = np.unique(labels)
    allowed = range(256) if values is None else values
    unknown = found[~np.isin(found, list(allowed))].tolist()
    if unknown:
        raise DataError(f"{case.mask} holds the values {unknown[:5]}, "
                        + ("which are not labels from 0 to 255" if values is None else f"not only {sorted(values)}"))
    return image, labels.astype(np.uint8), grid


def write_scan(slices, grid, file):
    """Write slices back onto the grid that they came from; leaves either the old file or the whole new one.

    The header's description holds a checksum, by which ``is_others`` knows the file again.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    with replacing(file) as partial:
        nib.save(grid.image(slices), partial)


def mark_of(array):
    """What the header of a file that we have written says of its content, in whatever order its bytes are stored."""
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return f"joint segmentation {zlib.crc32(native):08x}".encode()


def is_others(file):
    """Whether a file is a whole image that we have not written, or that somebody has changed since."""
    try:
        read_scan(file)
    except DataError:  # there is none, or it is damaged
        return False
    stored = nib.load(file)
    return bytes(stored.header["descrip"]).rstrip(b"\0") != mark_of(np.asarray(stored.dataobj))
