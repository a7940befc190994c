"""Time to quality: when the methods of recipe `strong` pass given marks, by what methods.watching has noted.

``python -m lib.results.contest`` writes course.csv, course.md and course.png to results/<cohort>/.
"""

import json

import matplotlib.pyplot as plt
import pandas as pd

from lib.methods import table
from lib.results import grid
from lib.results.figures.charts import write
from lib.results.tables import as_markdown, figure

ONE_CORE = "CPU (1 threads)"  # of item.json: minutes on more cores, or on a GPU, cannot be compared with it


def collect(settings):
    """The rows of all finished items that were watched on one core: a frame with table.COURSE_COLUMNS."""
    frames = []
    for folder in grid.finished(settings):
        item = json.loads((folder / "item.json").read_text())
        if (folder / table.COURSE).exists() and not item["variant"] and item["device"] == ONE_CORE:
            frames.append(pd.read_csv(folder / table.COURSE))
    return pd.concat([pd.DataFrame(columns=table.COURSE_COLUMNS), *frames], ignore_index=True).infer_objects()


def of_draws(rows):
    """Means over the draws that all methods have: a frame with method, n_labelled, step, minutes, dsc and draws.

    Numbers of labelled images with a single method are left out: there is nothing to compare it with.
    """
    by_label = rows.groupby("n_labelled")["method"].transform("nunique")
    rows, by_label = rows[by_label > 1], by_label[by_label > 1]
    rows = rows[rows.groupby(["n_labelled", "seed"])["method"].transform("nunique") == by_label]
    grouped = rows.groupby(["method", "n_labelled", "step"], as_index=False)
    means = grouped.agg(minutes=("minutes", "mean"), dsc=("dsc", "mean"), draws=("seed", "nunique"))
    means["method"] = pd.Categorical(means["method"], table.by_name())  # in the order of the table
    return means.sort_values(["n_labelled", "method", "step"], ignore_index=True)


def passed(means, marks):
    """Minutes until the mean DSC of the draws first reaches each mark: a column per mark, NaN for never."""
    rows = []
    for (labelled, method), found in means.groupby(["n_labelled", "method"], sort=False, observed=True):
        above = {f"{mark:.2f}": found.loc[found["dsc"] >= mark, "minutes"].min() for mark in marks}
        rows.append({"n_labelled": labelled, "method": method, "draws": int(found["draws"].max()), **above})
    return pd.DataFrame(rows, columns=["n_labelled", "method", "draws", *(f"{mark:.2f}" for mark in marks)])


def markdown(times):
    """``passed`` for reading."""
    if not len(times):
        return "No training of the contest has been watched.\n"
    marks = times.columns[3:]
    rows = [
        {
            "labelled": row["n_labelled"],
            "method": row["method"],
            "draws": row["draws"],
            **{f"DSC {mark}": figure(row[mark], 1) or "not reached" for mark in marks},
        }
        for _, row in times.iterrows()
    ]
    return as_markdown(rows)


def chart(means, marks, title):
    """DSC against minutes while methods learn, a panel per number of labels; dotted: the marks."""
    labels = sorted(means["n_labelled"].unique())
    count = max(1, len(labels))
    drawn, panels = plt.subplots(1, count, figsize=(1.5 + 4 * count, 3.6), layout="constrained", squeeze=False)
    lines = {}
    for axes, labelled in zip(panels.flat, labels):
        for method, found in means[means["n_labelled"] == labelled].groupby("method", sort=False, observed=True):
            colour = table.by_name()[method].colour
            (lines[method],) = axes.plot(found["minutes"], found["dsc"], ".-", color=colour, label=method)
        for mark in marks:
            axes.axhline(mark, color="0.6", lw=1, ls=":")
        top = means.loc[means["n_labelled"] == labelled, "dsc"].max()
        axes.set(xlabel="minutes on one CPU core", title=f"{title}, {labelled} labelled")
        axes.set_ylim(max(0, min(marks, default=top) - 0.02), top + 0.005)  # the first looks are far below
    panels[0, 0].set_ylabel("DSC of the test images")
    drawn.legend(handles=list(lines.values()), loc="outside right upper", fontsize=8)
    return drawn


def write_course(settings, results, title):
    """Write course.csv, course.md and course.png of a cohort to the folder ``results``; ``title``: of the cohort."""
    rows, marks = collect(settings), settings.contest.marks.get(settings.cohort, [])
    means = of_draws(rows)
    rows.round(4).to_csv(results / table.COURSE, index=False)
    (results / "course.md").write_text(markdown(passed(means, marks)))
    write(chart(means, marks, title), results / "course.png")
