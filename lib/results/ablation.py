"""What each part of a method brings: its variants beside the method as it stands."""

import itertools

import numpy as np
import pandas as pd

from lib.methods.table import by_name
from lib.results import statistics
from lib.results.tables import as_markdown, figure, p_value


def ablation(per_image, rounds):
    """What each part of a method brings: joint+, or CCT-R, as it stands and with a part changed, over the same seeds.

    Args:
        per_image: rows of average_classes, variants among them.
        rounds: rows of rounds.csv, variants among them.

    Returns:
        pandas.DataFrame, one row per variant and class, and one of the whole method:

        - DSC and HD on the test images, of the method and of its companion (combined+, or CCT-R's second network);
        - DSC of fs with the same labelled images;
        - differences of DSC and HD from the whole method, of method and companion. Class ``mean`` has their p (Wilcoxon
          over subjects) and p_holm, corrected over the variants of the same method and rate;
        - the best validation DSC: of joint+'s rounds, or during the training of CCT-R.
    """
    test = per_image[statistics.tested_split(per_image["cohort"]) == "test"]
    ablated = {name: method.companion for name, method in by_name().items() if method.companion}
    rows = []
    for (cohort, recipe, rate, label), group in test.groupby(["cohort", "recipe", "rate", "class"], sort=False):
        for method, companion in ablated.items():
            own = group[group["method"] == method]
            variants = own.loc[own["variant"] != "", "variant"].unique()
            for variant in ["", *variants] if len(variants) else []:
                seeds = own.loc[(own["variant"] == variant) if variant else (own["variant"] != ""), "seed"].unique()
                chosen = group[(group["variant"] == variant) & group["seed"].isin(seeds)]
                score = lambda name, of: chosen.loc[chosen["method"] == name, of].mean()
                row = {
                    "cohort": cohort,
                    "recipe": recipe,
                    "rate": rate,
                    "method": method,
                    "variant": variant or "as it stands",
                    "class": label,
                    "seeds": len(seeds),
                    "fs dsc": score("fs", "dsc"),
                    "dsc": score(method, "dsc"),
                    "hd": score(method, "hd"),
                    "companion": companion,
                    "companion dsc": score(companion, "dsc"),
                    "companion hd": score(companion, "hd"),
                }
                whole = group[(group["variant"] == "") & group["seed"].isin(seeds)]
                both = ("", method), ("companion ", companion)
                for (prefix, name), metric in itertools.product(both, ("dsc", "hd")):
                    column = prefix + ("hd " if metric == "hd" else "")
                    difference, p = changed(chosen, whole, name, metric) if variant else (np.nan, np.nan)
                    row |= {f"{column}difference": difference, f"{column}p": p if label == "mean" else np.nan}
                measured = rounds[
                    (rounds["variant"] == variant)
                    & (rounds["stage"] == method)
                    & (rounds["rate"] == rate)
                    & (rounds["recipe"] == recipe)
                    & (rounds["split"] == "validation")
                    & rounds["seed"].isin(seeds)
                ]
                if label == "mean":
                    row["validation dsc"] = measured.groupby("seed")["dsc_segmentation"].max().mean()
                rows.append(row)
    if not rows:
        return pd.DataFrame(columns=["cohort", "recipe", "rate", "method", "variant", "class", "seeds"])
    table = pd.DataFrame(rows)
    for column in [column for column in table if column.endswith(" p") or column == "p"]:
        corrected = table.groupby(["cohort", "recipe", "rate", "method"])[column].transform(statistics.holm)
        table[f"{column}_holm"] = corrected
    return table


def changed(chosen, whole, method, metric):
    """By how much a variant changes a method, and the p value of the change.

    Args:
        chosen, whole: rows of one class on the same test images, of the variant and of the whole method.
        metric: dsc, or hd in pixels.

    Returns:
        (difference of the means over subjects, p of Wilcoxon's signed-rank test over subjects); NaN where one of the
        two lacks the method.
    """
    if method not in set(chosen["method"]) & set(whole["method"]):
        return np.nan, np.nan
    variant, reference = (statistics.per_subject(frame, metric)[method] for frame in (chosen, whole))
    return float((variant - reference).mean()), statistics.wilcoxon(variant, reference)[0]


def ablation_markdown(table):
    """The ablation for reading; says so where it has not been run. A single class would repeat ``mean``."""
    if not len(table):
        return "The ablation has not been run: `dvc exp run -S 'grid.variants=[no pairs]'`, see params.yaml.\n"
    several = table["class"].nunique() > 2
    rows = []
    for _, row in table[(table["class"] == "mean") | several].iterrows():
        rows.append(
            {
                "cohort": row["cohort"],
                "rate": f"{row['rate']:g} %",
                "method": row["method"],
                "variant": row["variant"],
                **({"class": row["class"]} if several else {}),
                "seeds": row["seeds"],
                "validation DSC": figure(row["validation dsc"], 3),
                "fs DSC": figure(row["fs dsc"], 3),
                "DSC": figure(row["dsc"], 3),
                "HD (px)": figure(row["hd"], 2),
                "difference of DSC": "" if pd.isna(row["difference"]) else f"{row['difference']:+.4f}",
                "p": p_value(row["p_holm"]),
                "p of HD": p_value(row["hd p_holm"]),
                "combined+ or cctr-b: DSC": figure(row["companion dsc"], 3),
                "HD": figure(row["companion hd"], 2),
                "its p": p_value(row["companion p_holm"]),
                "its p of HD": p_value(row["companion hd p_holm"]),
            }
        )
    return as_markdown(rows)
