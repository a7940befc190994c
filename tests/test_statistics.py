import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib.results import statistics


def test_wilcoxon_is_scipys_and_its_effect_has_the_sign_of_the_difference():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.9, 0.05, 20), rng.normal(0.85, 0.05, 20)
    p, effect = statistics.wilcoxon(first, second)
    assert p == pytest.approx(stats.wilcoxon(first, second).pvalue)
    assert statistics.wilcoxon(second, first) == (pytest.approx(p), pytest.approx(-effect))


def test_effect_size_of_a_hand_made_case():
    # differences 1, 2, 3, -4: ranks 1, 2, 3, 4, so (6 - 4) / 10
    assert statistics.wilcoxon([1, 2, 3, 0], [0, 0, 0, 4])[1] == pytest.approx(0.2)
    assert statistics.wilcoxon([1, 2, 3], [0, 0, 0])[1] == 1


def test_equal_values_are_no_difference():
    assert statistics.wilcoxon([0.5, 0.6], [0.5, 0.6]) == (1.0, 0.0)


def test_holm_of_a_hand_made_case():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    found = statistics.holm([0.02, np.nan, 0.01])
    assert found[[0, 2]] == pytest.approx([0.02, 0.02]) and np.isnan(found[1])


def test_interval_holds_the_mean_and_narrows_with_more_subjects():
    values = np.random.default_rng(0).normal(0.9, 0.05, 400)
    low, high = statistics.interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 20, rel=0.15)
    few = statistics.interval(values[:20])
    assert few[1] - few[0] > high - low
    assert statistics.interval([0.7, 0.7, 0.7]) == (pytest.approx(0.7), pytest.approx(0.7))


def rows(method, values, seed=1):
    """Two slices for each of three subjects."""
    return [
        {
            "cohort": "c",
            "recipe": "strong",
            "rate": 1,
            "seed": seed,
            "method": method,
            "class": "mean",
            "subject": f"s{k // 2}",
            "slice": k,
            "dsc": value,
            "hd": 10 * (1 - value),
        }
        for k, value in enumerate(values)
    ]


def test_slices_and_seeds_are_averaged_within_a_subject_first():
    first, second = [0.1, 0.3, 0.5, 0.5, 0.9, 0.7], [0.3, 0.5, 0.5, 0.5, 0.9, 0.7]
    frame = pd.DataFrame(rows("fs", first) + rows("fs", second, seed=2))
    values = statistics.per_subject(frame, "dsc")["fs"]
    assert values.to_dict() == pytest.approx({"s0": 0.3, "s1": 0.5, "s2": 0.8})


def test_comparison_has_one_row_per_pair_and_metric():
    frame = pd.DataFrame(rows("fs", [0.1, 0.3, 0.5, 0.5, 0.9, 0.7]) + rows("joint", [0.3, 0.5, 0.6, 0.6, 0.9, 0.9]))
    found = statistics.compare(frame, [("joint", "fs"), ("fs", "fs"), ("mt", "fs")])
    assert list(found["metric"]) == ["dsc", "hd"] and (found["n_subjects"] == 3).all()
    dsc = found.iloc[0]
    assert dsc["difference"] == pytest.approx((0.2 + 0.1 + 0.1) / 3)
    assert dsc["low"] <= dsc["difference"] <= dsc["high"] and dsc["effect"] == 1 and found.iloc[1]["effect"] == -1
    assert (found["p_holm"] == found["p"]).all()  # one comparison per metric: nothing to correct


def test_only_seeds_that_both_methods_have_are_compared():
    fs, joint = [0.1, 0.3, 0.5, 0.5, 0.9, 0.7], [0.3, 0.5, 0.6, 0.6, 0.9, 0.9]
    frame = pd.DataFrame(rows("fs", fs) + rows("joint", joint) + rows("fs", [0.0] * 6, seed=2))
    found = statistics.compare(frame, [("joint", "fs")], ["dsc"]).iloc[0]
    assert found["difference"] == pytest.approx((0.2 + 0.1 + 0.1) / 3) and found["n_seeds"] == 1


def test_only_images_that_both_methods_have_are_compared():
    fs, joint = [0.1, 0.3, 0.5, 0.5, 0.9, 0.7], [0.3, 0.5, 0.6, 0.6, 0.9, 0.9]
    fewer = pd.DataFrame(rows("joint", joint)).drop(index=[1, 3])  # one slice of the first subject, of the second
    found = statistics.compare(pd.concat([pd.DataFrame(rows("fs", fs)), fewer]), [("joint", "fs")], ["dsc"]).iloc[0]
    assert found["difference"] == pytest.approx((0.2 + 0.1 + 0.1) / 3) and found["n_subjects"] == 3


def test_a_comparison_counts_subjects_and_knows_how_seeds_differ():
    """Three seeds with gains of 0.1, 0.2 and 0.3 in every subject but one, which loses as much."""
    rows = []
    for seed, gain in ((1, 0.1), (2, 0.2), (3, 0.3)):
        for k in range(5):
            for method, dsc in (("fs", 0.5), ("joint", 0.5 + gain * (-1 if k == 4 else 1))):
                rows.append(
                    {
                        "cohort": "a",
                        "recipe": "paper",
                        "rate": 1,
                        "seed": seed,
                        "class": "mean",
                        "subject": f"s{k}",
                        "slice": k,
                        "method": method,
                        "dsc": dsc,
                    }
                )
    found = statistics.compare(pd.DataFrame(rows), [("joint", "fs")], ["dsc"]).iloc[0]
    assert (found["n_larger"], found["n_smaller"]) == (4, 1)
    gains = 0.6 * np.array([0.1, 0.2, 0.3])
    expected = stats.t.interval(0.95, 2, gains.mean(), stats.sem(gains))
    assert (found["seeds_low"], found["seeds_high"]) == pytest.approx(expected)
    single = statistics.compare(pd.DataFrame(rows).query("seed == 1"), [("joint", "fs")], ["dsc"]).iloc[0]
    assert np.isnan(single["seeds_low"]) and np.isnan(single["seeds_high"])
