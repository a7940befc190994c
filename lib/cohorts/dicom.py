"""A folder that holds a DICOM series, as the volume that it is."""

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from lib import DataError

POSITION, ORIENTATION, SPACING = "0020|0032", "0020|0037", "0028|0030"
ROWS, COLUMNS, SAMPLES, FRAMES = "0028|0010", "0028|0011", "0028|0002", "0028|0008"
ENDINGS = ".dcm", ".ima"
EVEN = 0.02  # of the distance of two slices: as much may distances differ
UPRIGHT = 0.99  # cosine between the slices' normal and the way from slice to slice; less is a tilted gantry
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts towards left and posterior


class Voxels:
    """The voxels of a series, read when they are asked for: what nibabel calls a data object.

    Args:
        files: of the slices, in order.
        shape: (columns, rows, slices).
    """

    dtype = np.dtype(np.float32)
    ndim = 3
    offset = 0  # of a NIfTI file's voxels

    def __init__(self, files, shape):
        self.files, self.shape = files, shape

    def __array__(self, dtype=None, copy=None):
        image = sitk.ReadImage([str(file) for file in self.files])  # rescaled as its headers say
        array = sitk.GetArrayFromImage(image).reshape(self.shape[::-1]).transpose(2, 1, 0)
        return array.astype(dtype or self.dtype)


def is_series(folder):
    """Whether a path is a folder that holds DICOM files, beside what else there may be."""
    return folder.is_dir() and any(is_dicom(file) for file in sorted(folder.iterdir()))


def is_dicom(file):
    """Whether a file begins as DICOM files do, or is called like one."""
    if not file.is_file() or file.name.startswith("."):
        return False
    if file.suffix.lower() in ENDINGS:
        return True
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def load_series(folder):
    """The one series of a folder as nibabel has images; voxels are read when they are asked for.

    Raises:
        DataError: there is none or more than one, it has colours or several frames in a file, slices differ in size or
            orientation, are missing, lie twice at one place, or are sheared by a tilted gantry.
    """
    folder = Path(folder)
    files = files_of(folder)
    headers = [header_of(file) for file in files]
    for name, what in ((ROWS, "rows"), (COLUMNS, "columns"), (SPACING, "spacing"), (ORIENTATION, "orientation")):
        first = numbers(headers[0], name, files[0])
        for file, header in zip(files, headers):
            if not np.allclose(numbers(header, name, file), first, atol=1e-3):
                raise DataError(f"{file} has another {what} than {files[0].name}: put every series into its own folder")
    if numbers(headers[0], SAMPLES, files[0], "1")[0] > 1:
        raise DataError(f"{files[0]} holds colours: export one value per voxel")
    if numbers(headers[0], FRAMES, files[0], "1")[0] > 1:
        raise DataError(f"{files[0]} holds several frames: export the series with one file per slice, or as NIfTI")
    along, down = np.reshape(numbers(headers[0], ORIENTATION, files[0]), (2, 3))
    places = np.array([numbers(header, POSITION, file) for header, file in zip(headers, files)])
    order = np.argsort(places @ np.cross(along, down), kind="stable")
    step = step_of(places[order], np.cross(along, down), [files[k] for k in order])
    between_rows, between_columns = numbers(headers[0], SPACING, files[0])
    affine = np.eye(4)
    affine[:3] = np.stack((between_columns * along, between_rows * down, step, places[order[0]]), axis=1)
    shape = *(int(numbers(headers[0], name, files[0])[0]) for name in (COLUMNS, ROWS)), len(files)
    image = nib.Nifti1Image(Voxels([files[k] for k in order], shape), TO_RAS @ affine)
    image.header.set_xyzt_units("mm")
    return image


def files_of(folder):
    """Files of the one series in a folder; see ``load_series`` for errors."""
    reader = sitk.ImageSeriesReader()
    found = reader.GetGDCMSeriesIDs(str(folder))
    if not found:
        raise DataError(f"{folder} holds no DICOM series that can be read: export it again")
    if len(found) > 1:
        raise DataError(f"{folder} holds {len(found)} DICOM series: put every series into a folder of its own")
    return [Path(name) for name in reader.GetGDCMSeriesFileNames(str(folder), found[0])]


def header_of(file):
    """A file's header as SimpleITK reads it."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.LoadPrivateTagsOff()
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{file} cannot be read as DICOM ({str(error).splitlines()[-1]}): export it again") from error
    return reader


def numbers(header, name, file, default=None):
    """The numbers of a header's entry."""
    if not header.HasMetaDataKey(name) and default is None:
        raise DataError(f"{file} does not say where its slice lies (DICOM entry {name}): export the series again")
    text = header.GetMetaData(name) if header.HasMetaDataKey(name) else default
    try:
        return [float(part) for part in text.split("\\")]
    except ValueError:
        raise DataError(f"{file} has '{text}' in the DICOM entry {name}, no numbers: export the series again") from None


def step_of(places, normal, files):
    """The way from slice to slice, in mm; a single slice is 1 mm thick. See ``load_series`` for errors."""
    if len(files) == 1:
        return normal
    gaps = np.diff(places @ normal)
    usual = np.median(gaps)
    if usual <= 0 or gaps.min() < EVEN * usual:
        k = int(gaps.argmin())
        raise DataError(f"{files[k]} and {files[k + 1].name} lie at the same place: leave one of them out")
    if np.abs(gaps - usual).max() > EVEN * usual:
        k = int(np.abs(gaps - usual).argmax())
        raise DataError(
            f"{files[k]} and {files[k + 1].name} lie {gaps[k]:.2f} mm apart, the other slices {usual:.2f} mm: slices "
            "are missing, export the series again"
        )
    step = (places[-1] - places[0]) / (len(places) - 1)
    if usual / np.linalg.norm(step) < UPRIGHT:
        raise DataError(f"{files[0].parent} is sheared, as by a tilted gantry: resample it to a straight volume")
    return step
