"""DICOM series: read as the volumes that they are, bad ones refused and named, masks written as DICOM-SEG."""

import shutil

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given
from hypothesis import settings as options
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from test_own import settings_for

from lib import DataError
from lib.cohorts.reading import read_grid, read_volume
from lib.scans import segment as own
from lib.scans.networks.model_file import load_model
from lib.scans.reading.folder import find_cases

TILTED = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)  # coronal, turned by 37 degrees about the body's axis


def write_series(folder, voxels, orientation=(1, 0, 0, 0, 1, 0), spacing=(0.7, 1.1, 2.5), seed=0):
    """Voxels ``(slices, rows, columns)`` as a series in random order, stored as 2 v + 1000, which headers undo."""
    folder.mkdir(parents=True)
    along, down = np.reshape(orientation, (2, 3))
    series, study, frame = (generate_uid(entropy_srcs=[str(folder), part]) for part in "abc")
    order = np.random.default_rng(seed).permutation(len(voxels))
    for number, k in enumerate(order):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(k)])
        data = FileDataset(folder / f"{number:03d}.dcm", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = series, study, frame
        data.PatientID, data.PatientName, data.StudyID = "made-up", "made^up", "made-up"
        data.PatientBirthDate = data.PatientSex = data.StudyDate = data.StudyTime = data.AccessionNumber = ""
        data.PositionReferenceIndicator = data.ReferringPhysicianName = data.Manufacturer = ""
        data.Modality, data.SeriesNumber, data.InstanceNumber = "CT", 1, number + 1
        data.ImagePositionPatient = [f"{x:.6g}" for x in spacing[2] * k * np.cross(along, down) + (5, -7, 11)]
        data.ImageOrientationPatient, data.PixelSpacing = list(orientation), [spacing[0], spacing[1]]
        data.SliceThickness, data.RescaleSlope, data.RescaleIntercept = spacing[2], 0.5, -500
        data.Rows, data.Columns = voxels.shape[1:]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit = 15
        data.PixelData = (2 * voxels[k] + 1000).astype(np.uint16).tobytes()
        data.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
    return folder


def voxels(seed=0, slices=6):
    return np.random.default_rng(seed).integers(0, 900, (slices, 9, 7))


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), TILTED])
def test_a_series_is_the_volume_that_another_reader_sees(tmp_path, orientation):
    """Every voxel has the value and the place in the patient that SimpleITK gives it."""
    folder = write_series(tmp_path / "a", voxels(), orientation)
    volume, grid = read_volume(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = grid.canonical
    for index in np.ndindex(image.GetSize()):
        place = np.array([-1, -1, 1]) * image.TransformIndexToPhysicalPoint([int(k) for k in index])
        found = np.linalg.solve(affine, [*place, 1])[:3]
        assert np.abs(found - found.round()).max() < 1e-3
        assert volume[tuple(found.round().astype(int))] == image[index]
    assert sorted(volume.ravel()) == sorted(voxels().ravel())


def change(number, **entries):
    def spoil(folder):
        file = folder / f"{number:03d}.dcm"
        data = dcmread(file)
        for name, value in entries.items():
            if value is None:
                delattr(data, name)
            else:
                setattr(data, name, value)
        data.save_as(file)

    return spoil


def twice(folder):
    data = dcmread(folder / "000.dcm")
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.save_as(folder / "900.dcm")


def missing(folder):
    middle = sorted(folder.iterdir(), key=lambda file: dcmread(file).ImagePositionPatient[2])[2]
    middle.unlink()


def sheared(folder):
    for file in folder.iterdir():
        data = dcmread(file)
        x, y, z = data.ImagePositionPatient
        data.ImagePositionPatient = [x, y + 0.4 * z, z]
        data.save_as(file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing, "5.00 mm apart, the other slices 2.50 mm: slices are missing"),
        (twice, "lie at the same place: leave one of them out"),
        (sheared, "is sheared, as by a tilted gantry"),
        (change(2, SeriesInstanceUID="1.2.3"), "holds 2 DICOM series: put every series into a folder of its own"),
        (change(2, PixelSpacing=[1, 1]), "spacing"),
        (change(2, ImagePositionPatient=None), "does not say where its slice lies"),
        (lambda folder: [file.write_bytes(file.read_bytes()[:140]) for file in folder.iterdir()], "DICOM"),
    ],
)
def test_bad_series_are_refused_and_named(tmp_path, spoil, words):
    folder = write_series(tmp_path / "bad", voxels())
    spoil(folder)
    with pytest.raises(DataError, match=f"(?s)bad.*{words}"):
        read_volume(folder)


@options(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4), cut=st.floats(0, 1)
)
def test_whatever_is_in_a_dicom_file_is_read_or_refused(tmp_path, places, cut):
    """Damaged bytes give a volume of the declared shape or a DataError, never another exception."""
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    folder = write_series(tmp_path / "a", voxels(slices=3))
    file = folder / "001.dcm"
    content = bytearray(file.read_bytes())
    for place, value in places:
        content[int(place * len(content))] = value
    file.write_bytes(bytes(content[: max(1, int(cut * len(content)))] if cut < 0.5 else content))
    try:
        volume, grid = read_volume(folder)
    except DataError as error:
        assert str(folder) in str(error)
    else:
        assert sorted(volume.shape) == sorted(grid.shape)


def series_and_masks(folder, cases=3):
    """Made-up series of a bright ball, the first with a mask on its grid."""
    for k in range(cases):
        places = np.meshgrid(*(np.arange(side) - side / 2 for side in (16, 24, 20)), indexing="ij")
        inside = sum(place**2 for place in places) < 40 + 5 * k
        image = 600 * inside + np.random.default_rng(k).integers(0, 80, inside.shape)
        write_series(folder / "images" / f"case {k}", image, TILTED, (1, 1, 1))
        if k == 0:
            grid = read_grid(folder / "images" / "case 0")
            (folder / "masks").mkdir()
            labels = inside.astype(np.uint8).transpose(2, 1, 0)
            nib.save(nib.Nifti1Image(labels, grid.affine), folder / "masks" / "case 0.nii.gz")
    return folder


@pytest.mark.parametrize("changes", [{}, {"region": "localised", "workers": 2}])
def test_a_folder_of_series_is_segmented_and_its_masks_open_beside_them(tmp_path, monkeypatch, changes):
    settings = settings_for(series_and_masks(tmp_path), monkeypatch, dicom_seg=True, **changes)
    settings.volumes.training |= {"steps": 30}
    table = own.segment_folder(settings)
    assert table["status"].tolist() == ["done"] * 3 and table["case"].tolist() == ["case 0", "case 1", "case 2"]
    assert (load_model(tmp_path / "out" / "model.safetensors").localiser is None) == (not changes)
    for k in range(3):
        series = tmp_path / "images" / f"case {k}"
        mask = nib.load(tmp_path / "out" / f"case {k}_mask.nii.gz")
        assert np.allclose(mask.affine, read_grid(series).affine)
        labels = np.asarray(mask.dataobj)
        assert labels.any()
        seg = hd.seg.segread(tmp_path / "out" / f"case {k}_mask.dcm")
        sources = [dcmread(file) for file in series.iterdir()]
        assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
        volume = seg.get_volume(combine_segments=False)
        marked = volume.array[..., 0] > 0
        places = volume.affine @ np.array([*np.nonzero(marked), np.ones(marked.sum())])
        expected = np.diag([-1, -1, 1, 1]) @ mask.affine @ np.array([*np.nonzero(labels), np.ones((labels > 0).sum())])
        assert np.allclose(sorted(places.T.round(3).tolist()), sorted(expected.T.round(3).tolist()), atol=0.01)


def test_a_series_in_place_of_a_folder_of_series_is_named(tmp_path):
    with pytest.raises(DataError, match="is a DICOM series itself: give the folder that holds it"):
        find_cases(write_series(tmp_path / "a", voxels()))
