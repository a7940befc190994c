"""Tables: Table 1 with its statistics, what holds in words, calibration."""

import numpy as np
import pandas as pd

from lib.methods import table as methods
from lib.results import calibration, statistics
from lib.results.statistics import SCORES
from lib.runs.params import RECIPES

GROUP = ["cohort", "recipe", "method", "class", "rate", "n_labelled"]


def in_order(table):
    """Rows by cohort, recipe, rate, class and method, as a reader expects them."""
    rank = {name: number for number, name in enumerate([*RECIPES, *methods.by_name()])}
    key = lambda column: (
        column.map(rank).fillna(99)
        if column.name in ("recipe", "method")
        else (column != "mean" if column.name == "class" else column)
    )
    return table.sort_values(["cohort", "recipe", "rate", "class", "method"], key=key, kind="stable", ignore_index=True)


def compare(per_image):
    """Paired tests of every method against the baseline, then of those that the table of methods names beside it.

    See statistics.compare. Untrained methods, which have no recipe, are compared with the baseline of every recipe.
    Rows are in the order of recipes and rates, whatever the order of the results.

    Args:
        per_image: rows of class ``mean`` among them (average_classes), without variants.
    """
    untrained = per_image["recipe"] == "-"
    recipes = per_image.loc[~untrained, "recipe"].unique()
    copies = [per_image[untrained].assign(recipe=recipe) for recipe in recipes]
    together = pd.concat([per_image[~untrained], *copies]).sort_values(["recipe", "rate"], kind="stable")
    baseline, *others = methods.METHODS
    pairs = [(method.name, baseline.name) for method in others]
    pairs += [(method.name, other) for method in methods.METHODS for other in method.compared_with]
    return statistics.compare(together, pairs, SCORES)


def table1(per_image, comparisons):
    """Table 1: mean and standard deviation over test images, of every seed and over all seeds.

    Args:
        per_image: rows of average_classes, without variants.
        comparisons: of ``compare``.

    Returns:
        pandas.DataFrame. Rows with seed ``all`` are over all n_seeds: means and sd over test images and seeds, and
        dsc_seed_sd, hd_seed_sd, the sd of the seeds' means. Those of class ``mean`` also have

        - dsc_low, dsc_high: the 95 % interval of the DSC over subjects;
        - p_fs, p_fs_holm, effect_fs: the test against fs of the same recipe, of the DSC and, ending in ``_hd``, of HD;
        - p_mt, difference_mt, effect_mt: the same of combined against mt;
        - star: the paper's, p_mt below 0.05, uncorrected. The arrow points up if combined is better (higher DSC, lower
          HD). It goes by the ranks that are tested (effect_mt): single subjects can turn the means, but not these;
        - rounds: which round was tested, seed by seed.

        The classical reference has no recipe. Its tests against fs of either recipe are in ``comparisons`` alone.
    """
    summary = {"n_test": ("dsc", "size"), "n_empty": ("empty", "sum")}
    for name in SCORES:
        summary |= {f"{name}_mean": (name, "mean"), f"{name}_sd": (name, "std")}
    by_seed = per_image.groupby([*GROUP, "seed"], sort=False).agg(**summary).reset_index()
    overall = per_image.groupby(GROUP, sort=False).agg(**summary, n_seeds=("seed", "nunique")).reset_index()
    rounds = per_image.sort_values("seed").drop_duplicates([*GROUP, "seed"]).groupby(GROUP, sort=False)["round"]
    joined = rounds.agg(lambda numbers: ", ".join(f"{number:g}" for number in numbers))
    overall = overall.merge(joined.rename("rounds").reset_index(), on=GROUP)
    overall["n_test"] //= overall["n_seeds"]
    spread = by_seed.groupby(GROUP, sort=False)[["dsc_mean", "hd_mean"]].std().reset_index()
    overall = overall.merge(spread.rename(columns={"dsc_mean": "dsc_seed_sd", "hd_mean": "hd_seed_sd"}), on=GROUP)
    overall = overall.merge(intervals(per_image), on=["cohort", "recipe", "rate", "method", "class"], how="left")
    keys = ["cohort", "recipe", "rate", "method"]
    if not len(comparisons):
        comparisons = pd.DataFrame(columns=[*keys, "metric", "reference", "difference", "p", "p_holm", "effect"])
    columns = {
        "fs": {"p": "p_fs", "p_holm": "p_fs_holm", "effect": "effect_fs"},
        "mt": {"p": "p_mt", "difference": "difference_mt", "effect": "effect_mt"},
    }
    for metric, ending, better in (("dsc", "", 1), ("hd", "_hd", -1)):
        tested = comparisons[comparisons["metric"] == metric]
        for reference, names in columns.items():
            ours = {theirs: name + ending for theirs, name in names.items()}
            rows = tested[tested["reference"] == reference][[*keys, *ours]].rename(columns=ours)
            overall = overall.merge(rows.assign(**{"class": "mean"}), on=[*keys, "class"], how="left")
        direction = np.where(better * overall[f"effect_mt{ending}"].astype(float) > 0, "*↑", "*↓")
        overall[f"star{ending}"] = np.where(overall[f"p_mt{ending}"].astype(float) < 0.05, direction, "")
    whole = pd.concat([overall.assign(seed="all"), by_seed.assign(n_seeds=1)], ignore_index=True)
    ordered = [
        "cohort",
        "method",
        "recipe",
        "class",
        "rate",
        "n_labelled",
        "seed",
        "n_seeds",
        "n_test",
        *(f"{name}_{what}" for name in SCORES for what in ("mean", "sd")),
        "n_empty",
    ]
    return in_order(whole[[*ordered, *(c for c in whole.columns if c not in ordered)]])


def intervals(per_image):
    """95 % bootstrap intervals of the mean DSC over subjects, of class ``mean``."""
    rows = []
    mean = per_image[per_image["class"] == "mean"]
    for (cohort, recipe, rate), group in mean.groupby(["cohort", "recipe", "rate"], sort=False):
        for method, values in statistics.per_subject(group, "dsc").items():
            low, high = statistics.interval(values.dropna())
            rows.append(
                {
                    "cohort": cohort,
                    "recipe": recipe,
                    "rate": rate,
                    "method": method,
                    "class": "mean",
                    "dsc_low": low,
                    "dsc_high": high,
                }
            )
    return pd.DataFrame(rows)


def spread(row, name, digits):
    """``mean ± sd`` of a row of Table 1; the mean alone where there is one value, nothing where there is none."""
    mean, sd = row[name + "_mean"], row[name + "_sd"]
    if pd.isna(mean):
        return ""
    return f"{mean:.{digits}f}" if pd.isna(sd) else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def figure(value, digits):
    """A number for reading; nothing where there is none."""
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def as_markdown(rows):
    """Rows (dictionaries or a frame) as a Markdown table, cells as they are."""
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) + "\n"


def markdown(table):
    """Table 1 for reading: mean ± sd over test images and seeds, the spread of seeds, and the tests against fs.

    With one foreground class its rows would repeat those of ``mean``, so they are left out.
    """
    table = table[table["seed"].astype(str) == "all"]
    several = table.groupby("cohort")["class"].transform("nunique") > 2
    published = "dsc_published" in table
    table = table.fillna({"star": "", "star_hd": "", "rounds": ""})
    whole = lambda number: "" if pd.isna(number) else int(number)
    with_rounds = {method.name for method in methods.METHODS if method.stage.rounds}
    rows = []
    for _, row in table[(table["class"] == "mean") | several].iterrows():
        rows.append(
            {
                "cohort": row["cohort"],
                "labelled": f"{row['n_labelled']} ({row['rate']:g} %)",
                "recipe": row["recipe"],
                "method": row["method"],
                **({"class": row["class"]} if several.any() else {}),
                "seeds": whole(row["n_seeds"]),
                "n": whole(row["n_test"]),
                "DSC": spread(row, "dsc", 3) + (" " + row["star"]).rstrip(),
                **({"DSC, published": figure(row["dsc_published"], 3)} if published else {}),
                "sd of seeds": "" if pd.isna(row["dsc_seed_sd"]) else f"{row['dsc_seed_sd']:.3f}",
                "HD (px)": spread(row, "hd", 2) + (" " + row["star_hd"]).rstrip(),
                "HD95 (px)": spread(row, "hd95", 2),
                "empty": whole(row["n_empty"]),
                "round": row["rounds"] if row["method"] in with_rounds else "",
                "p against fs: DSC": p_value(row["p_fs_holm"]),
                "HD": p_value(row["p_fs_holm_hd"]),
            }
        )
    return as_markdown(rows)


def summary(table):
    """Table 1 at a glance, as Markdown: mean DSC and, in brackets, HD of every recipe and method against the labels.

    Args:
        table: of ``with_published``.
    """
    table = table[(table["seed"].astype(str) == "all") & (table["class"] == "mean")]
    ours = lambda row: f"{row['dsc_mean']:.3f} ({row['hd_mean']:.2f})"
    cells = [ours(row) if pd.notna(row["dsc_mean"]) else f"{row['dsc_published']:.3f}" for _, row in table.iterrows()]
    table = table.assign(
        cell=cells, labelled=[f"{n} ({rate:g} %)" for n, rate in zip(table["n_labelled"], table["rate"])]
    )
    keys = ["method", "recipe", *["cohort"] * (table["cohort"].nunique() > 1)]
    wide = table.pivot(index=keys, columns="labelled", values="cell").fillna("")
    wide = wide.loc[
        pd.MultiIndex.from_frame(table[keys].drop_duplicates()), table.sort_values("n_labelled")["labelled"].unique()
    ]
    return as_markdown(wide.reset_index().rename(columns={"method": "DSC (HD in pixels)"}))


def p_value(p):
    """p for reading; nothing where there was no test."""
    return "" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def in_words(comparisons):
    """Which methods differ significantly from fs, as Markdown: one item per cohort, rate and recipe.

    Args:
        comparisons: of ``compare``.

    Returns:
        For DSC and HD the methods that are significantly better or worse (p_holm below 0.05; the side is that of the
        ranks, see ``table1``) and those that are neither. Each has its mean difference from fs and the 95 % interval
        over subjects.
    """
    if not len(comparisons):
        return "There is nothing to compare with fs yet.\n"
    lines = []
    against = comparisons[comparisons["reference"] == "fs"]
    for (cohort, rate, recipe), group in against.groupby(["cohort", "rate", "recipe"], sort=False):
        said = []
        for metric, digits, better in (("dsc", 3, 1), ("hd", 2, -1)):
            named = {"better": [], "worse": [], "not significantly different": []}
            for _, row in group[group["metric"] == metric].iterrows():
                side = (
                    "not significantly different"
                    if row["p_holm"] >= 0.05
                    else "better"
                    if better * row["effect"] > 0
                    else "worse"
                )
                figures = [f"{row[column]:+.{digits}f}" for column in ("difference", "low", "high")]
                named[side].append("{} {} ({} to {})".format(row["method"], *figures))
            said += [f"{metric.upper()} {side}: {', '.join(methods)}." for side, methods in named.items() if methods]
        lines.append(f"- **{cohort}, {rate:g} %, recipe {recipe}.** {' '.join(said)}")
    return "\n".join(lines) + "\n"


def calibrated(per_image, bins):
    """Calibration and quality control of every method: one row per cohort, recipe, rate and method.

    Pixels of all seeds are taken together. Rank correlation and AUROC are means over seeds, since the networks of each
    seed have their own range of confidence.
    """
    keys = ["cohort", "recipe", "rate", "method"]
    images = per_image[(per_image["class"] == "mean") & (per_image["variant"] == "")].groupby(keys, sort=False)
    rows = []
    for key, group in bins[bins["variant"] == ""].groupby(keys, sort=False):
        control = pd.DataFrame(
            [
                calibration.quality_control(one["confidence"], one["dsc"])
                for _, one in images.get_group(key).groupby("seed")
            ]
        )
        rows.append({**dict(zip(keys, key)), "seeds": len(control), **calibration.errors(group), **control.mean()})
    return pd.DataFrame(rows)


def metrics(table):
    """Nested figures for `dvc metrics`: cohort, recipe, rate, method, then dsc, hd and hd95, of class ``mean``."""
    tree = {}
    ours = table[(table["class"] == "mean") & (table["seed"].astype(str) == "all") & table["dsc_mean"].notna()]
    for _, row in ours.iterrows():
        leaf = tree.setdefault(row["cohort"], {}).setdefault(row["recipe"], {}).setdefault(f"{row['rate']:g} %", {})
        leaf[row["method"]] = {name: round(float(row[f"{name}_mean"]), 6) for name in SCORES}
    return tree
