"""Charts of numbers: training curves, rounds, scores, label efficiency, calibration.

They need no tensors, so that the notebooks which only draw tables start without torch.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.ticker import ScalarFormatter

from lib.calibration import pool

METHOD_COLOURS = {
    "fs": "#7f7f7f", "mt": "#e6a100", "registration": "#7fb2e5", "joint": "#f08a84", "combined": "#bfa3dd",
    "registration+": "#1f77b4", "joint+": "#d62728", "combined+": "#7b3fb5", "cctr": "#8c564b", "cctr-b": "#c49c94",
    "classical": "#2ca02c",
}


def under(method):
    """How fs is drawn: broad, so that it is seen where joint, whose best round may be fs, lies upon it."""
    return {"linewidth": 4} if method == "fs" else {}


def thin(history, rows=500):
    """A training history averaged down to at most ``rows`` rows."""
    width = -(-len(history) // rows)
    groups = np.arange(len(history)) // width
    words = history.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in history.dtypes]]
    how = {c: "last" if c in ("step", "round", *words) else "mean" for c in history.columns}
    return history.groupby(groups).agg(how)


def curves(history, title):
    """Losses, and the validation DSC where there is one, over optimiser steps."""
    scores = [c for c in history.columns if c.startswith("validation")]
    parts = [c for c in history.columns if c not in ("step", "learning_rate", "round", "network", *scores)]
    scored = bool(scores) and bool(history[scores].notna().any(axis=None))
    figure, axes = plt.subplots(1, 1 + scored, figsize=(5 * (1 + scored), 3), squeeze=False)
    smooth = history[parts].rolling(max(1, len(history) // 50), min_periods=1).mean()
    for part in parts:
        axes[0, 0].plot(history["step"], smooth[part], label=part)
    axes[0, 0].set(xlabel="step", ylabel="loss (running mean)", title=title)
    axes[0, 0].legend(fontsize=8)
    if scored:
        marked = history[history[scores[0]].notna()]
        for score, method in zip(scores, ("joint+", "registration+")):
            axes[0, 1].plot(marked["step"], marked[score], marker=".", color=METHOD_COLOURS[method], label=score)
        if len(scores) > 1:
            axes[0, 1].legend(fontsize=8)
        axes[0, 1].set(xlabel="step", ylabel="DSC", title="validation images", ylim=(0, 1))
    figure.tight_layout()
    return figure


def round_curves(measured):
    """Per round: DSC of both networks and the soft pseudo-masks, mean confidence and folding.

    Args:
        measured: rows of rounds.csv, of which those without registration, CCT-R's, are left out; one column of
            panels per recipe and stage.
    """
    measured = measured[measured["dsc_registration"].notna()]
    groups = list(measured.groupby(["recipe", "stage"], sort=False))
    figure, axes = plt.subplots(2, len(groups), figsize=(4.6 * len(groups), 6), squeeze=False, sharex="col")
    colour = {"segmentation": "joint+", "registration": "registration+", "pseudo_masks": "combined+"}
    for (top, bottom), ((recipe, stage), group) in zip(axes.T, groups):
        twin = bottom.twinx()
        for split, style in (("validation", "--"), ("unlabelled", "-")):
            rows = group[group["split"] == split]
            for name, method in colour.items():
                top.plot(rows["round"], rows[f"dsc_{name}"], style, marker=".", color=METHOD_COLOURS[method],
                         label=f"{name.replace('_', ' ')}, {split}")
            bottom.plot(rows["round"], rows["mean_confidence"], style, marker=".", color="black",
                        label=f"mean confidence, {split}")
            twin.plot(rows["round"], 100 * rows["folding"], style, color=METHOD_COLOURS["registration"], marker=".")
        top.set(title=f"{stage}, recipe {recipe}", ylabel="DSC")
        bottom.set(xlabel="round", ylabel="mean confidence", xticks=sorted(group["round"].unique()))
        twin.set_ylabel("folding, % of pixels (blue)")
        twin.set_ylim(0, max(0.1, 110 * group["folding"].max()))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    handles = [handle for ax in axes[:, 0] for handle in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=7, handlelength=3)
    return figure


def score_boxes(per_image):
    """DSC and HD of every test image, one box per method, recipe and cohort (of the average over classes)."""
    classical = per_image[per_image["recipe"] == "-"]  # belongs to no recipe: shown with each
    groups = [(key, pd.concat([rows, classical[classical["cohort"] == key[0]]]))
              for key, rows in per_image.groupby(["cohort", "recipe"], sort=False) if key[1] != "-"]
    counts = [rows["method"].nunique() + 1 for _, rows in groups]
    figure, axes = plt.subplots(2, len(groups), figsize=(0.36 * sum(counts) + 1, 6.5), squeeze=False, sharey="row",
                                width_ratios=counts)
    for column, ((cohort, recipe), rows) in zip(axes.T, groups):
        methods = list(rows["method"].unique())
        for ax, name in zip(column, ("dsc", "hd")):
            boxes = ax.boxplot([rows.loc[rows["method"] == m, name] for m in methods], tick_labels=methods,
                               patch_artist=True, widths=0.6, flierprops={"markersize": 3},
                               medianprops={"color": "black"})
            for box, method in zip(boxes["boxes"], methods):
                box.set_facecolor(METHOD_COLOURS[method])
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
    table = table1[(table1["class"] == "mean") & ~table1["cohort"].str.contains("unseen")
                   & table1["method"].isin(METHOD_COLOURS.keys())]
    recipes = [recipe for recipe in table["recipe"].unique() if recipe != "-"]
    size = (5 * len(recipes), 7)
    figure, axes = plt.subplots(2, len(recipes), figsize=size, squeeze=False, sharey="row", sharex=True)
    for column, recipe in zip(axes.T, recipes):
        for method, rows in table[table["recipe"].isin([recipe, "-"])].groupby("method", sort=False):
            seeds, every = rows[rows["seed"].astype(str) != "all"], rows[rows["seed"].astype(str) == "all"]
            every = every.sort_values("n_labelled")
            for ax, name in zip(column, ("dsc", "hd")):
                line = {"color": METHOD_COLOURS[method], "marker": "o", "markersize": 4, **under(method)}
                ax.plot(every["n_labelled"], every[f"{name}_mean"], label=method, **line)
                ax.plot(seeds["n_labelled"], seeds[f"{name}_mean"], ".", color=METHOD_COLOURS[method], markersize=3)
                band = seeds.groupby("n_labelled")[f"{name}_mean"].agg(["min", "max"])
                ax.fill_between(band.index, band["min"], band["max"], color=METHOD_COLOURS[method], alpha=0.15, lw=0)
        ticks = sorted(table["n_labelled"].unique())
        column[0].set(title=f"recipe {recipe}", ylabel="DSC", xscale="log")
        column[1].set(ylabel="HD (pixels)", xlabel=f"labelled {counted}")
        column[1].set_xticks(ticks, [str(n) for n in ticks])
        column[1].minorticks_off()
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=8)
    return figure


def reliability(bins, per_image, methods=("fs", "joint", "combined", "joint+", "combined+")):
    """Reliability diagrams, and mean confidence against DSC of every test image, one row per recipe.

    Args:
        bins: rows of calibration.reliability; per_image: rows of class ``mean``; both of one rate.
    """
    cohort = bins["cohort"].iloc[0]
    recipes = [recipe for recipe in bins["recipe"].unique() if recipe != "-"]
    figure, axes = plt.subplots(len(recipes), 2, figsize=(9, 4 * len(recipes)), squeeze=False)
    for (left, right), recipe in zip(axes, recipes):
        left.plot([0, 1], [0, 1], color="black", lw=0.8, ls=":")
        for method in methods:
            chosen = lambda frame: frame[(frame["cohort"] == cohort) & (frame["recipe"] == recipe)
                                         & (frame["method"] == method)]
            pooled, images = pool(chosen(bins)), chosen(per_image)
            if not len(pooled):
                continue
            look = {"label": method, "color": METHOD_COLOURS[method]}
            left.plot(pooled["probability"], pooled["frequency"], marker=".", **look, **under(method))
            right.scatter(images["confidence"], images["dsc"], s=6, alpha=0.5, **look)
        left.set(title=f"recipe {recipe}", xlabel="probability of a pixel", ylabel="share truly foreground")
        right.set(xlabel="mean confidence of an image", ylabel="DSC")
        left.legend(fontsize=7)
    figure.tight_layout()
    return figure


def pseudo_label_course(course):
    """How good each source of pseudo-labels is over the training (P2, Figure 4); ``course`` as cctr.course."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    colours = {"network A": "cctr", "network B": "cctr-b", "warped labels": "registration+"}
    for name, method in colours.items():
        line = {"linestyle": "--"} if name == "warped labels" else {"marker": "."}
        axes.plot(course["step"], course[name], color=METHOD_COLOURS[method], label=name, **line)
    axes.set(xlabel="step", ylabel="DSC", title="pseudo-labels of unlabelled images", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def save(figure, file, title=""):
    """Write a figure as PNG and show the file; the same figure gives the same bytes. The folder is made if need be.

    Args:
        title: what data the figure shows; stands above it.
    """
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    if title:
        figure.text(0.5, 1.01, title, ha="center", va="bottom", fontsize=10)
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    display(Image(str(file)))
