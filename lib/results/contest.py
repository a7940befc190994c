"""`python -m lib.results.contest`: the methods of recipe `strong` beside one another, from what the grid has finished.

Writes contest.csv, contest.md, contest.png and contest_minutes.png to results/<cohort>/, contest_ablation.csv and .md
with the variants of a method, and what results.course has to say. Intervals are over draws of labelled images and over
test subjects together, so that they say what another draw and other subjects may bring.
"""

import argparse
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.methods.table import by_name
from lib.results import grid
from lib.results.course import ONE_CORE, write_course
from lib.results.figures.charts import write
from lib.results.statistics import FURTHER, average_classes, tested_split
from lib.results.tables import as_markdown, figure
from lib.runs import params

RESAMPLES = 2000
SELECTIONS = {"": "none", "chosen by validation": "validation", "validation masks train": "training"}  # by variant
OURS = "joint+"
SPAN = 0.03  # DSC that the vertical axis of a chart shows at least
BASELINE = "fs+elastic"
SCORED = ["cohort", "method", "n_labelled", "seed", "variant", "subject", "class", "dsc", "hd95", "minutes", "device"]
ABLATED = [
    "cohort",
    "method",
    "n_labelled",
    "variant",
    "draws",
    "dsc_mean",
    "difference",
    "difference_low",
    "difference_high",
]
COLUMNS = [
    "cohort",
    "split",
    "recipe",
    "method",
    "n_labelled",
    "selection",
    "hidden_masks",
    "images_seen",
    "tta",
    "draws",
    "subjects",
    "dsc_mean",
    "dsc_low",
    "dsc_high",
    "dsc_of_draws_sd",
    "hd95_mean",
    "minutes",
    "device",
    "baseline_difference",
    "baseline_low",
    "baseline_high",
    "best_peer",
    "best_peer_difference",
    "difference_low",
    "difference_high",
]


def collect(settings):
    """Scores of all finished items of recipe ``strong``, classes averaged; without rows where there are none."""
    frames = []
    for folder in grid.finished(settings):
        if folder.name.startswith("strong-"):
            rows = pd.read_csv(folder / "per_image.csv", dtype={"subject": str, "variant": str}, keep_default_na=False)
            item = json.loads((folder / "item.json").read_text())
            frames.append(rows.assign(minutes=item["minutes"], device=item["device"]))
    if not frames:
        return pd.DataFrame(columns=SCORED)
    together = average_classes(pd.concat(frames, ignore_index=True))
    return together[together["class"] == "mean"]


def by_draw(rows, metric):
    """Mean of a score of one method: a frame with one row per draw and one column per subject."""
    return rows.groupby(["seed", "subject"])[metric].mean().unstack("subject")


def interval(scores, level=0.95):
    """Bootstrap interval of the mean over draws and subjects, both drawn anew: (low, high).

    Args:
        scores: array ``(draws, subjects)``. With one draw alone the interval is over subjects.
    """
    rng = np.random.default_rng(0)
    draws, subjects = scores.shape
    again = lambda count: rng.integers(count, size=(RESAMPLES, count))
    means = [scores[np.ix_(rows, columns)].mean() for rows, columns in zip(again(draws), again(subjects))]
    return tuple(float(value) for value in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))


def contest(rows, settings):
    """The table of the contest.

    Args:
        rows: of ``collect``.
        settings: of the pipeline; section ``strong`` says how many images were seen.

    Returns:
        pandas.DataFrame with COLUMNS, one row per number of labels, selection and method. All differences are on the
        draws and subjects that both have: means over other draws cannot be compared. Every method has one from
        fs+elastic, and joint+ one from its best peer, the method of the same selection that it leads by least.
    """
    training, table, looked_at = settings.strong.training, [], validation_masks(settings)
    rows = rows[rows["variant"].isin(SELECTIONS)]
    rows = rows.assign(split=tested_split(rows["cohort"]), selection=rows["variant"].map(SELECTIONS))
    keys = ["split", "cohort", "n_labelled", "selection"]
    for (split, cohort, labelled, selection), group in rows.groupby(keys, sort=True):
        scores = {method: by_draw(found, "dsc") for method, found in group.groupby("method")}
        leads = {method: gain(scores[OURS], found) for method, found in scores.items() if OURS in scores}
        leads = {method: found.mean() for method, found in leads.items() if method != OURS and len(found)}
        best = min(leads, key=leads.get) if leads else ""
        for method in (name for name in by_name() if name in scores):
            found, own = scores[method], group[group["method"] == method]
            low, high = interval(found.to_numpy())
            row = {
                "cohort": cohort,
                "split": split,
                "recipe": "strong",
                "method": method,
                "n_labelled": labelled,
                "selection": selection,
                "hidden_masks": 0 if selection == "none" else looked_at,
                "images_seen": training.steps * training.batch if by_name()[method].stage.trained else 0,
                "tta": "no",
                "draws": len(found),
                "subjects": found.shape[1],
                "dsc_mean": float(found.to_numpy().mean()),
                "dsc_low": low,
                "dsc_high": high,
                "dsc_of_draws_sd": float(found.mean(axis=1).std()),
                "hd95_mean": float(by_draw(own, "hd95").to_numpy().mean()),
            }
            row |= cost(own)
            if method != BASELINE and BASELINE in scores and len(more := gain(found, scores[BASELINE])):
                row["baseline_difference"] = float(more.mean())
                row["baseline_low"], row["baseline_high"] = interval(more)
            if method == OURS and best:
                more = gain(found, scores[best])
                row |= {"best_peer": best, "best_peer_difference": float(more.mean())}
                row["difference_low"], row["difference_high"] = interval(more)
            table.append(row)
    order = {split: place for place, split in enumerate(FURTHER)}
    return pd.DataFrame(table, columns=COLUMNS).sort_values("split", key=lambda of: of.map(order), kind="stable")


def gain(scores, others):
    """Scores of one method minus those of another, on the draws that both have: array ``(draws, subjects)``."""
    both = scores.index.intersection(others.index)
    return (scores.loc[both] - others.loc[both]).to_numpy()


def cost(rows):
    """Minutes of the fastest draw of a method and the device it ran on: one core, or a CPU, where a draw did."""
    for kind in (ONE_CORE, "CPU"):
        if (on_it := rows["device"].str.startswith(kind)).any():
            rows = rows[on_it]
            break
    return {"minutes": rows["minutes"].min(), "device": rows["device"].mode()[0]}


def validation_masks(settings):
    """How many masks a method looks at that chooses by validation images, or trains on them: images, or patients."""
    split = pd.read_csv(params.results_folder(settings) / "split.csv", dtype=str)
    counted = "subject" if settings.cohort in params.VOLUME_COHORTS else "slice"
    return split.loc[split["split"] == "validation", counted].nunique()


def ablation(rows):
    """Variants of a method beside the method itself, on the draws that both have: a frame with ABLATED.

    Args:
        rows: of ``collect``. Difference: variant minus method, on the test images.
    """
    table = []
    rows = rows[(tested_split(rows["cohort"]) == "test") & ~rows["variant"].isin(list(SELECTIONS)[1:])]
    for (cohort, method, labelled), group in rows.groupby(["cohort", "method", "n_labelled"], sort=True):
        whole = group[group["variant"] == ""]
        for variant, found in group[group["variant"] != ""].groupby("variant", sort=False):
            varied, same = by_draw(found, "dsc"), by_draw(whole, "dsc")
            change = gain(varied, same)
            if not len(change):
                continue
            both = varied.index.intersection(same.index)
            scores = len(both), float(varied.loc[both].to_numpy().mean()), float(change.mean())
            table.append([cohort, method, labelled, variant, *scores, *interval(change)])
    return pd.DataFrame(table, columns=ABLATED)


def ablation_markdown(table):
    """The ablation for reading."""
    if not len(table):
        return "No variant has been run.\n"
    rows = [
        {
            "labelled": row["n_labelled"],
            "method": row["method"],
            "variant": row["variant"],
            "draws": row["draws"],
            "DSC": figure(row["dsc_mean"], 3),
            "difference": f"{row['difference']:+.3f}",
            "95 % interval": f"{row['difference_low']:+.3f} to {row['difference_high']:+.3f}",
        }
        for _, row in table.iterrows()
    ]
    return as_markdown(rows)


def markdown(table):
    """The contest for reading."""
    if not len(table):
        return "The contest has not been run: `make contest`, see params.yaml.\n"
    rows = []
    between = lambda row, *names: "{:+.3f} ({:+.3f} to {:+.3f})".format(*row[list(names)])
    for _, row in table.iterrows():
        baseline = peer = ""
        if pd.notna(row["baseline_difference"]):
            baseline = between(row, "baseline_difference", "baseline_low", "baseline_high")
        if row["best_peer"] and pd.notna(row["best_peer_difference"]):
            peer = between(row, "best_peer_difference", "difference_low", "difference_high")
            peer += f" against {row['best_peer']}"
        rows.append(
            {
                **({"images": row["split"]} if len(table["split"].unique()) > 1 else {}),
                "labelled": row["n_labelled"],
                "method": row["method"],
                "draws": row["draws"],
                "DSC": figure(row["dsc_mean"], 3),
                "95 % interval": f"{row['dsc_low']:.3f} to {row['dsc_high']:.3f}",
                "sd of draws": figure(row["dsc_of_draws_sd"], 3),
                "HD95 (px)": figure(row["hd95_mean"], 2),
                "images seen": f"{row['images_seen']:,}",
                "minutes": figure(row["minutes"], 1) + ("" if row["device"].startswith("CPU") else " (GPU)"),
                "selection": row["selection"],
                "hidden masks": row["hidden_masks"],
                f"difference from {BASELINE}": baseline,
                "difference from the best peer": peer,
            }
        )
    return as_markdown(rows)


def chart(table):
    """DSC minus that of fs+elastic on the same draws, with intervals: a colour per method, side by side per label."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    table = table[(table["split"] == "test") & (table["selection"] == "none")]
    ticks = sorted(table.loc[table["baseline_difference"].notna(), "n_labelled"].unique())
    present = [name for name in by_name() if name in set(table["method"]) - {BASELINE}]
    axes.axhline(0, color=by_name()[BASELINE].colour, lw=1, label=BASELINE)
    step = min(0.1, 0.7 / max(1, len(present) - 1))  # side by side: intervals would hide one another
    for place, name in enumerate(present):
        rows = table[(table["method"] == name) & table["baseline_difference"].notna()]
        value, low, high = (rows[f"baseline_{column}"] for column in ("difference", "low", "high"))
        at = [ticks.index(n) + step * (place - (len(present) - 1) / 2) for n in rows["n_labelled"]]
        style = {"fmt": "o", "color": by_name()[name].colour, "elinewidth": 2.5 if name == OURS else 1.2}
        axes.errorbar(at, value, (value - low, high - value), label=name, **style)
    if len(table):
        axes.set_title(f"{table['cohort'].iloc[0]}, recipe strong")
        axes.set_xticks(range(len(ticks)), [str(n) for n in ticks])
        axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.set(xlabel="labelled", ylabel=f"DSC minus that of {BASELINE}")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def chart_minutes(table):
    """DSC against minutes of all training that a method needs, a panel per number of labels: fast and good is up left.

    Minutes on a GPU and on a CPU core cannot be compared: the former are hollow.
    """
    table = table[(table["split"] == "test") & (table["selection"] == "none") & (table["minutes"] > 0)]
    table = table[table["baseline_difference"].notna() | (table["method"] == BASELINE)]
    methods = table.groupby("n_labelled")["method"].nunique()
    labels, named = sorted(methods.index[methods > 1]), {}
    count = max(1, len(labels))
    size = (1.5 + 3 * count, 3.6)
    figure, panels = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for axes, labelled in zip(panels.flat, labels):
        rows = table[table["n_labelled"] == labelled].set_index("method")
        for method in (name for name in by_name() if name in rows.index):
            row, colour = rows.loc[method], by_name()[method].colour
            value = rows.loc[BASELINE, "dsc_mean"] + (0 if method == BASELINE else row["baseline_difference"])
            inside = colour if row["device"].startswith("CPU") else "none"
            (named[method],) = axes.plot(row["minutes"], value, "o", c=colour, mfc=inside, ms=9, mew=2, label=method)
        axes.set_title(f"{labelled} labelled")
        if table["minutes"].max() > 10 * table["minutes"].min():
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(0.1)
        low, high = axes.get_ylim()
        spare = max(0, SPAN - (high - low)) / 2  # small differences are to look small
        axes.set_ylim(low - spare, high + spare)
    figure.supxlabel("minutes of training (filled: on one CPU core, hollow: on a GPU)", fontsize=10)
    panels[0, 0].set_ylabel(f"DSC of {BASELINE}, plus the difference\non the same draws")
    figure.legend(handles=list(named.values()), loc="outside right upper", fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(prog="python -m lib.results.contest", description=__doc__.splitlines()[0])
    parser.add_argument("cohort")
    settings = params.load(cohort=parser.parse_args().cohort)
    rows, results = collect(settings), params.results_folder(settings)
    table, parts = contest(rows, settings), ablation(rows)
    parts.round(6).to_csv(results / "contest_ablation.csv", index=False)
    (results / "contest_ablation.md").write_text(ablation_markdown(parts))
    table.round(6).to_csv(results / "contest.csv", index=False)
    (results / "contest.md").write_text(markdown(table))
    write(chart(table), results / "contest.png")
    write(chart_minutes(table), results / "contest_minutes.png")
    write_course(settings, results, table["cohort"].iloc[0] if len(table) else settings.cohort)
    print(markdown(table))


if __name__ == "__main__":
    main()
