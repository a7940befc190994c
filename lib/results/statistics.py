"""Statistics over test subjects: paired tests with effect sizes, Holm's correction and bootstrap intervals.

Slices of one subject look alike and are not independent observations. Every test here therefore works on one
value per subject: the mean over the subject's test slices, and over seeds, since all seeds test the same subjects.
"""

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 10_000
SCORES = ("dsc", "hd", "hd95")
FURTHER = {"test": "", "unseen": ", unseen anatomy", "external": ", external"}  # in a cohort's title, by split
IMAGE = ["seed", "subject", "slice"]  # only images that both methods have are compared


def tested_split(titles):
    """Which split of FURTHER every title of a cohort (a pandas.Series) names."""
    found = pd.Series("test", titles.index)
    for split, mark in FURTHER.items():
        if mark:
            found[titles.str.contains(mark, regex=False)] = split
    return found


def average_classes(per_image):
    """``per_image`` with a row of class ``mean`` per image and method added: the average over foreground classes."""
    averaged = {**dict.fromkeys((*SCORES, "confidence"), "mean"), "empty": "any"}
    keys = [c for c in per_image.columns if c != "class" and c not in averaged]
    means = per_image.groupby(keys, sort=False, as_index=False, dropna=False).agg(averaged)
    return pd.concat([means.assign(**{"class": "mean"}), per_image], ignore_index=True)[per_image.columns]


def per_subject(per_image, metric):
    """One value per subject and method.

    Args:
        per_image: rows of one cohort, recipe and rate and of class ``mean``, of any number of seeds.
        metric: a column: dsc, hd or hd95.

    Returns:
        pandas.DataFrame, one row per subject, one column per method.
    """
    by_slice = per_image.groupby(["method", "subject", "slice"])[metric].mean()
    return by_slice.groupby(["method", "subject"]).mean().unstack("method")


def wilcoxon(first, second):
    """Wilcoxon signed-rank test of paired values, two-sided.

    Args:
        first, second: one value per subject.

    Returns:
        (p, effect): effect is the matched-pairs rank-biserial correlation in [-1, 1], positive where ``first`` is
        larger. p is 1 and effect 0 where all pairs are equal.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    difference = difference[difference != 0]
    if len(difference) == 0:
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(difference))
    return float(stats.wilcoxon(difference).pvalue), float((ranks * np.sign(difference)).sum() / ranks.sum())


def holm(p):
    """p values adjusted by Holm's step-down method, in the order given; NaN stays NaN and does not count."""
    p = np.asarray(p, float)
    adjusted, order = p.copy(), [i for i in np.argsort(p) if not np.isnan(p[i])]
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def interval(values, level=0.95):
    """Percentile bootstrap interval of the mean of one value per subject: (low, high)."""
    values = np.asarray(values, float)
    if len(values) < 2 or values.min() == values.max():
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return tuple(map(float, found.confidence_interval))


def interval_of_few(values, level=0.95):
    """Student's t interval of the mean of a few values, (low, high); NaN where there is one alone."""
    if len(values) < 2:
        return np.nan, np.nan
    reach = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def compare(per_image, pairs, metrics=("dsc", "hd")):
    """Paired comparisons of methods on the same test subjects.

    Args:
        per_image: rows of ``evaluation.evaluate`` with those of class ``mean``; any cohorts, recipes and rates.
        pairs: (method, reference) to compare, where both are there.
        metrics: columns to compare.

    Returns:
        pandas.DataFrame, one row per cohort, recipe, rate, metric and pair: n_subjects, n_seeds, difference (method
        minus reference) with its 95 % bootstrap interval over subjects (low, high) and its t interval over seeds
        (seeds_low, seeds_high; NaN with one), the subjects in which the method has the larger and the smaller value
        (n_larger, n_smaller), effect, p, and p_holm, corrected over the comparisons of the same cohort and metric.
        Both methods of a pair are taken with the images and the seeds that both have.
    """
    rows = []
    mean = per_image[per_image["class"] == "mean"]
    for (cohort, recipe, rate), group in mean.groupby(["cohort", "recipe", "rate"], sort=False):
        methods = set(group["method"])
        for metric in metrics:
            for method, reference in pairs:
                if not {method, reference} <= methods or method == reference:
                    continue
                chosen = group[group["method"].isin((method, reference))]
                chosen = chosen[chosen.groupby(IMAGE)["method"].transform("nunique") == 2]
                if chosen.empty:
                    continue
                both = per_subject(chosen, metric)[[method, reference]].dropna()
                p, effect = wilcoxon(both[method], both[reference])
                gain = both[method] - both[reference]
                low, high = interval(gain)
                by_seed = [per_subject(rows_of_seed, metric) for _, rows_of_seed in chosen.groupby("seed")]
                seeds_low, seeds_high = interval_of_few([(one[method] - one[reference]).mean() for one in by_seed])
                rows.append(
                    {
                        "cohort": cohort,
                        "recipe": recipe,
                        "rate": rate,
                        "metric": metric,
                        "method": method,
                        "reference": reference,
                        "n_subjects": len(both),
                        "n_seeds": chosen["seed"].nunique(),
                        "difference": float(gain.mean()),
                        "low": low,
                        "high": high,
                        "seeds_low": seeds_low,
                        "seeds_high": seeds_high,
                        "n_larger": int((gain > 0).sum()),
                        "n_smaller": int((gain < 0).sum()),
                        "effect": effect,
                        "p": p,
                    }
                )
    found = pd.DataFrame(rows)
    if len(found):
        found["p_holm"] = found.groupby(["cohort", "metric"])["p"].transform(holm)
    return found
