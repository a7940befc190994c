"""Charts of methods beside one another: scores, label efficiency, reliability. Lines and colours are the table's."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import ScalarFormatter

from lib.methods.table import by_name
from lib.results.calibration import pool
from lib.results.statistics import tested_split


def score_boxes(per_image):
    """DSC and HD of every test image, one box per method, recipe and cohort (of the average over classes)."""
    of, untrained = by_name(), per_image[per_image["recipe"] == "-"]  # these have no recipe: shown with each
    groups = [
        (key, pd.concat([rows, untrained[untrained["cohort"] == key[0]]]))
        for key, rows in per_image.groupby(["cohort", "recipe"], sort=False)
        if key[1] != "-"
    ]
    counts = [rows["method"].nunique() + 1 for _, rows in groups]
    figure, axes = plt.subplots(
        2, len(groups), figsize=(0.36 * sum(counts) + 1, 6.5), squeeze=False, sharey="row", width_ratios=counts
    )
    for column, ((cohort, recipe), rows) in zip(axes.T, groups):
        methods = list(rows["method"].unique())
        for ax, name in zip(column, ("dsc", "hd")):
            boxes = ax.boxplot(
                [rows.loc[rows["method"] == m, name] for m in methods],
                tick_labels=methods,
                patch_artist=True,
                widths=0.6,
                flierprops={"markersize": 3},
                medianprops={"color": "black"},
            )
            for box, method in zip(boxes["boxes"], methods):
                box.set_facecolor(of[method].colour)
            ax.tick_params(axis="x", labelrotation=90)
        column[0].set_title(f"{cohort}\nrecipe {recipe}, {rows['n_labelled'].iloc[0]} labelled", fontsize=9)
    for ax, label in zip(axes[:, 0], ("DSC", "HD (pixels)")):
        ax.set_ylabel(label)
    axes[1, 0].set_yscale("symlog", linthresh=1, subs=range(2, 10))  # a few masks are far off, most within pixels
    axes[1, 0].yaxis.set_major_formatter(ScalarFormatter())
    figure.tight_layout()
    return figure


def label_efficiency(table1, counted="images"):
    """DSC and HD against the number of labelled images, one column per recipe; bands are the range over seeds.

    Args:
        counted: what ``n_labelled`` counts: images, or patients.
    """
    of = by_name()
    table = table1[(table1["class"] == "mean") & (tested_split(table1["cohort"]) == "test") & table1["method"].isin(of)]
    recipes = [recipe for recipe in table["recipe"].unique() if recipe != "-"]
    size = (5 * len(recipes), 7)
    figure, axes = plt.subplots(2, len(recipes), figsize=size, squeeze=False, sharey="row", sharex=True)
    for column, recipe in zip(axes.T, recipes):
        for method, rows in table[table["recipe"].isin([recipe, "-"])].groupby("method", sort=False):
            seeds, every = rows[rows["seed"].astype(str) != "all"], rows[rows["seed"].astype(str) == "all"]
            every = every.sort_values("n_labelled")
            for ax, name in zip(column, ("dsc", "hd")):
                line = {"color": of[method].colour, "marker": "o", "markersize": 4, "linewidth": of[method].width}
                ax.plot(every["n_labelled"], every[f"{name}_mean"], label=method, **line)
                ax.plot(seeds["n_labelled"], seeds[f"{name}_mean"], ".", color=of[method].colour, markersize=3)
                band = seeds.groupby("n_labelled")[f"{name}_mean"].agg(["min", "max"])
                ax.fill_between(band.index, band["min"], band["max"], color=of[method].colour, alpha=0.15, lw=0)
        ticks = sorted(table["n_labelled"].unique())
        column[0].set(title=f"recipe {recipe}", ylabel="DSC", xscale="log")
        column[1].set(ylabel="HD (pixels)", xlabel=f"labelled {counted}")
        column[1].set_xticks(ticks, [str(n) for n in ticks])
        column[1].minorticks_off()
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=8)
    return figure


def reliability(bins, per_image):
    """Reliability diagrams, and mean confidence against DSC of every test image, one row per recipe.

    Methods are those that the table of methods marks for it.

    Args:
        bins: rows of calibration.reliability; per_image: rows of class ``mean``; both of one rate.
    """
    cohort, methods = bins["cohort"].iloc[0], [method for method in by_name().values() if method.in_reliability]
    recipes = [recipe for recipe in bins["recipe"].unique() if recipe != "-"]
    figure, axes = plt.subplots(len(recipes), 2, figsize=(9, 4 * len(recipes)), squeeze=False)
    for (left, right), recipe in zip(axes, recipes):
        left.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":")
        for method in methods:
            chosen = lambda frame: frame[
                (frame["cohort"] == cohort) & (frame["recipe"] == recipe) & (frame["method"] == method.name)
            ]
            pooled, images = pool(chosen(bins)), chosen(per_image)
            if not len(pooled):
                continue
            look = {"label": method.name, "color": method.colour}
            left.plot(pooled["probability"], pooled["frequency"], marker=".", **look, linewidth=method.width)
            right.scatter(images["confidence"], images["dsc"], s=6, alpha=0.5, **look)
        left.set(title=f"recipe {recipe}", xlabel="probability of a pixel", ylabel="share truly foreground")
        right.set(xlabel="mean confidence of an image", ylabel="DSC")
        left.legend(fontsize=7)
    figure.tight_layout()
    return figure
