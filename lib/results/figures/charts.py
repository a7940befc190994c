"""Charts of a training: curves, rounds, the course of pseudo-labels; and how figures are saved.

They need no tensors: notebooks that only draw tables start without torch. They know no method: a new one changes no
training's code.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, display

SEGMENTATION, REGISTRATION, FUSED = "#d62728", "#1f77b4", "#7b3fb5"  # what a curve is of
FIRST, SECOND = "#8c564b", "#c49c94"  # of two networks


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
        for score, colour in zip(scores, (SEGMENTATION, REGISTRATION)):
            axes[0, 1].plot(marked["step"], marked[score], marker=".", color=colour, label=score)
        if len(scores) > 1:
            axes[0, 1].legend(fontsize=8)
        axes[0, 1].set(xlabel="step", ylabel="DSC", title="validation images", ylim=(0, 1))
    figure.tight_layout()
    return figure


def round_curves(measured):
    """Per round: DSC of both networks and the soft pseudo-masks, mean confidence and folding.

    Args:
        measured: rows of rounds.csv. Those without registration (CCT-R's) are left out. There is one column of panels
            per recipe and stage.
    """
    measured = measured[measured["dsc_registration"].notna()]
    groups = list(measured.groupby(["recipe", "stage"], sort=False))
    figure, axes = plt.subplots(2, len(groups), figsize=(4.6 * len(groups), 6), squeeze=False, sharex="col")
    colours = {"segmentation": SEGMENTATION, "registration": REGISTRATION, "pseudo_masks": FUSED}
    for (top, bottom), ((recipe, stage), group) in zip(axes.T, groups):
        twin = bottom.twinx()
        for split, style in (("validation", "--"), ("unlabelled", "-")):
            rows = group[group["split"] == split]
            for name, colour in colours.items():
                top.plot(
                    rows["round"],
                    rows[f"dsc_{name}"],
                    style,
                    marker=".",
                    color=colour,
                    label=f"{name.replace('_', ' ')}, {split}",
                )
            bottom.plot(
                rows["round"],
                rows["mean_confidence"],
                style,
                marker=".",
                color="black",
                label=f"mean confidence, {split}",
            )
            twin.plot(rows["round"], 100 * rows["folding"], style, color="#7fb2e5", marker=".")
        top.set(title=f"{stage}, recipe {recipe}", ylabel="DSC")
        bottom.set(xlabel="round", ylabel="mean confidence", xticks=sorted(group["round"].unique()))
        twin.set_ylabel("folding, % of pixels (blue)")
        twin.set_ylim(0, max(0.1, 110 * group["folding"].max()))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    handles = [handle for ax in axes[:, 0] for handle in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=7, handlelength=3)
    return figure


def pseudo_label_course(course):
    """How good each source of pseudo-labels is over the training (P2, Figure 4); ``course`` as cctr.course."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    colours = {"network A": FIRST, "network B": SECOND, "warped labels": REGISTRATION}
    for name, colour in colours.items():
        line = {"linestyle": "--"} if name == "warped labels" else {"marker": "."}
        axes.plot(course["step"], course[name], color=colour, label=name, **line)
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
    write(figure, file)
    display(Image(str(file)))


def write(figure, file):
    """Write a figure as PNG, the same bytes for the same figure, and close it."""
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
