import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from lib import DataError, folder


def write(file, array, affine=None, kind=nib.Nifti1Image):
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(kind(array, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine), file)
    return file


def noise(*shape):
    return np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "PIL", "SAL"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_what_is_read_is_written_back_onto_the_same_voxels(tmp_path, codes, axis, kind):
    """A volume stored in any orientation reads as one and the same, and is written back as it was stored."""
    canonical = noise(5, 6, 7)
    change = ornt_transform(folder.RAS, axcodes2ornt(codes))
    stored = nib.apply_orientation(canonical, change)
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) @ inv_ornt_aff(change, canonical.shape)
    slices, grid = folder.read_scan(write(tmp_path / "a.nii.gz", stored, affine, kind), axis)
    assert np.array_equal(slices, np.moveaxis(canonical, axis, 0))
    assert grid.spacing == pytest.approx([(1, 2, 3)[axis], *np.delete((1, 2, 3), axis)])
    folder.write_scan(slices.astype(np.int16), grid, tmp_path / "b.nii.gz")
    again = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(np.asarray(again.dataobj), stored) and np.allclose(again.affine, affine)
    assert type(again) is kind and again.shape == stored.shape


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (1, 8, 9), (8, 1, 9), (8, 9, 4, 1)])
def test_two_dimensional_images_and_trailing_ones_keep_their_shape(tmp_path, shape):
    array = noise(*shape)
    slices, grid = folder.read_scan(write(tmp_path / "a.nii", array))
    assert slices.shape[0] == (4 if 4 in shape else 1)
    folder.write_scan(slices.astype(np.int16), grid, tmp_path / "b.nii.gz")
    again = nib.load(tmp_path / "b.nii.gz")
    assert again.shape == shape and np.array_equal(np.asarray(again.dataobj), array)


def test_header_units_codes_and_scaling_survive(tmp_path):
    image = nib.Nifti1Image(noise(4, 5, 6), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(image.affine, 4)
    image.set_qform(image.affine, 1)
    image.header.set_slope_inter(2.0, 10.0)
    nib.save(image, tmp_path / "a.nii.gz")
    slices, grid = folder.read_scan(tmp_path / "a.nii.gz")
    folder.write_scan((slices > 500).astype(np.uint8), grid, tmp_path / "b.nii.gz")
    again = nib.load(tmp_path / "b.nii.gz")
    assert again.header.get_xyzt_units() == ("mm", "sec") and again.get_data_dtype() == np.uint8
    assert (int(again.header["sform_code"]), int(again.header["qform_code"])) == (4, 1)
    assert set(np.unique(np.asarray(again.dataobj))) == {0, 1}


def test_masks_are_found_by_name(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / "images" / f"{name}.nii.gz", noise(4, 4))
    write(tmp_path / "masks" / "b_seg.nii", noise(4, 4))
    cases = folder.find_cases(tmp_path / "images", tmp_path / "masks", "{case}_seg")
    assert [(case.name, case.mask and case.mask.name) for case in cases] == [("a", None), ("b", "b_seg.nii"), ("c", None)]
    write(tmp_path / "images" / "a_mask.nii.gz", noise(4, 4))
    cases = folder.find_cases(tmp_path / "images", tmp_path / "images", "{case}_mask")
    assert [(case.name, bool(case.mask)) for case in cases] == [("a", True), ("b", False), ("c", False)]


def test_names_with_spaces_dots_and_letters_of_any_language(tmp_path):
    write(tmp_path / "mé dossier" / "Müller, J. 1.5T.nii.gz", noise(4, 4))
    (case,) = folder.find_cases(tmp_path / "mé dossier")
    assert case.name == "Müller, J. 1.5T" and folder.read_case(case)[0].shape == (1, 4, 4)


def link(tmp_path):
    (tmp_path / "images" / "b.nii").symlink_to(write(tmp_path / "elsewhere" / "b.nii", noise(4, 4)))


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda t: write(t / "images" / "a.nii", noise(4, 4)), "same name"),
    (lambda t: write(t / "masks" / "z.nii", noise(4, 4)), "mask of no image"),
    (link, "link out of its folder"),
    (lambda t: (t / "images" / "a.nii.gz").unlink(), "holds no .nii"),
    (lambda t: [file.unlink() for file in (t / "masks").iterdir()] and (t / "masks").rmdir(), "is not a folder"),
])
def test_bad_folders_are_errors(tmp_path, spoil, words):
    write(tmp_path / "images" / "a.nii.gz", noise(4, 4))
    write(tmp_path / "masks" / "a.nii.gz", noise(4, 4))
    spoil(tmp_path)
    with pytest.raises(DataError, match=words):
        folder.find_cases(tmp_path / "images", tmp_path / "masks")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-20])


def break_gzip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))


def lie(file):
    """A header that declares a petabyte."""
    header = nib.Nifti1Image(noise(4, 4, 4), np.eye(4)).header
    header.set_data_shape((30000, 30000, 30000))
    file.write_bytes(gzip.compress(header.binaryblock + bytes(400)))


def flatten(file):
    image = nib.Nifti1Image(noise(4, 4, 4), np.eye(4))
    image.set_qform(None, 0)
    image.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), 2)
    nib.save(image, file)


BAD = {
    "truncated": (truncate, "cannot be read as NIfTI"),
    "broken gzip": (break_gzip, "cannot be read as NIfTI"),
    "empty": (lambda f: f.write_bytes(b""), "is empty"),
    "not NIfTI": (lambda f: f.write_bytes(b"hello" * 200), "cannot be read as NIfTI"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "cannot be read as NIfTI"),
    "missing": (lambda f: f.unlink(), "does not exist"),
    "NaN": (lambda f: write(f, np.full((4, 4, 4), np.nan, np.float32)), "NaN"),
    "infinite": (lambda f: write(f, np.where(noise(4, 4, 4) > 500, np.inf, 0).astype(np.float32)), "infinite"),
    "constant": (lambda f: write(f, np.ones((4, 4, 4), np.int16)), "is constant"),
    "4D": (lambda f: write(f, noise(4, 4, 4, 3)), "4 dimensions"),
    "colour": (lambda f: write(f, np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "colours"),
    "complex": (lambda f: write(f, np.ones((4, 4, 4), np.complex64)), "complex"),
    "no voxels": (lambda f: write(f, np.zeros((4, 0, 4), np.int16)), "nothing in it"),
    "absurdly large": (lie, "declares"),
    "flat affine": (flatten, "affine"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_images_are_errors_that_name_the_file(tmp_path, fault):
    file = write(tmp_path / "a.nii.gz", noise(8, 8, 8))
    spoil, words = BAD[fault]
    spoil(file)
    with pytest.raises(DataError, match=f"(?s)a.nii.gz.*{words}"):
        folder.read_case(folder.Case("a", file, None))


@pytest.mark.parametrize(("labels", "affine", "values", "words"), [
    (np.zeros((8, 8, 7), np.uint8), None, None, "has shape"),
    (np.zeros((8, 8, 8), np.uint8), np.eye(4), None, "different affines"),
    (np.full((8, 8, 8), 3, np.uint8), None, (0, 1), r"holds the values \[3.0\]"),
    (np.full((8, 8, 8), 0.5, np.float32), None, None, "not labels"),
    (np.full((8, 8, 8), -1, np.int16), None, None, "not labels"),
])
def test_bad_masks_are_errors_that_name_the_file(tmp_path, labels, affine, values, words):
    image, mask = write(tmp_path / "a.nii.gz", noise(8, 8, 8)), write(tmp_path / "m.nii.gz", labels, affine)
    with pytest.raises(DataError, match=words) as found:
        folder.read_case(folder.Case("a", image, mask), values=values)
    assert str(mask) in str(found.value)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    slices, grid = folder.read_scan(write(tmp_path / "a.nii.gz", noise(4, 5, 6)))
    folder.write_scan(slices, grid, tmp_path / "out.nii.gz")
    before = (tmp_path / "out.nii.gz").read_bytes()

    def full(image, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(OSError, match="No space"):
        folder.write_scan(slices + 1, grid, tmp_path / "out.nii.gz")
    assert (tmp_path / "out.nii.gz").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nii.gz", "out.nii.gz"]
