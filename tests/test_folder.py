import gzip
import tracemalloc
import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from lib import DataError
from lib.cohorts import reading
from lib.cohorts.volumes import scaled
from lib.scans.reading import folder


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
    """A volume stored in any orientation reads as one and the same, upright, and is written back as it was stored."""
    canonical = noise(5, 6, 7)
    change = ornt_transform(reading.RAS, axcodes2ornt(codes))
    stored = nib.apply_orientation(canonical, change)
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) @ inv_ornt_aff(change, canonical.shape)
    slices, grid = reading.read_scan(write(tmp_path / "a.nii.gz", stored, affine, kind), axis)
    across, up = [(1, 2), (0, 2), (0, 1)][axis]  # columns go right, or to the front; rows begin at the top, or front
    assert np.array_equal(slices, np.flip(np.transpose(canonical, (axis, up, across)), 1))
    assert grid.spacing == pytest.approx([(1, 2, 3)[k] for k in (axis, up, across)]) and grid.slices == slices.shape
    assert grid.canonical == pytest.approx(np.diag([1.0, 2.0, 3.0, 1.0]))
    folder.write_scan(slices.astype(np.int16), grid, tmp_path / "b.nii.gz")
    again = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(np.asarray(again.dataobj), stored) and np.allclose(again.affine, affine)
    assert type(again) is kind and again.shape == stored.shape


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (1, 8, 9), (8, 1, 9), (8, 9, 4, 1)])
def test_two_dimensional_images_and_trailing_ones_keep_their_shape(tmp_path, shape):
    array = noise(*shape)
    slices, grid = reading.read_scan(write(tmp_path / "a.nii", array))
    assert slices.shape[0] == (4 if 4 in shape else 1)
    folder.write_scan(slices.astype(np.int16), grid, tmp_path / "b.nii.gz")
    again = nib.load(tmp_path / "b.nii.gz")
    assert again.shape == shape and np.array_equal(np.asarray(again.dataobj), array)


@pytest.mark.parametrize(("unit", "mm"), [("micron", 0.001), ("mm", 1), ("meter", 1000), ("unknown", 1)])
def test_spacing_is_in_mm_whatever_the_files_unit(tmp_path, unit, mm):
    image = nib.Nifti1Image(noise(4, 5, 6), np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    assert reading.read_grid(tmp_path / "a.nii").spacing == pytest.approx((4 * mm, 3 * mm, 2 * mm))


def test_a_mask_may_be_stored_the_other_way_round_on_the_same_grid(tmp_path):
    array = noise(4, 5, 6) % 2
    image = write(tmp_path / "image.nii", noise(4, 5, 6))
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    affine[0, 3] = 3
    mask = write(tmp_path / "mask.nii", array[::-1], affine)
    labels = folder.read_case(folder.Case("a", image, mask))[1]
    assert np.array_equal(labels, reading.read_scan(write(tmp_path / "same.nii", array))[0])
    affine[0, 3] = 4
    write(mask, array[::-1], affine)
    with pytest.raises(DataError, match="different affines"):
        folder.read_case(folder.Case("a", image, mask))


@pytest.mark.parametrize("order", "<>")
def test_files_that_were_written_here_are_known_until_they_are_changed(tmp_path, order):
    image = nib.Nifti1Image(noise(4, 5, 6), np.eye(4), nib.Nifti1Header(endianness=order))
    nib.save(image, tmp_path / "a.nii")
    slices, grid = reading.read_scan(tmp_path / "a.nii")
    for values in slices.astype(np.uint8), slices / 1000:
        folder.write_scan(values, grid, tmp_path / "b.nii.gz")
        assert not folder.is_others(tmp_path / "b.nii.gz")
        again = nib.load(tmp_path / "b.nii.gz")
        changed = np.array(again.dataobj)
        changed[1, 2, 3] += 1
        nib.save(nib.Nifti1Image(changed, again.affine, again.header), tmp_path / "c.nii.gz")
        assert folder.is_others(tmp_path / "c.nii.gz")
    assert folder.is_others(tmp_path / "a.nii") and not folder.is_others(tmp_path / "none.nii")


def test_hidden_files_are_no_scans_and_a_link_to_itself_is_named(tmp_path):
    write(tmp_path / "a.nii", noise(4, 5, 6))
    (tmp_path / "._a.nii").write_bytes(b"what macOS leaves on other disks")
    assert list(folder.nifti_files(tmp_path, "images")) == ["a"]
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    with pytest.raises(DataError, match="loop.nii is a link that leads nowhere"):
        folder.nifti_files(tmp_path, "images")


def test_header_units_codes_and_scaling_survive(tmp_path):
    image = nib.Nifti1Image(noise(4, 5, 6), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(image.affine, 4)
    image.set_qform(image.affine, 1)
    image.header.set_slope_inter(2.0, 10.0)
    nib.save(image, tmp_path / "a.nii.gz")
    slices, grid = reading.read_scan(tmp_path / "a.nii.gz")
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
    found = [(case.name, case.mask and case.mask.name) for case in cases]
    assert found == [("a", None), ("b", "b_seg.nii"), ("c", None)]
    write(tmp_path / "images" / "a_mask.nii.gz", noise(4, 4))
    cases = folder.find_cases(tmp_path / "images", tmp_path / "images", "{case}_mask")
    assert [(case.name, bool(case.mask)) for case in cases] == [("a", True), ("b", False), ("c", False)]


def test_names_with_spaces_dots_and_letters_of_any_language(tmp_path):
    write(tmp_path / "mé dossier" / "Müller, J. 1.5T.nii.gz", noise(4, 4))
    (case,) = folder.find_cases(tmp_path / "mé dossier")
    assert case.name == "Müller, J. 1.5T" and folder.read_case(case)[0][0].shape == (1, 4, 4)


def link(tmp_path):
    (tmp_path / "images" / "b.nii").symlink_to(write(tmp_path / "elsewhere" / "b.nii", noise(4, 4)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: write(t / "images" / "a.nii", noise(4, 4)), "same name"),
        (lambda t: write(t / "masks" / "z.nii", noise(4, 4)), "mask of no image"),
        (link, "link out of its folder"),
        (lambda t: (t / "images" / "a.nii.gz").unlink(), "holds no .nii"),
        (lambda t: [file.unlink() for file in (t / "masks").iterdir()] and (t / "masks").rmdir(), "is not a folder"),
    ],
)
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


def untype(file):
    """A header of binary voxels, void as numpy calls them, which nothing reads."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[70:74] = b"\x01\x00\x01\x00"  # datatype and bitpix
    file.write_bytes(gzip.compress(bytes(content)))


BAD = {
    "truncated": (truncate, "cannot be read as NIfTI"),
    "broken gzip": (break_gzip, "cannot be read as NIfTI"),
    "empty": (lambda f: f.write_bytes(b""), "is empty"),
    "not NIfTI": (lambda f: f.write_bytes(b"hello" * 200), "cannot be read as NIfTI"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "holds no DICOM series that can be read"),
    "missing": (lambda f: f.unlink(), "does not exist"),
    "NaN": (lambda f: write(f, np.full((4, 4, 4), np.nan, np.float32)), "NaN"),
    "infinite": (lambda f: write(f, np.where(noise(4, 4, 4) > 500, np.inf, 0).astype(np.float32)), "infinite"),
    "constant": (lambda f: write(f, np.ones((4, 4, 4), np.int16)), "is constant"),
    "4D": (lambda f: write(f, noise(4, 4, 4, 3)), "4 dimensions"),
    "colour": (lambda f: write(f, np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "colours"),
    "void": (untype, "cannot be read as NIfTI"),
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


@pytest.mark.parametrize(
    ("labels", "affine", "values", "words"),
    [
        (np.zeros((8, 8, 7), np.uint8), None, None, "has shape"),
        (np.zeros((8, 8, 8), np.uint8), np.eye(4), None, "different affines"),
        (np.full((8, 8, 8), 3, np.uint8), None, (0, 1), r"holds the values \[3.0\]"),
        (np.full((8, 8, 8), 0.5, np.float32), None, None, "not labels"),
        (np.full((8, 8, 8), -1, np.int16), None, None, "not labels"),
        (np.full((8, 8, 8), np.nan, np.float32), None, None, "not labels"),
    ],
)
def test_bad_masks_are_errors_that_name_the_file(tmp_path, labels, affine, values, words):
    image, mask = write(tmp_path / "a.nii.gz", noise(8, 8, 8)), write(tmp_path / "m.nii.gz", labels, affine)
    with pytest.raises(DataError, match=words) as found:
        folder.read_case(folder.Case("a", image, mask), values=values)
    assert str(mask) in str(found.value)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    slices, grid = reading.read_scan(write(tmp_path / "a.nii.gz", noise(4, 5, 6)))
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


HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
ODD = {
    "i": [0, 1, 2, 3, 7, 8, 16, 64, 128, 255, 256, 512, 1792, 32767, -1, -32768],
    "f": [0, 1, -1, 1e-30, 1e30, 3e38, -3e38, np.nan, np.inf, -np.inf, 0.5, 352],
    "S": [b"", b"n+1", b"ni1", b"\xff\xff"],
}


@st.composite
def spoilt(draw):
    """The bytes of a NIfTI file, plain or gzipped, whose header, length or content is wrong in one to three ways."""
    header = HEADERS[draw(st.sampled_from(sorted(HEADERS)))](endianness=draw(st.sampled_from("<>")))
    kind = draw(st.sampled_from([np.uint8, np.int16, np.float32, np.float64]))
    header.set_data_dtype(kind)
    header.set_data_shape((6, 5, 4))
    header["vox_offset"] = header.single_vox_offset
    header.set_sform(np.diag([1.0, 2.0, 3.0, 1.0]), 2)
    header["magic"] = header.single_magic
    fields = header.structarr
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(fields.dtype.names)))
        odd = st.sampled_from(ODD.get(fields.dtype[name].base.kind, ODD["i"]))
        if fields.dtype[name].shape:
            fields[name][draw(st.integers(0, fields[name].size - 1))] = np.array(draw(odd)).astype(fields[name].dtype)
        else:
            fields[name] = np.array(draw(odd)).astype(fields.dtype[name])
    voxels = np.arange(120).astype(kind).tobytes()
    if draw(st.booleans()):
        voxels = draw(st.binary(min_size=len(voxels), max_size=len(voxels)))
    content = bytearray(fields.tobytes() + bytes(4) + voxels)
    places = st.tuples(st.floats(0, 0.999), st.integers(1, 255))
    for place, value in draw(st.lists(places, max_size=2)):
        content[int(place * len(content))] ^= value
    content = content[: int(draw(st.sampled_from([1, 1, 1, 0.99, 0.5, 0.1])) * len(content))]
    if draw(st.booleans()):
        return "a.nii", bytes(content)
    packed = bytearray(gzip.compress(bytes(content)))
    for place, value in draw(st.lists(places, max_size=1)):
        packed[int(place * len(packed))] ^= value
    return "a.nii.gz", bytes(packed)


@settings(
    max_examples=200,
    deadline=20000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(file=spoilt(), masked=st.booleans(), axis=st.integers(0, 2))
def test_whatever_is_in_a_file_it_is_read_whole_or_refused_by_name(tmp_path, file, masked, axis):
    """Finite slices that write back onto the stored voxels, or a DataError; within seconds and a few megabytes."""
    name, content = file
    image = write(tmp_path / "good.nii", noise(6, 5, 4))
    (tmp_path / name).write_bytes(content)
    case = folder.Case("a", image, tmp_path / name) if masked else folder.Case("a", tmp_path / name, None)
    tracemalloc.start()
    try:
        with warnings.catch_warnings(action="ignore"):
            (slices,), labels, grid = folder.read_case(case, axis)
    except DataError as error:
        assert name in str(error)
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6
    assert slices.dtype == np.float32 and slices.shape == grid.slices and np.isfinite(slices).all()
    assert np.isfinite(scaled(slices)).all() and np.isfinite(grid.spacing).all() and min(grid.spacing) > 0
    assert labels is None or (labels.shape == slices.shape and labels.dtype == np.uint8)
    folder.write_scan((slices > 0).astype(np.uint8), grid, tmp_path / "b.nii.gz")
    again, on = reading.read_scan(tmp_path / "b.nii.gz", axis)
    grid = grid.grid
    assert np.array_equal(again, slices > 0) and on.shape == grid.shape
    assert np.allclose(on.affine, grid.affine, rtol=1e-3, atol=1e-3 * np.abs(grid.affine).max())
