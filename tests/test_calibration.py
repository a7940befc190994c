import numpy as np
import pandas as pd
import pytest
import torch

from lib.results import calibration


def test_probabilities_that_are_frequencies_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20, 1, 64, 64, generator=generator)
    truth = (torch.rand(p.shape, generator=generator) < p).float()
    bins = calibration.reliability(p, truth)
    assert bins["n"].sum() == p.numel() and len(bins) == calibration.BINS
    found = calibration.errors(bins)
    assert found["ece"] < 0.01
    assert found["brier"] == pytest.approx(1 / 6, abs=0.01)  # the integral of p (1 - p)
    assert found["brier"] == pytest.approx(float(((p - truth) ** 2).mean()), abs=1e-6)


def test_a_hand_made_case():
    p = torch.tensor([0.9, 0.9, 0.02, 0.02]).reshape(1, 1, 2, 2)
    truth = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    found = calibration.errors(calibration.reliability(p, truth))
    assert found["ece"] == pytest.approx((2 * 0.4 + 2 * 0.02) / 4)
    assert found["ece_marked"] == pytest.approx(0.4)
    assert found["brier_marked"] == pytest.approx((0.01 + 0.81) / 2)


def test_certainty_stays_in_the_last_bin():
    bins = calibration.reliability(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
    assert len(bins) == 1 and bins.loc[0, "n"] == 16 and bins.loc[0, "high"] == 1


def test_pooling_is_the_reliability_of_all_pixels_together():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(4, 1, 16, 16, generator=generator)
    truth = (torch.rand(p.shape, generator=generator) < 0.5).float()
    parts = pd.concat([calibration.reliability(p[:1], truth[:1]), calibration.reliability(p[1:], truth[1:])])
    pd.testing.assert_frame_equal(calibration.pool(parts), calibration.reliability(p, truth), check_dtype=False)


SHAPES = {
    "straight": lambda confidence: 2.5 * (confidence - 0.6),
    "levels_off": lambda confidence: 0.88 - 6 * np.maximum(0, 0.88 - confidence),
}


def held_out(shape, cases, rng, scatter_of_cases, scatter_of_views=0.03):
    """Rows for predict_dsc: views of ``cases`` cases whose DSC follows ``shape``, and the shift of one more case."""
    shifts, rows = rng.normal(0, scatter_of_cases, cases + 1), []
    for number in range(cases):
        x = np.linspace(0.95, 0.8, 21) + rng.normal(0, 0.008, 21)
        y = shape(x) + shifts[number] + rng.normal(0, scatter_of_views, 21)
        rows += zip([number] * 21, x, np.clip(y, 0, 1))
    return rows, shifts[-1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cases", [19, 20, 40, 100])
@pytest.mark.parametrize("scatter_of_cases", [0.02, 0.1])
def test_the_interval_holds_19_of_20_new_cases(shape, cases, scatter_of_cases):
    """Views scatter by 0.03."""
    rng, inside, trials, errors = np.random.default_rng(0), 0, 400, []
    for _ in range(trials):
        rows, shift = held_out(SHAPES[shape], cases, rng, scatter_of_cases)
        x = 0.95 + rng.normal(0, 0.008)
        predicted, low, high = calibration.predict_dsc(rows, x)
        true = SHAPES[shape](x) + shift + rng.normal(0, 0.03)
        inside += low <= np.clip(true, 0, 1) <= high
        errors.append(predicted - min(1, true))
    assert inside / trials >= 0.925  # 0.95, less what 400 trials leave open
    assert abs(np.mean(errors)) < 0.03


@pytest.mark.parametrize("cases", [1, 2, 18])
def test_no_interval_is_promised_that_the_held_out_cases_cannot_support(cases):
    rows, _ = held_out(SHAPES["levels_off"], cases, np.random.default_rng(0), 0.02)
    predicted, low, high = calibration.predict_dsc(rows, 0.93)
    assert 0 < predicted < 1 and np.isnan([low, high]).all()
    assert np.isnan(calibration.predict_dsc([], 0.93)).all()


def test_beyond_what_was_seen_the_prediction_goes_on_as_confidence_does():
    """DSC that levels off: a line through these rows foretells 1 at confidence 0.9."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, _ = held_out(SHAPES["levels_off"], 2, rng, 0.02)
        foretold = lambda x, rows=rows: calibration.predict_dsc(rows, x)[0]
        low, high = min(x for _, x, _ in rows), max(x for _, x, _ in rows)
        assert foretold(high) == pytest.approx(0.88, abs=0.08)
        assert foretold(high + 0.03) == pytest.approx(foretold(high) + 0.03) and foretold(2) == 1
        assert foretold(low - 0.03) == pytest.approx(foretold(low) - 0.03) and foretold(-1) == 0
        assert (np.diff([foretold(x) for x in np.linspace(0.7, 1, 31)]) > -1e-9).all()


def test_confidence_that_orders_masks_by_quality_finds_the_worst():
    dsc = np.linspace(0.5, 0.9, 20)
    assert calibration.quality_control(dsc / 2, dsc) == {"spearman": pytest.approx(1), "auroc_worst_tenth": 1}
    assert calibration.quality_control(-dsc, dsc) == {"spearman": pytest.approx(-1), "auroc_worst_tenth": 0}
    assert np.isnan(calibration.quality_control(np.ones(20), dsc)["spearman"])
