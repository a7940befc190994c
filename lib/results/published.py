"""Our figures beside published ones: P1's Table 1, from other data, and others' from the same test patients."""

import pandas as pd

from lib.methods.table import by_name
from lib.results.statistics import tested_split
from lib.results.tables import as_markdown, spread

# Table 1 of P1: method, rate -> DSC mean, sd, HD mean, sd
PAPER = {
    ("fs", 1): (0.58, 0.27, 32.76, 45.33),
    ("fs", 10): (0.83, 0.15, 14.44, 22.39),
    ("fs", 50): (0.92, 0.05, 10.06, 21.40),
    ("fs", 100): (0.93, 0.02, 8.43, 19.70),
    ("mt", 1): (0.47, 0.31, 80.45, 61.74),
    ("mt", 10): (0.85, 0.09, 14.16, 24.96),
    ("mt", 50): (0.90, 0.06, 11.21, 22.03),
    ("joint", 1): (0.85, 0.05, 12.87, 17.97),
    ("joint", 10): (0.86, 0.06, 11.90, 18.47),
    ("joint", 50): (0.92, 0.05, 9.84, 21.64),
    ("combined", 1): (0.84, 0.05, 11.60, 18.57),
    ("combined", 10): (0.87, 0.04, 11.26, 18.77),
    ("combined", 50): (0.92, 0.03, 8.99, 19.56),
}

# Published mean DSC over classes and the 20 test patients, by cohort and labelled patients; 256 x 256, full schedules.
AUTHORS = "its authors'"
PUBLISHED = {"ACDC": {3: {"PS-MT": 0.8694, "BCP": 0.8759, "UniMatch": 0.8761}}}


def with_published(table):
    """Table 1 with published figures from the same test patients: rows of their own, and a column dsc_published."""
    shared = table[["cohort", "rate", "n_labelled"]].drop_duplicates()
    rows = [
        {**key, "method": method, "recipe": AUTHORS, "class": "mean", "seed": "all", "dsc_published": dsc}
        for key in shared.to_dict("records")
        for method, dsc in PUBLISHED.get(key["cohort"], {}).get(key["n_labelled"], {}).items()
    ]
    counts = dict.fromkeys(("n_seeds", "n_test", "n_empty"), "Int64")  # which published figures have not
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True).astype(counts) if rows else table


def beside_the_published(table):
    """Our mean DSC beside published figures from the same test patients: one row per method and labelled patients."""
    rows = []
    for (cohort, labelled), group in table.groupby(["cohort", "n_labelled"], sort=False):
        head = {"cohort": cohort, "labelled patients": labelled}
        for _, row in group.iterrows():
            rows.append(
                {
                    **head,
                    "method": row["method"],
                    "recipe": row["recipe"],
                    "seeds": row["n_seeds"],
                    "DSC, here": f"{row['dsc_mean']:.3f}",
                    "DSC, published": "",
                }
            )
        for name, dsc in PUBLISHED[cohort].get(labelled, {}).items():
            rows.append(
                {
                    **head,
                    "method": name,
                    "recipe": AUTHORS,
                    "seeds": "",
                    "DSC, here": "",
                    "DSC, published": f"{dsc:.3f}",
                }
            )
    return as_markdown(rows)


def beside_the_paper(table):
    """Our Table 1 beside the paper's, which is from other data: one row per method and rate.

    Where there are published figures from the same data, it stands beside those instead.
    """
    table = table[(table["seed"].astype(str) == "all") & (table["class"] == "mean") & table["dsc_mean"].notna()]
    ours = table[tested_split(table["cohort"]) == "test"]
    if set(ours["cohort"]) <= set(PUBLISHED):
        return beside_the_published(ours)
    rows, cohort = [], ours["cohort"].iloc[0]
    for rate in sorted(set(ours["rate"]) | {1}):
        for method in by_name():
            found = ours[(ours["rate"] == rate) & (ours["method"] == method)].set_index("recipe")
            paper = PAPER.get((method, rate))
            if not len(found) and not paper:
                continue
            row = {"our cohort": cohort, "method": method, "rate": f"{rate:g} %"}
            for name, at, digits in (("DSC", 0, 2), ("HD", 2, 2)):
                for recipe in ours["recipe"].unique():
                    label = f"{name}, {'ours, not trained' if recipe == '-' else f'ours, recipe {recipe}'}"
                    row[label] = spread(found.loc[recipe], name.lower(), digits) if recipe in found.index else ""
                row[f"{name}, the paper (other data)"] = f"{paper[at]:.2f} ± {paper[at + 1]:.2f}" if paper else ""
            rows.append(row)
    return as_markdown(rows)
