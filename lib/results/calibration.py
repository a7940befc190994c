"""Whether confidence can be trusted: reliability of mask probabilities, and confidence as quality control."""

import math

import numpy as np
import pandas as pd

BINS = 20
GROUPS = 10  # of views by confidence, through whose means the curve of predict_dsc goes
SMALLEST_GROUP = 3  # views: the mean of fewer says more of their scatter than of confidence
SUPPORTED = 19  # held-out cases that a 95 % interval takes
MARKED = 1  # first bin that counts as marked: probabilities from 0.05


def reliability(masks, truth):
    """How often pixels of a given probability are truly foreground, classes pooled.

    Args:
        masks, truth: ``(images, classes, height, width)`` in [0, 1].

    Returns:
        pandas.DataFrame, one row per bin that holds pixels: low, high, n, probability (mean), frequency (of true
        foreground) and brier (mean squared difference).
    """
    p = masks.double().cpu().numpy().ravel()
    y = (truth > 0.5).double().cpu().numpy().ravel()
    which = np.clip((p * BINS).astype(int), 0, BINS - 1)
    total = lambda values=None: np.bincount(which, values, minlength=BINS)
    n, low = total(), np.arange(BINS) / BINS
    sums = {"probability": total(p), "frequency": total(y), "brier": total((p - y) ** 2)}
    means = {name: values / np.maximum(n, 1) for name, values in sums.items()}
    frame = pd.DataFrame({"low": low, "high": low + 1 / BINS, "n": n, **means})
    return frame[frame["n"] > 0].reset_index(drop=True)


def pool(bins):
    """Reliability of several experiments as one: rows of the same bin are averaged, weighted by their pixels."""
    weighted = bins[["probability", "frequency", "brier"]].mul(bins["n"], axis=0).assign(n=bins["n"])
    summed = weighted.groupby([bins["low"], bins["high"]]).sum()
    return (
        summed.div(summed["n"], axis=0)
        .assign(n=summed["n"])
        .reset_index()[["low", "high", "n", "probability", "frequency", "brier"]]
    )


def errors(bins):
    """Expected calibration error and Brier score of reliability rows, over all pixels and over the marked ones.

    Most pixels are certain background, so any score over all pixels looks good. The marked ones are those whose
    own probability is at least 0.05.
    """
    found = {}
    for suffix, rows in (("", bins), ("_marked", bins[bins["low"] >= MARKED / BINS - 1e-9])):
        share = rows["n"] / max(1, rows["n"].sum())
        found[f"ece{suffix}"] = float((share * (rows["probability"] - rows["frequency"]).abs()).sum())
        found[f"brier{suffix}"] = float((share * rows["brier"]).sum())
    return found


def quality_control(confidence, dsc):
    """Whether low confidence finds bad masks.

    Args:
        confidence, dsc: one value per test image.

    Returns:
        Dictionary: spearman, the rank correlation of the two, and auroc_worst_tenth, the probability that an image
        of the tenth with the lowest DSC has a lower confidence than one of the others. NaN where all are equal.
    """
    from scipy import stats  # not above: every notebook imports this module, few call this, and it takes a second

    confidence, dsc = np.asarray(confidence, float), np.asarray(dsc, float)
    worst = stats.rankdata(dsc, method="ordinal") <= max(1, round(len(dsc) / 10))
    if len(dsc) < 2 or np.ptp(confidence) == 0 or np.ptp(dsc) == 0:
        return {"spearman": np.nan, "auroc_worst_tenth": np.nan}
    larger = stats.mannwhitneyu(confidence[~worst], confidence[worst]).statistic
    return {
        "spearman": float(stats.spearmanr(confidence, dsc).statistic),
        "auroc_worst_tenth": float(larger / (worst.sum() * (~worst).sum())),
    }


def predict_dsc(pairs, confidence):
    """The DSC that a mask of this confidence is likely to have, with a 95 % prediction interval.

    Held-out cases and worse views of them are grouped into tenths by confidence. A curve through the groups' means that
    may not fall as confidence rises (isotonic regression) predicts the DSC. Confidence is itself an expected DSC: so
    beyond the outermost means the curve goes on as confidence does. The interval reaches as far as the errors of 95 %
    of the held-out cases themselves (conformal prediction, Vovk et al. 2005). It supposes that a new case is like
    these, and nothing else. It takes SUPPORTED of them: of fewer even the largest error is exceeded by more than one
    new case in twenty.

    Args:
        pairs: rows of (number of the case, or of the subject that cases are of, confidence, DSC); the first row of
            every number is no worse view.
        confidence: in [0, 1].

    Returns:
        (predicted, low, high), in [0, 1]; NaN where there is no row, or low and high where there are too few cases.
    """
    from scipy import optimize  # as above

    case, x, y = np.asarray(pairs, float).reshape(-1, 3).T
    n = len(x)
    if n == 0:
        return np.nan, np.nan, np.nan
    groups = np.array_split(np.argsort(x, kind="stable"), np.clip(n // SMALLEST_GROUP, 1, GROUPS))
    fit = optimize.isotonic_regression([y[rows].mean() for rows in groups], weights=[len(rows) for rows in groups])
    at = np.array([x[rows].mean() for rows in groups])
    curve = lambda where: np.clip(np.interp(where, at, fit.x) + where - np.clip(where, at[0], at[-1]), 0, 1)
    predicted = float(curve(confidence))
    _, own = np.unique(case, return_index=True)
    errors = np.sort(np.abs(y[own] - curve(x[own])))
    if len(errors) < SUPPORTED:
        return predicted, np.nan, np.nan
    reach = errors[math.ceil(0.95 * (len(errors) + 1)) - 1]
    return tuple(float(value) for value in np.clip((predicted, predicted - reach, predicted + reach), 0, 1))
