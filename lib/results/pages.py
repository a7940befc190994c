"""Tables in README.md and docs/*.md that are copies of result files, and numbers in their prose that are checked.

`python -m lib.results.pages` renews the tables and names every number that is not what its file says. The marks are
HTML comments, which GitHub hides:

    <!-- table: results/acdc/summary.md -->        the lines from here to <!-- /table --> are a copy of that file;
    <!-- table: headline -->                       of what headline() gives, or methods()
    0.926<!-- FILE.csv method=joint+ class=mean: dsc_mean -->      the one row with these values, and its column
    2.7<!-- FILE.json: runs.0.speedup -->                          the value at this path

A number agrees where it is the file's value rounded to the digits that are printed. A sign may be left out; `12%` is
0.12 in the file; `< 0.001` says that the value lies below. Values with spaces stand in quotes: `variant="no pairs"`;
a column without a name, an index, is addressed without one: `=dsc`.
"""

import json
import re
import shlex

import pandas as pd

from lib.methods.table import by_name
from lib.runs.params import ROOT

COHORTS = {"hippocampus_centre": "slice", "acdc": "patient"}  # of the headline, and what is labelled there
# Of the headline: another row shows a better mask of the same training, or of the same registrations.
LEFT_OUT = "registration", "combined", "ants"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)((?:(?!<!-- table: ).)*?)(<!-- /table -->)", re.DOTALL)
MARK = re.compile(r"<!-- ([^\s:]+\.(?:csv|json))\b((?:(?!-->).)*?)\s*-->", re.DOTALL)
NUMBER = re.compile(r"(<\s*|&lt;\s*)?([+\-−]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(\s?%)?\**$")


def pages():
    """README.md and docs/*.md, as paths."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def headline():
    """DSC of every method at every number of labels, on real data, as a Markdown table of strings.

    In brackets the difference from fs+elastic on the draws that both have, and how many draws there are. Columns have
    at least two methods.
    Raises FileNotFoundError where contest.csv of one of COHORTS is missing.
    """
    columns = {}
    for cohort, counted in COHORTS.items():
        table = pd.read_csv(ROOT / "results" / cohort / "contest.csv")
        chosen = (table["split"] == "test") & (table["selection"] == "none")
        for n, rows in table[chosen & ~table["method"].isin(LEFT_OUT)].groupby("n_labelled"):
            if len(rows) < 2:
                continue
            short = table["cohort"].iloc[0].split(" (")[0]
            name = f"{short}, {n} {counted}{'s' if n > 1 else ''}"
            columns[name] = {row["method"]: scored(row) for _, row in rows.iterrows()}
    table = pd.DataFrame(columns).reindex(list(by_name())).dropna(how="all").fillna("")
    return table.rename_axis("DSC").reset_index().to_markdown(index=False, disable_numparse=True)


def scored(row):
    """A method's DSC in words, from its row of contest.csv."""
    difference = "" if pd.isna(row["baseline_difference"]) else f"{row['baseline_difference']:+.3f}; "
    return f"{row['dsc_mean']:.3f} ({difference}{row['draws']})"


def methods():
    """The methods, what is tested of each and the notebook that trains it, as a Markdown table."""
    rows = [
        {"method": f"**{name}**", "what is tested": method.about, "notebook": f"[{stage}](notebooks/{stage}.ipynb)"}
        for name, method in by_name().items()
        for stage in [method.stage.notebook]
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


MADE = {"headline": headline, "methods": methods}


def source(name):
    """The content of a table by its name: one of MADE or a path. Raises FileNotFoundError where there is no file."""
    return MADE[name]() if name in MADE else (ROOT / name).read_text(encoding="utf-8")


def included(text):
    """The text with its tables renewed; where a file is missing, a table stays as it is and a note is printed."""

    def renewed(found):
        try:
            return f"{found[1]}\n{source(found[2]).strip()}\n\n{found[4]}"
        except FileNotFoundError as error:
            print(f"{error.filename} is missing: the table stays as it is")
            return found[0]

    return TABLE.sub(renewed, text)


def same(value, wanted):
    """Whether a cell, a string, is what a selector asks for: as numbers where both are, otherwise letter by letter."""
    try:
        return float(value) == float(wanted)
    except ValueError:
        return value == wanted


def value_at(file, selectors, column):
    """The number that a mark points at.

    Raises FileNotFoundError where there is no such file; ValueError where no row or more than one is selected, or what
    is there is no number; LookupError where there is no such column or path.
    """
    if file.endswith(".json"):
        value = json.loads((ROOT / file).read_text(encoding="utf-8"))
        for key in column.split("."):
            value = value[int(key) if isinstance(value, list) else key]
        return float(value)
    table = pd.read_csv(ROOT / file, dtype=str, keep_default_na=False).rename(columns={"Unnamed: 0": ""})
    for selector in shlex.split(selectors):
        name, _, wanted = selector.partition("=")
        table = table[[same(value, wanted) for value in table[name]]]
    if len(table) != 1:
        raise ValueError(f"{len(table)} rows are selected, not one")
    return float(table[column].iloc[0])


def agrees(printed, value):
    """Whether a printed number, a match of NUMBER, is ``value`` to the digits that it has."""
    below, sign, digits, percent = printed.groups()
    shown, scale = float(digits.replace(",", "")), 100 if percent else 1
    shown, value = (-shown if sign in ("-", "−") else shown), value * scale
    if below:
        return value < shown
    value = value if sign else abs(value)
    return abs(shown - value) <= 0.5 * 10.0 ** -len(digits.partition(".")[2]) + 1e-9


def disagreements(text):
    """Sentences, one for every mark that is not what its file says, or that cannot be read; none where all is well."""
    found = []
    for name in re.findall(r"<!-- table: (\S+) -->", text):
        if name not in MADE and not (ROOT / name).is_file():
            found.append(f"<!-- table: {name} -->: the file is missing")
    if not text.count("<!-- table: ") == text.count("<!-- /table -->") == len(TABLE.findall(text)):
        found.append("a <!-- table: … --> has no <!-- /table --> of its own")
    for mark in MARK.finditer(text):
        printed = NUMBER.search(text, max(0, mark.start() - 40), mark.start())
        selectors, colon, column = mark[2].rpartition(": ")
        if not printed or not colon:
            found.append(f"{mark[0]}: " + ("no ': column' in it" if printed else "no number stands before it"))
            continue
        try:
            value = value_at(mark[1], selectors, column.strip())
        except FileNotFoundError:
            found.append(f"{mark[0]}: the file is missing")
        except LookupError as error:
            found.append(f"{mark[0]}: there is no {error}")
        except (ValueError, TypeError) as error:
            found.append(f"{mark[0]}: {error}")
        else:
            if not agrees(printed, value):
                found.append(f"{mark[0]}: {printed[0]} is printed, the file says {value:g}")
    return found


def main():
    """Renew the tables of all pages, then print which numbers of their prose are no longer what the results say."""
    wrong = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = included(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables renewed")
        wrong += [f"{page.relative_to(ROOT)}: {sentence}" for sentence in disagreements(new)]
    print(*wrong, sep="\n", end="\n" if wrong else "")


if __name__ == "__main__":
    main()
