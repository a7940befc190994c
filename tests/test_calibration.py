import numpy as np
import pandas as pd
import pytest
import torch

from lib import calibration


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


@pytest.mark.parametrize("cases", [1, 2, 5, 20])
@pytest.mark.parametrize("scatter_of_cases", [0.02, 0.06, 0.1])
def test_the_interval_holds_19_of_20_new_cases_however_few_were_held_out(cases, scatter_of_cases):
    """Views scatter by 0.03. With one or two cases nothing shows that cases differ three times as much, if they do."""
    rng, inside, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        shifts, rows = rng.normal(0, scatter_of_cases, cases + 1), []
        for number in range(cases):
            x = np.linspace(0.95, 0.8, 21)
            rows += [(number, *row) for row in zip(x, 2.5 * (x - 0.6) + shifts[number] + rng.normal(0, 0.03, 21))]
        _, low, high = calibration.predict_dsc(rows, 0.93)
        inside += low <= min(1, 2.5 * (0.93 - 0.6) + shifts[-1] + rng.normal(0, 0.03)) <= high
    assert inside / trials >= (0.85 if cases < 5 and scatter_of_cases == 0.1 else 0.93)


def test_confidence_that_orders_masks_by_quality_finds_the_worst():
    dsc = np.linspace(0.5, 0.9, 20)
    assert calibration.quality_control(dsc / 2, dsc) == {"spearman": pytest.approx(1), "auroc_worst_tenth": 1}
    assert calibration.quality_control(-dsc, dsc) == {"spearman": pytest.approx(-1), "auroc_worst_tenth": 0}
    assert np.isnan(calibration.quality_control(np.ones(20), dsc)["spearman"])
