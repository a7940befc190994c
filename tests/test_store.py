import numpy as np
import pytest

from lib.scans.reading import store


def slices(seed, count=3, size=8):
    return np.random.default_rng(seed).random((count, 1, size, size))


def test_what_goes_in_comes_out_after_reopening(tmp_path):
    first = store.Store(tmp_path / "s")
    first.add("a", "1", slices(0), np.full((3, 8, 8), 2))
    first.add("b", "1", slices(1, count=1))
    again = store.Store(tmp_path / "s")
    assert np.allclose(again.images("a"), slices(0), atol=1e-3) and again.images("b").shape == (1, 1, 8, 8)
    assert (again.labels("a") == 2).all() and again.labels("b") is None
    assert again.has("a", "1") and not again.has("a", "2") and not again.has("c", "1")


def test_a_changed_case_replaces_the_old_one(tmp_path):
    first = store.Store(tmp_path)
    first.add("a", "1", slices(0))
    first.add("b", "1", slices(1))
    first.add("a", "2", slices(2, count=5))
    again = store.Store(tmp_path)
    assert again.images("a").shape == (5, 1, 8, 8) and np.allclose(again.images("b"), slices(1), atol=1e-3)


def test_a_crash_between_slices_and_index_loses_only_that_case(tmp_path):
    first = store.Store(tmp_path)
    first.add("a", "1", slices(0))
    with open(tmp_path / "images.bin", "ab") as stream:
        stream.write(b"half a case")
    with open(tmp_path / "index.jsonl", "a") as stream:
        stream.write('{"name": "b", "finger')
    again = store.Store(tmp_path)
    assert list(again.index) == ["a"]
    again.add("b", "1", slices(1))
    for name, seed in (("a", 0), ("b", 1)):
        assert np.allclose(store.Store(tmp_path).images(name), slices(seed), atol=1e-3)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    first = store.Store(tmp_path)
    first.add("a", "1", slices(0))
    before = (tmp_path / "images.bin").stat().st_size

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            first.add("b", "1", slices(1))
    assert (tmp_path / "images.bin").stat().st_size == before and "b" not in first.index
    first.add("b", "1", slices(1))
    assert np.allclose(store.Store(tmp_path).images("b"), slices(1), atol=1e-3)


def test_every_case_has_a_shape_of_its_own_and_volumes_are_one_image(tmp_path):
    first = store.Store(tmp_path)
    volume = np.random.default_rng(0).random((1, 2, 4, 6, 5))
    first.add("slices", "1", slices(0, count=2))
    first.add("volume", "1", volume, np.ones((1, 4, 6, 5)))
    again = store.Store(tmp_path)
    assert again.images("slices").shape == (2, 1, 8, 8) and again.labels("volume").shape == (1, 4, 6, 5)
    assert np.allclose(again.images("volume"), volume, atol=1e-3) and again.has("volume", "1")


def cut(file, keep):
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 255
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["images.bin", "labels.bin", "index.jsonl"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: cut(f, 0),
        lambda f: cut(f, 0.4),
        lambda f: cut(f, 0.9),
        lambda f: flip(f, 0.1),
        lambda f: flip(f, 0.5),
        lambda f: f.unlink(),
        lambda f: f.write_text("what?\n{}\n[]\n"),
    ],
)
def test_what_was_cut_or_changed_on_disk_is_not_there_and_is_added_again(tmp_path, file, spoil):
    first = store.Store(tmp_path)
    for k, name in enumerate("bca"):  # as after a change of a
        first.add(name, "1", slices(k), np.full((3, 8, 8), k))
    spoil(tmp_path / file)
    again, missing = store.Store(tmp_path), 0
    for name in "abc":  # as they are read: what is appended must not be taken for what was cut off
        k = "bca".index(name)
        if not again.has(name, "1"):
            missing += 1
            again.add(name, "1", slices(k), np.full((3, 8, 8), k))
    last = store.Store(tmp_path)
    assert missing and all(last.has(name, "1") for name in "abc")
    for k, name in enumerate("bca"):
        assert np.allclose(last.images(name), slices(k), atol=1e-3) and (last.labels(name) == k).all()
