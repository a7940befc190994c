"""Which cases to draw next."""

import numpy as np
import pytest

from lib.scans.drawing_next import SIDES, draw_next, ranked, thumbnail


def at(*angles):
    """Views on a circle: their GNCC is the cosine of the angle between them."""
    return np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)


def test_a_thumbnail_says_how_alike_cases_are_whatever_their_brightness():
    rng = np.random.default_rng(1)
    volume, other = rng.random((2, 1, 2, 20, 24, 28))
    for images in (volume, volume.transpose(2, 1, 0, 3, 4)[:, :, 0]):  # a volume of two channels, and slices
        view = thumbnail(images)
        assert view.shape == (np.prod(SIDES),) and np.isclose(view @ view, 1, atol=1e-4)
        assert np.allclose(view, thumbnail(3 * images + 5), atol=1e-4)
    assert thumbnail(volume) @ thumbnail(other) < 0.5
    assert np.allclose(thumbnail(volume), thumbnail(np.concatenate((volume[:, :1], other[:, 1:]), axis=1)))


def test_the_case_that_is_least_like_the_drawn_ones_comes_first_and_then_what_is_unlike_it():
    views = at(0, 10, 170, 90, 175)
    drawn = np.array([True, False, False, False, False])
    confidence = np.array([0.9, 0.5, 0.6, 0.7, 0.8])
    everything = np.array([np.nan, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9])
    assert ranked(views, drawn, confidence) == [2, 1]  # the other two are the confident half
    more = np.concatenate((views, at(180, 180, 180, 180)))
    assert ranked(more, np.arange(9) == 0, everything) == [4, 3, 1, 2]  # 175 degrees away, then 85, 10 and 5
    assert ranked(more, np.arange(9) == 0, everything, most=2) == [4, 3]


def test_what_was_not_segmented_is_no_candidate_and_without_a_drawn_case_the_least_confident_is_first():
    views, nobody = at(0, 90, 100, 180), np.zeros(4, bool)
    assert ranked(views, nobody, np.array([0.9, 0.5, 0.6, 0.95])) == [1, 2]
    assert ranked(views, nobody, np.array([0.9, np.nan, 0.6, 0.95])) == [2, 0]
    assert ranked(views, ~nobody, np.ones(4)) == [] and ranked(views, nobody, np.full(4, np.nan)) == []


@pytest.mark.parametrize("drawn", [(), (0,)])
def test_ranks_are_written_into_the_rows_of_cases_that_could_be_read(drawn):
    rng = np.random.default_rng(2)
    images = {f"case {k}": rng.random((1, 1, 9, 9, 9)) for k in range(5)}
    rows = [{"case": name, "labelled": k in drawn, "confidence": 0.5 + k / 10} for k, name in enumerate(images)]
    rows += [{"case": "spoilt", "status": "failed"}, {"case": "case 4", "labelled": False, "status": "kept"}]
    draw_next(rows, images.get)
    found = {row["case"]: row["draw_next"] for row in rows if "draw_next" in row}
    assert sorted(found.values()) == list(range(1, len(found) + 1))
    assert set(found) <= {f"case {k}" for k in range(3)} - {f"case {k}" for k in drawn} and len(found) >= 2
    draw_next(rows[5:6], images.get)  # a folder in which nothing could be read
